"""Compiled layers: gradients as without, one compilation for all lengths, no trace in any file, one sentence where nothing compiles."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.recipes.commands import Commands
from tests.recipes.reading import metrics
from tests.recipes.toys import KINDS, Toys
from trueline.config.schema import AdapterConfig
from trueline.data.sample import Sample
from trueline.model.adapters import adapter_parameters, add_adapter, trainable
from trueline.model.batch import pack
from trueline.model.decoder import Decoder, DecoderConfig, init_weights
from trueline.model.heads import LanguageModel

CONFIG = DecoderConfig(vocab_size=50, hidden_size=24, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=4, mlp_size=40, init_std=0.2)
ROWS = replace(
    CONFIG, num_heads=3, num_kv_heads=3, head_dim=8, o_bias=True, mlp_bias=True, rope_rows=True, norm="layer", gated=False,
    residual_scale=2.5,
)  # fmt: skip
GLM = replace(CONFIG, rope="interleaved", rope_dim=2, post_norms=True, qk_norm=True)
ADAPTERS = {
    "full": None,
    "lora": AdapterConfig(kind="lora", rank=3, alpha=6.0),
    "dora": AdapterConfig(kind="lora", rank=3, alpha=6.0, dora=True, targets=("q", "gate")),
    "ptuning": AdapterConfig(kind="ptuning", tokens=5),
}
pytestmark = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="there is no C++ compiler")


@pytest.fixture(autouse=True)
def fresh(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing compiled before; what is compiled stays in one folder of this test run."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "compiled"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def gradients(decoder: Decoder, role: str | None, compiled: bool, lengths: tuple[int, ...]) -> tuple[float, dict[str, torch.Tensor]]:
    decoder.compile_layers = compiled
    model = LanguageModel(decoder, role)
    model.zero_grad()
    loss = -model.total(pack([Sample([(7 * i + n) % 50 for i in range(n)], [True] * n) for n in lengths]))
    loss.backward()
    return float(loss.detach()), {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def make(config: DecoderConfig, adapter: str, dtype: torch.dtype, recompute: int) -> tuple[Decoder, str | None]:
    decoder = Decoder(config)
    init_weights(decoder, torch.Generator().manual_seed(0))
    wanted, role = ADAPTERS[adapter], None if adapter == "full" else "policy"
    if wanted is not None and role is not None:
        add_adapter(decoder, role, wanted, 0)
        for parameter in adapter_parameters(decoder, role).values():
            torch.nn.init.normal_(parameter, 0, 0.2, generator=torch.Generator().manual_seed(1))
    decoder = decoder.to(dtype)
    trainable(decoder, role, "full" if wanted is None else wanted.kind)
    decoder.recompute = recompute
    return decoder, role


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys() and found
    return max(float((found[name] - gradient).norm() / gradient.norm()) for name, gradient in expected.items())


CASES = [(CONFIG, "lora", 2), (CONFIG, "full", 0), (CONFIG, "ptuning", 1), (CONFIG, "dora", 0), (GLM, "full", 3), (ROWS, "lora", 0)]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=["lora", "full", "ptuning", "dora", "glm", "rows"])
def test_gradients_are_those_without_and_lengths_compile_nothing_anew(case: tuple[DecoderConfig, str, int]) -> None:
    """In float32; the first has as many tokens as a state has channels, which must not become a constant."""
    config, adapter, recompute = case
    decoder, role = make(config, adapter, torch.float32, recompute)
    counted = []
    for lengths in ((24,), (7, 5, 5), (9, 9, 3, 2)):
        loss, expected = gradients(decoder, role, False, lengths)
        found = gradients(decoder, role, True, lengths)
        assert found[0] == pytest.approx(loss, rel=1e-6) and distance(found[1], expected) < 1e-5
        counted.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    # the halves on both sides of attention, and again for the first layer where its input has no gradient
    assert counted[0] == counted[1] == counted[2] == (2 if adapter == "full" else 4)
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
def test_bfloat16_is_as_near_as_bfloat16_is() -> None:
    decoder, role = make(CONFIG, "lora", torch.bfloat16, 1)
    sides = [gradients(decoder, role, compiled, (9, 14, 4))[1] for compiled in (False, True)]
    exact = gradients(decoder.double(), role, False, (9, 14, 4))[1]
    plain, compiled = (distance(side, exact) for side in sides)
    assert compiled < max(1.5 * plain, 0.02)


def test_without_gradients_nothing_is_compiled() -> None:
    """Rollouts, evaluations and references."""
    decoder, _ = make(CONFIG, "full", torch.float32, 0)
    decoder.compile_layers = True
    with torch.no_grad():
        LanguageModel(decoder)(pack([Sample([1, 2, 3], [True] * 3)]))
    assert not torch._dynamo.utils.counters["stats"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_run_is_the_same_and_its_files_know_nothing_of_it(toys: Toys, trueline: Commands, tmp_path: Path, stage: str) -> None:
    """Names in checkpoints and models; and the run goes on without."""
    kinds = {"sft": KINDS["full"], "ppo": KINDS["lora"]}[stage]
    names, losses = [], []
    for compiled in ("false", "true"):
        folder = tmp_path / compiled
        trueline(stage, toys.config(stage), f"run.output={folder}", f"model.compile={compiled}", *kinds).ok()
        found = {}
        for file in sorted(folder.rglob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                found[str(file.relative_to(folder))] = sorted(tensors.keys())
        names.append(found)
        losses.append([line["loss"] for line in metrics(folder)])
    assert names[0] == names[1] and names[0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3, abs=1e-4)
    trueline(stage, toys.config(stage), f"run.output={tmp_path / 'true'}", "model.compile=false", "run.steps=3", *kinds).ok()


@pytest.mark.parametrize("cached", [pytest.param(False, marks=pytest.mark.slow), True])
def test_without_a_compiler_one_sentence_says_so(toys: Toys, tmp_path: Path, cached: bool) -> None:
    command = [sys.executable, "-m", "trueline", "sft", toys.config("sft"), f"run.output={tmp_path / 'run'}", "model.compile=true"]
    environment = {k: v for k, v in os.environ.items() if k != "CXX"} | {"PATH": str(tmp_path)}
    if not cached:
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "compiled")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    first = done.stderr.splitlines()[0]
    assert done.returncode == 2 and "model.compile: true needs a compiler" in first, done.stderr
    assert "No working C++ compiler" in first and "install g++" in first and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_recomputed_layer_draws_the_same_dropout() -> None:
    decoder, role = make(CONFIG, "lora", torch.float32, 0)
    for module in decoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    found = []
    for recompute, seed in ((0, 1), (3, 1), (3, 2)):
        decoder.recompute = recompute
        torch.manual_seed(seed)
        found.append(gradients(decoder.train(), role, True, (9, 14, 4))[1])
    assert distance(found[1], found[0]) == 0 and distance(found[2], found[0]) > 0.1
