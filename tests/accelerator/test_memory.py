"""Memory of the pretended device: what `trueline plan` says of it, and a run that it is too small for."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.recipes.commands import Commands
from tests.recipes.reading import metrics
from tests.recipes.toys import KINDS, Toys

pytestmark = pytest.mark.slow


PLANS = [(stage, kind) for stage in ("sft", "reward", "dpo") for kind in ("full", "lora")] + [("ppo", "full"), ("ppo", "ptuning")]


@pytest.mark.parametrize(("stage", "kind"), PLANS)
def test_a_plan_is_made_and_measured(toys: Toys, on_device: Commands, tmp_path: Path, stage: str, kind: str) -> None:
    """In bfloat16, with as many layers recomputed as the memory asks for; where Triton's interpreter would generate, only made."""
    slow, short = (stage, kind) == ("ppo", "full"), kind == "lora"
    given = ["model.dtype=bfloat16", *KINDS[kind], f"run.output={tmp_path / 'run'}", *(["batch.memory=1"] if short else [])]
    options = ["--json", "--stage", stage, *(["--no-calibration"] if slow else [])]
    done = on_device("plan", *options, toys.config(stage), *given).ok()
    found: dict[str, Any] = json.loads(done.out)
    assert "without" not in done.err and not found["warnings"], done.err
    assert found["device"] == "cuda:0" and found["calibrated"] != slow and set(found["recompute"].values()) == {2 * short}
    assert min(found["peak"][name] for name in ("weights", "states", "activations")) > 0


def test_a_micro_batch_that_does_not_fit_is_halved(toys: Toys, on_device: Commands, tmp_path: Path) -> None:
    def run(name: str, **limits: object) -> tuple[list[float], int, str]:
        folder, report = tmp_path / name, tmp_path / f"{name}.json"
        given = [f"run.output={folder}", "model.recompute=false", "batch.sequences=12", "batch.max_tokens=2000"]
        out = on_device("sft", toys.config("sft"), *given, PRETEND_REPORT=report, **limits).ok().out
        return [line["loss"] for line in metrics(folder)], json.loads(report.read_text())["peak"], out

    expected, most, out = run("roomy")
    assert "out of memory" not in out
    found, peak, out = run("tight", PRETEND_MEMORY=most * 3 // 4)
    assert out.count("out of memory with") == 1 and "(batch.max_tokens), same loss" in out and peak <= most * 3 // 4
    assert found == pytest.approx(expected, rel=1e-4)
