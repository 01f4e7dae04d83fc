"""Every stage through the command line on the pretended device: the CPU's numbers, by the paths of a GPU."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import trueline as api
from tests.accelerator.test_answers import HAS_TRITON
from tests.recipes.commands import Commands
from tests.recipes.reading import PROBES, metrics
from tests.recipes.toys import KINDS, Toys

pytestmark = pytest.mark.slow

FEW = ["rollout.prompts=1", "sampling.max_new_tokens=5"]  # Triton's interpreter is slow
NARROW = ["model.dtype=bfloat16"]
Both = Callable[..., tuple[Path, Path]]


@pytest.fixture
def both(toys: Toys, trueline: Commands, on_device: Commands, tmp_path: Path) -> Both:
    """A run on the CPU and one on the device, which is given something more -> their folders; beside them what the device counted."""

    def run(stage: str, given: list[str], more: list[str]) -> tuple[Path, Path]:
        folders = tmp_path / "cpu", tmp_path / "device"
        for command, folder, extra in ((trueline, folders[0], []), (on_device, folders[1], more)):
            settings = [*given, *extra, f"run.output={folder}", "run.save_every=0"]
            if "reference.kind=stored" in given:
                settings.append(f"reference.path={folder}.reference")
                command("prepare", "--stage", stage, toys.config(stage), *settings).ok()
            done = command(stage, toys.config(stage), *settings, PRETEND_REPORT=tmp_path / "report.json").ok()
            assert "without" not in done.err, done.err  # a kernel, or recorded steps
        return folders

    return run


def counted(folder: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads((folder.parent / "report.json").read_text())
    return found


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder)]


REFERENCES = {"adapters-off": KINDS["lora"], "copy": KINDS["full"], "stored": [*KINDS["ptuning"], "reference.kind=stored"]}
RUNS = {f"sft-{kind}": given for kind, given in KINDS.items()}
RUNS |= {f"reward-{kind}": KINDS[kind] for kind in ("full", "lora")}
RUNS |= {f"dpo-{kind}": given for kind, given in REFERENCES.items()}
RUNS |= {"dpo-frozen": [*KINDS["lora"], "reference.kind=frozen", "reference.path={other}"]}
RUNS |= {f"ppo-{kind}": [*KINDS[kind], *FEW] for kind in KINDS}
RUNS |= {f"sft-random-{kind}": [*KINDS[kind], "model.init=random"] for kind in ("full", "lora")}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_the_cpu_s(both: Both, toys: Toys, name: str) -> None:
    """With a tied head."""
    stage = name.partition("-")[0]
    given = [text.format(other=toys.model("qwen2")) for text in RUNS[name]]
    cpu, device = both(stage, [f"model.path={toys.model('llama')}", *given], [])
    assert losses(device) == pytest.approx(losses(cpu), rel=1e-4, abs=1e-5)
    files = [path.relative_to(cpu) for path in cpu.rglob("*.safetensors") if "checkpoints" not in path.parts]
    assert files
    for file in files:
        expected, found = load_file(cpu / file), load_file(device / file)
        assert found.keys() == expected.keys()
        for tensor in expected:
            torch.testing.assert_close(found[tensor], expected[tensor], rtol=0, atol=1e-3)  # a tenth of an update
    if stage != "reward":
        expected, found = (torch.cat(api.load(str(folder / "model")).logprobs(PROBES)) for folder in (cpu, device))
        torch.testing.assert_close(found, expected, rtol=0, atol=0.01)
    counts = counted(device)
    assert bool(counts["graphs"]) == (stage == "ppo" and "ptuning" not in name and HAS_TRITON)


@pytest.mark.parametrize(
    ("stage", "given"),
    [
        ("sft", KINDS["full"]),
        ("sft", [*KINDS["full"], "model.recompute=true"]),  # the kernel is tried inside a layer that is recomputed
        ("sft", KINDS["ptuning"]),
        ("reward", KINDS["lora"]),
        ("dpo", KINDS["full"]),
        ("dpo", [*KINDS["lora"], "model.recompute=true"]),
    ],
    ids=lambda given: given if isinstance(given, str) else given[0].rpartition("=")[2] + "-again" * ("model.recompute=true" in given),
)
def test_bfloat16_runs_by_the_varlen_kernel(both: Both, stage: str, given: list[str]) -> None:
    cpu, device = both(stage, given, NARROW)
    assert losses(device) == pytest.approx(losses(cpu), rel=3e-2)
    assert counted(device)["flash"] >= 2 * 2  # layers, steps


STATES = {states: [f"optimizer.states={states}"] for states in ("float32", "bfloat16", "int8")}
STATES["in-backward"] = ["optimizer.in_backward=true", "optimizer.max_norm=null"]
STATES["in-backward-int8"] = [*STATES["in-backward"], *STATES["int8"]]


@pytest.mark.parametrize("kind", STATES)
def test_every_kind_of_states_updates_bfloat16_weights(both: Both, kind: str) -> None:
    cpu, device = both("sft", ["run.steps=3", "optimizer.max_norm=null", "optimizer.lr=0.005"], [*NARROW, *STATES[kind]])
    assert losses(device) == pytest.approx(losses(cpu), rel=3e-2)
    assert (counted(device)["launches"] > 8) == (kind == "bfloat16" and HAS_TRITON)  # its update is a kernel
