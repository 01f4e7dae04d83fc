"""What there is beside training, on the pretended device: going on, held-out records, answers, exports and Python's interface."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.recipes.commands import ROOT, Commands
from tests.recipes.reading import metrics, records
from tests.recipes.toys import KINDS, Toys, lines

pytestmark = pytest.mark.slow

KEPT = ["run.steps=3", "run.save_every=1", "run.keep=2"]
FEW = ["rollout.prompts=1", "sampling.max_new_tokens=3"]  # Triton's interpreter is slow
RUNS = {
    "sft": ["data.eval_fraction=0.2", "run.eval_every=1"],
    "sft-dropout": [*KINDS["lora"], "model.adapter.dropout=0.2"],
    "sft-bfloat16": ["model.dtype=bfloat16", "optimizer.states=bfloat16"],
    "sft-int8": ["model.dtype=bfloat16", "optimizer.states=int8"],
    "sft-split": ["model.dtype=bfloat16"],
    "reward": ["data.eval_fraction=0.2", "run.eval_every=1"],
    "dpo": ["dpo.share_prefix=on", "data.eval_fraction=0.2", "run.eval_every=1"],
    "ppo": [*FEW, *KINDS["lora"], "data.eval_fraction=0.1", "run.eval_every=3"],
}


def files(folder: Path) -> dict[str, bytes]:
    found = [path for part in ("model", "checkpoints") for path in (folder / part).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_with_the_same_bits(toys: Toys, on_device: Commands, tmp_path: Path, name: str) -> None:
    stage = name.partition("-")[0]
    given = [stage, toys.config(stage), *RUNS[name], *KEPT]
    on_device(*given, f"run.output={tmp_path / 'straight'}").ok()
    shutil.copytree(tmp_path / "straight", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "model")
    assert "going on from" in on_device(*given, f"run.output={tmp_path / 'again'}", "run.resume=2").ok().out
    straight, again = files(tmp_path / "straight"), files(tmp_path / "again")
    assert straight.keys() == again.keys() and [path for path in straight if straight[path] != again[path]] == []
    for split in ("train", "eval"):
        ours, theirs = ([line.get("loss") for line in metrics(tmp_path / which, split)] for which in ("again", "straight"))
        assert ours == theirs and (split == "train" or len(theirs) == len(metrics(tmp_path / "straight", "eval")))


def test_answers_and_measurements(toys: Toys, trueline: Commands, on_device: Commands, tmp_path: Path) -> None:
    prompts = lines(tmp_path / "prompts.jsonl", [{"prompt": "say red"}, {"prompt": "say blue"}])
    on_device("sft", toys.config("sft"), f"run.output={tmp_path / 'lora'}", *KINDS["lora"]).ok()
    for model in (toys.model(), tmp_path / "lora" / "model"):  # in bfloat16 on the device
        found = []
        for name, command in (("cpu", trueline), ("device", on_device)):
            done = command("generate", model, "--prompts", prompts, "--out", tmp_path / name, "max_new_tokens=3", "n=2").ok()
            assert "without" not in done.err
            found.append(records(tmp_path / name))
        firsts = [(a["logprobs"][0], b["logprobs"][0]) for a, b in zip(*found, strict=True) if a["tokens"][0] == b["tokens"][0]]
        assert firsts and all(got == pytest.approx(expected, abs=0.3) for expected, got in firsts)
    out = on_device("chat", toys.model(), "max_new_tokens=3", stdin="say red\nagain\n").ok().out
    assert out.count("\n") >= 2
    measured, dtype = [], "model.dtype=float32"
    for name, command in (("cpu", trueline), ("device", on_device)):
        given = [f"model.path={toys.model()}", f"data.eval={toys.data('messages.jsonl')}", "data.limit=4", "sampling.max_new_tokens=3"]
        command("evaluate", *given, dtype, f"run.output={tmp_path / 'measured' / name}").ok()
        measured.append(metrics(tmp_path / "measured" / name, "eval")[0])
    assert measured[1]["loss"] == pytest.approx(measured[0]["loss"], abs=1e-4)
    assert measured[1]["response_length"] == measured[0]["response_length"]


@pytest.mark.parametrize("kind", ["full", "lora", "merged"])
def test_an_export_of_a_run_on_the_device(toys: Toys, on_device: Commands, tmp_path: Path, kind: str) -> None:
    run, given = tmp_path / "run", KINDS["full" if kind == "full" else "lora"]
    on_device("sft", toys.config("sft"), f"run.output={run}", "model.dtype=bfloat16", *given).ok()
    done = on_device("export", run, tmp_path / "out", *(["--merge"] if kind == "merged" else [])).ok()
    assert "read back and equal" in done.out


def test_python_s_interface(toys: Toys, environment: dict[str, str]) -> None:
    program = """
import json, sys
from tests.accelerator import pretend
import trueline
model = trueline.load(sys.argv[1], dtype="float32")
assert model.opened.decoder.embed.weight.is_cuda
found = model.logprobs([[40, 41, 42], [60, 61]])
answers = model.generate([[5, 6, 7]], max_new_tokens=3)
print(json.dumps([[x.tolist() for x in found], answers[0].tokens]))
"""
    told = []
    for ours in (program, program.replace("from tests.accelerator import pretend\n", "").replace("assert model", "assert not model")):
        done = subprocess.run(
            [sys.executable, "-c", ours, str(toys.model())], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        told.append(json.loads(done.stdout))
    assert told[0][1] == told[1][1]
    for ours, theirs in zip(told[0][0], told[1][0], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
