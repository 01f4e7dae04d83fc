"""A run that was stopped, however and whenever, and started again ends with the very bits of one that was not."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.recipes.commands import Commands, Started
from tests.recipes.reading import metrics, records, status
from tests.recipes.toys import KINDS, Toys
from trueline.recipes.actors import PARTS
from trueline.train import checkpoint

LORA = KINDS["lora"]
RUNS = {
    "sft": ["sft", "run.steps=24", "run.save_every=5", "data.eval_fraction=0.2", "run.eval_every=4"],
    "sft with dropout": ["sft", "run.steps=24", "run.save_every=5", *LORA, "model.adapter.dropout=0.2"],
    "sft with 8-bit states": ["sft", "run.steps=24", "run.save_every=5", "model.dtype=bfloat16", "optimizer.states=int8"],
    "reward": ["reward", "run.steps=null", "run.epochs=3", "run.save_every=4", "model.path={glm}"],
    "dpo": ["dpo", "run.steps=16", "run.save_every=5", *KINDS["ptuning"], "model.path={llama}"],
    "ppo": ["ppo", "run.steps=5", "run.save_every=2"],
    "ppo with an adaptive coefficient": ["ppo", "run.steps=5", "run.save_every=2", *LORA, "ppo.kl_target=0.1", "ppo.kl_horizon=16"],
}  # fmt: skip
TIMES = {"seconds", "tokens_per_second", "peak_memory_mb", "reward_overlapped_seconds"} | {f"{part}_seconds" for part in PARTS}


class Bench:
    """One kind of run, as often as a test needs it."""

    def __init__(self, trueline: Commands, toys: Toys, home: Path):
        self.trueline, self.toys, self.home = trueline, toys, home
        self.straight: dict[str, Path] = {}

    def arguments(self, name: str, folder: Path) -> list[str]:
        stage, *settings = RUNS[name]
        paths = {family: self.toys.model(family) for family in ("glm", "llama")}
        return [stage, self.toys.config(stage), f"run.output={folder}", *(text.format(**paths) for text in settings)]

    def start(self, name: str, folder: Path, *more: str) -> Started:
        return self.trueline.start(*self.arguments(name, folder), *more)

    def uninterrupted(self, name: str) -> Path:
        if name not in self.straight:
            self.straight[name] = self.home / name.replace(" ", "-")
            self.start(name, self.straight[name]).wait().ok()
        return self.straight[name]


@pytest.fixture(scope="module")
def bench(trueline: Commands, toys: Toys, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(trueline, toys, tmp_path_factory.mktemp("straight"))


def contents(folder: Path) -> dict[str, bytes]:
    """The model and the checkpoints, byte for byte."""
    files = [p for part in ("model", "checkpoints") for p in (folder / part).rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def numbers(folder: Path) -> list[dict[str, object]]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in records(folder / "metrics.jsonl")]


def same(folder: Path, straight: Path) -> None:
    ours, theirs = contents(folder), contents(straight)
    assert ours.keys() == theirs.keys() and len(ours) >= 8
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert numbers(folder) == numbers(straight)
    if (straight / "samples.jsonl").exists():
        assert (folder / "samples.jsonl").read_bytes() == (straight / "samples.jsonl").read_bytes()
    assert status(folder)["status"] == "finished" and not list(folder.glob(".model*"))


def reached(folder: Path, step: int) -> bool:
    """Whether the run has logged so many steps, or is over."""
    log = folder / "metrics.jsonl"
    return log.exists() and log.read_text().count('"train"') >= step or folder.exists() and "finished" in read(folder / "run.json")


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name == "reward" else []) for name in RUNS])
def test_killed_at_any_time_and_resumed(bench: Bench, tmp_path: Path, name: str) -> None:
    straight, folder = bench.uninterrupted(name), tmp_path / "run"
    total, draw = status(straight)["total"], random.Random(name)
    for part in (0.3, 0.7, 1.0):  # the last one dies while it saves, publishes or reports, or just after
        run = bench.start(name, folder).until(lambda: reached(folder, round(part * total)))  # noqa: B023
        time.sleep(draw.random() * 0.03)
        run.signal(signal.SIGKILL).wait()
    done = bench.start(name, folder).wait().ok()
    assert "going on from" in done.out
    same(folder, straight)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_a_signal_saves_first(bench: Bench, tmp_path: Path, name: str, number: signal.Signals, code: int) -> None:
    folder = tmp_path / "run"
    done = bench.start(name, folder).until(lambda: reached(folder, 2)).signal(number).wait()
    found, _ = checkpoint.newest(folder)
    assert found is not None
    message = f"stopped by {number.name} after step {found.step} and saved in {folder}; the same command goes on from there\n"
    assert done.refused(code) == message and f"{number.name}: saving after this step" in done.out
    ended = status(folder)
    assert ended["status"] == "interrupted" and ended["step"] == found.step and not (folder / "model").exists()
    assert [line["step"] for line in metrics(folder)] == list(range(1, found.step + 1))
    bench.start(name, folder).wait().ok()
    assert status(folder)["resumed_from"] == found.step
    same(folder, bench.uninterrupted(name))


def test_a_finished_run_is_left_as_it_is(bench: Bench, tmp_path: Path) -> None:
    for name in ("sft", "ppo"):
        folder = tmp_path / name
        shutil.copytree(bench.uninterrupted(name), folder)
        before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        done = bench.start(name, folder).wait().ok()
        assert "this run is finished already" in done.out
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_a_model_older_than_the_checkpoint_is_published_again(bench: Bench, tmp_path: Path) -> None:
    """A finished run that was asked to go on, and was killed after its last checkpoint."""
    folder = tmp_path / "run"
    shutil.copytree(bench.uninterrupted("sft"), folder)
    shutil.copy(bench.toys.model() / "model.safetensors", folder / "model")
    (folder / ".model.123.tmp").mkdir()
    (folder / "run.json").write_text(json.dumps(status(folder) | {"status": "running"}))
    bench.start("sft", folder).wait().ok()
    same(folder, bench.uninterrupted("sft"))


def test_which_checkpoint_it_goes_on_from(bench: Bench, tmp_path: Path) -> None:
    straight, folder = bench.uninterrupted("sft"), tmp_path / "run"
    shutil.copytree(straight, folder)
    assert checkpoint.steps(folder) == [20, 24]
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    never = bench.start("sft", folder, "run.resume=never").wait().refused()
    assert "run.resume is never, but" in never and "holds steps 20, 24" in never
    missing = bench.start("sft", folder, "run.resume=7").wait().refused()
    assert "run.resume is 7, but" in missing and "holds steps 20, 24" in missing
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert "step-000020" in bench.start("sft", folder, "run.resume=20").wait().ok().out
    same(folder, straight)
    weights = folder / "checkpoints" / "step-000024" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + bytes([weights.read_bytes()[-1] ^ 1]))
    said = bench.start("sft", folder).wait().ok().out
    assert f"{weights.parent} is damaged: model.safetensors is not as it was written" in said and "going on from" in said
    same(folder, straight)


def test_keep(bench: Bench, tmp_path: Path) -> None:
    bench.start("sft", tmp_path / "run", "run.keep=3", "run.save_every=4").wait().ok()
    assert checkpoint.steps(tmp_path / "run") == [16, 20, 24]
    bench.start("sft", tmp_path / "end", "run.save_every=0").wait().ok()
    assert checkpoint.steps(tmp_path / "end") == [24]


@pytest.mark.parametrize(
    ("name", "changed", "what"),
    [
        ("sft", "run.seed=1", "seed and data"),  # the held-out records are drawn with it
        ("reward", "run.seed=1", "seed"),
        ("sft", "batch.sequences=3", "batch.sequences"),
        ("sft", "data.limit=9", "data"),
        ("sft", "data.train_on=last", "data"),
        ("dpo", "model.path={qwen2}", "data and model"),
        ("ppo", "rollout.samples=3", "rollout.samples"),
        ("ppo with an adaptive coefficient", "model.init=random", "model"),
    ],
)
def test_other_data_or_another_seed_is_refused(bench: Bench, tmp_path: Path, name: str, changed: str, what: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(bench.uninterrupted(name), folder)
    for path in (folder / "checkpoints").glob("step-*"):
        if int(path.name[5:]) == status(folder)["total"]:
            shutil.rmtree(path)  # not finished yet
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    message = bench.start(name, folder, changed.format(qwen2=bench.toys.model())).wait().refused()
    assert f"was made with another {what}, so the run cannot go on exactly" in message, message
    after = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert {p for p in before if before[p] != after.get(p)} <= {folder / "reference.safetensors"}


def test_other_trained_parameters_are_refused(bench: Bench, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(bench.uninterrupted("sft with dropout"), folder)
    for changed in ("model.adapter.rank=2", "model.adapter.kind=full", "model.adapter.targets=[q]"):
        message = bench.start("sft with dropout", folder, "run.resume=20", changed).wait().refused()
        assert "belongs to other trained parameters than the config asks for" in message
    assert contents(folder) == contents(bench.uninterrupted("sft with dropout"))


def test_two_runs_in_one_folder(bench: Bench, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = bench.start("ppo", folder).until(lambda: reached(folder, 1))
    message = bench.start("ppo", folder).wait().refused()
    assert f"run.output: {folder} is in use by process {first.pid} on " in message
    first.wait().ok()
    same(folder, bench.uninterrupted("ppo"))
