"""Killed anywhere, damaged anyhow: what is loaded is a checkpoint as it was saved; and a resumed run ends with the very same bits."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trueline.config.schema import OptimizerConfig
from trueline.data.sample import Sample
from trueline.data.stream import key, step_indices
from trueline.model.batch import Batch, pack
from trueline.model.decoder import Decoder, DecoderConfig, init_weights
from trueline.model.heads import LanguageModel
from trueline.parallel.world import World
from trueline.train.checkpoint import choose, damage, load, newest, save
from trueline.train.optimizer import Optimizer, learning_rate, make_optimizer
from trueline.train.step import Losses, Totals, train_step

ROOT = Path(__file__).resolve().parents[2]
SIZES = DecoderConfig(vocab_size=23, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, mlp_size=24)
OPTIMIZER = OptimizerConfig(lr=1e-2, weight_decay=0.1)
TOTAL = 6


def start(dtype: torch.dtype) -> tuple[LanguageModel, Optimizer]:
    decoder = Decoder(SIZES)
    init_weights(decoder, torch.Generator().manual_seed(1))
    model = LanguageModel(decoder.to(dtype))
    return model, make_optimizer(dict(decoder.named_parameters()), OPTIMIZER)


def samples() -> list[Sample]:
    draw = random.Random(2)
    return [Sample([draw.randrange(23) for _ in range(9)], [False] * 3 + [True] * 6) for _ in range(10)]


def advance(model: LanguageModel, optimizer: Optimizer, steps: range) -> list[float]:
    def objective(batch: Batch) -> tuple[Losses, Totals]:
        logprobs = torch.nn.functional.dropout(model(batch), 0.1)  # drawn anew each step, the same after a resume
        return {"tokens": -(logprobs * batch.trained).sum()}, {}

    losses, records = [], samples()
    for step in steps:
        chosen = [records[i] for i in step_indices(7, step, len(records), 4)]
        batches = [pack(chosen[:3]), pack(chosen[3:])]
        rate = learning_rate(step, TOTAL, OPTIMIZER)
        count = {"world": World(), "max_norm": 1.0, "lr": rate, "step": step + 1, "seed": key(7, "dropout", step)}
        losses.append(train_step(optimizer, batches, objective, lambda b: {"tokens": b.trained.sum()}, **count)["loss"])  # type: ignore[arg-type]
    return losses


def weights(model: LanguageModel) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.decoder.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("at", [1, 4, TOTAL])
def test_resumed_or_straight_to_the_last_bit(tmp_path: Path, dtype: torch.dtype, at: int) -> None:
    straight, optimizer = start(dtype)
    losses = advance(straight, optimizer, range(at))
    save(tmp_path, at, {"model": weights(straight), "optimizer": optimizer.state()}, {"step": at}, keep=1)
    losses += advance(straight, optimizer, range(at, TOTAL))

    resumed, fresh = start(dtype)
    advance(resumed, fresh, range(2))  # whatever was there before the load is gone after it
    found, _ = choose(tmp_path, "auto")
    assert found is not None
    tensors, state = load(found)
    fresh.load(tensors["optimizer"])
    with torch.no_grad():
        for name, parameter in resumed.decoder.named_parameters():
            parameter.copy_(tensors["model"][name])
    assert advance(resumed, fresh, range(state["step"], TOTAL)) == losses[at:]
    assert losses[-1] < losses[0]
    for name, expected in weights(straight).items():
        assert torch.equal(weights(resumed)[name], expected), name
    assert all(torch.equal(fresh.state()[name], x) for name, x in optimizer.state().items())


def test_no_mutation_is_accepted(tmp_path: Path) -> None:
    """Bits flipped, files cut, lengthened, swapped, taken away, added, renamed: 300 of them, none passes."""
    saved = save(tmp_path, 7, {"model": {"a": torch.randn(40)}, "other": {"a": torch.randn(40)}}, {"x": [1, 2]}, keep=1)
    draw, copy = random.Random(3), tmp_path / "step-000007"
    for trial in range(300):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(saved.path, copy)
        assert trial or damage(copy) is None
        path = draw.choice(sorted(copy.iterdir()))
        data = bytearray(path.read_bytes())
        kind = trial % 6
        if kind == 0:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            path.write_bytes(data)
        elif kind == 1:
            path.write_bytes(data[: draw.randrange(len(data))])
        elif kind == 2:
            path.write_bytes(data + draw.choice([b"\0", b" ", b"\n", bytes(data)]))
        elif kind == 3:
            path.unlink()
        elif kind == 4:
            (copy / draw.choice(["extra", "x.safetensors", "manifest.json.tmp"])).write_bytes(bytes(data))
        else:
            (copy / "model.safetensors").rename(copy / "swap")
            (copy / "other.safetensors").rename(copy / "model.safetensors")
            (copy / "swap").rename(copy / "other.safetensors")
        assert damage(copy), f"trial {trial}: kind {kind} on {path.name} passed"
    shutil.rmtree(copy)
    assert damage(saved.path.rename(saved.path.with_name("step-000008"))) == "its manifest is of step 7"


KILLER = """
import os, shutil, signal, sys
from pathlib import Path
import torch
from trueline.train import checkpoint

def tensors(step):
    return {"model": {"a": torch.full((1000,), float(step))}, "optimizer": {"a": torch.full((1000,), -float(step))}}

def child(folder, kill_at, scenario):
    counter = 0
    def watch(event, args):
        nonlocal counter
        if event.split(".")[0] in ("open", "os", "shutil"):
            counter += 1
            if counter == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(watch)
    checkpoint.save(folder, scenario, tensors(scenario + 0.5), {"step": scenario}, keep=2)
    os._exit(0)

torch.set_num_threads(1)
root = Path(sys.argv[1])
for step in (5, 10, 20):
    checkpoint.save(root / "before", step, tensors(step), {"step": step}, keep=3)
for scenario in (30, 10):  # a new step, whose save prunes step 10; and one saved before with other numbers, which leaves 20 behind
    kill_at, alive = 0, False
    while not alive:
        kill_at += 1
        folder = root / f"{scenario}-{kill_at}"
        shutil.copytree(root / "before", folder)
        pid = os.fork()
        if pid == 0:
            child(folder, kill_at, scenario)
        alive = os.waitpid(pid, 0)[1] == 0
"""


def test_killed_inside_a_save_at_every_call(tmp_path: Path) -> None:
    """SIGKILL at each file operation in turn: the newest sound checkpoint is an old one or the new one, whole; and the next save works."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, "-c", KILLER, str(tmp_path)], cwd=ROOT, env=environment, check=True, timeout=120)
    folders = sorted(path for path in tmp_path.iterdir() if path.name != "before")
    assert len(folders) > 50
    outcomes = set()
    for number, folder in enumerate(folders):
        scenario = int(folder.name.split("-")[0])
        found, _ = newest(folder)
        assert found is not None, folder.name
        tensors, state = load(found)
        assert state == {"step": found.step}
        values = {float(x) for x in tensors["model"]["a"]}
        assert values in ({float(found.step)}, {scenario + 0.5}) and {float(x) for x in tensors["optimizer"]["a"]} == {-v for v in values}
        outcomes.add((scenario, found.step, values.pop()))
        if number % 4 == 0:
            save(folder, 40, {"model": {"a": torch.ones(3)}}, {}, keep=1)
            assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-000040"]
    assert {(30, 20, 20.0), (30, 30, 30.5), (10, 20, 20.0), (10, 10, 10.5)} <= outcomes
