"""How often a training step waits for the pretended device. One question costs little; one in every layer leaves a GPU without work."""

import json
from pathlib import Path

import pytest

from tests.recipes.commands import Commands
from tests.recipes.toys import KINDS, Toys

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("stage", "more"),
    [("sft", []), ("sft", ["optimizer.states=int8"]), ("sft", ["model.recompute=true", *KINDS["lora"]]), ("reward", []), ("dpo", [])],
    ids=["sft", "int8", "lora", "reward", "dpo"],
)
def test_a_step_waits_as_often_whatever_the_number_of_layers(
    toys: Toys, on_device: Commands, tmp_path: Path, stage: str, more: list[str]
) -> None:
    """In several micro-batches."""

    def waits(layers: int) -> int:
        """Of one step more: loading, saving and the first step have many of their own."""
        folder = tmp_path / f"{layers}"
        folder.mkdir()
        for file in toys.model().iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        sizes = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": layers}
        (folder / "config.json").write_text(json.dumps(sizes))
        found = []
        for steps in (2, 3):
            run, report = folder / f"{steps}", folder / f"{steps}.json"
            given = [f"model.path={folder}", "model.init=random", "model.dtype=bfloat16", "batch.max_tokens=64", "run.save_every=0"]
            given += [f"run.steps={steps}", f"run.output={run}"]
            on_device(stage, toys.config(stage), *given, *more, PRETEND_REPORT=report).ok()
            found.append(json.loads(report.read_text())["waits"])
        return found[1] - found[0]

    few, many = waits(2), waits(4)
    assert 0 < few == many
