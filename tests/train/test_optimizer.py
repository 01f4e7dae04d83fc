"""AdamW against the paper's update in NumPy, its state through a round trip, and the learning rate's course."""

import math
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from trueline.config.schema import OptimizerConfig
from trueline.errors import UserError
from trueline.train.optimizer import Optimizer, decays, learning_rate, make_optimizer, norm_parts, warmup_steps


def parameters(dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"weight": (3, 4), "bias": (5,), "other": (2, 2)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for name, shape in shapes.items()}


def run(optimizer: Optimizer, steps: range, skip: str = "") -> None:
    for step in steps:
        for i, (name, parameter) in enumerate(optimizer.parameters.items()):
            if name != skip:
                generator = torch.Generator().manual_seed(100 * step + i)
                parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
        optimizer.collect()
        optimizer.step(0.01 * (step + 1))


def test_adamw_against_the_paper() -> None:
    config = OptimizerConfig(lr=1.0, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6)
    named = parameters()
    expected = {name: p.detach().numpy().copy() for name, p in named.items()}
    m, v = ({name: np.zeros_like(x) for name, x in expected.items()} for _ in range(2))
    run(make_optimizer(named, config), range(4))
    for step in range(4):
        for i, name in enumerate(expected):
            g = torch.randn(expected[name].shape, generator=torch.Generator().manual_seed(100 * step + i), dtype=torch.float64).numpy()
            lr = 0.01 * (step + 1)
            if expected[name].ndim > 1:
                expected[name] *= 1 - lr * 0.1
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.9 * v[name] + 0.1 * g**2
            expected[name] -= lr * (m[name] / (1 - 0.8 ** (step + 1))) / (np.sqrt(v[name] / (1 - 0.9 ** (step + 1))) + 1e-6)
    for name, parameter in named.items():
        np.testing.assert_allclose(parameter.detach().numpy(), expected[name], rtol=0, atol=1e-12)


def test_vectors_do_not_decay() -> None:
    assert [decays(p) for p in parameters().values()] == [True, False, True]


def test_frozen_parameters_are_left_out() -> None:
    named = parameters()
    named["other"].requires_grad_(False)
    assert list(make_optimizer(named, OptimizerConfig()).parameters) == ["weight", "bias"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_state_round_trip_is_exact(dtype: torch.dtype) -> None:
    config = OptimizerConfig(weight_decay=0.1)
    straight = make_optimizer(parameters(dtype), config)
    run(straight, range(3), skip="other")  # "other" has no state yet
    kept = {name: x.clone() for name, x in straight.state().items()}
    weights = {name: p.detach().clone() for name, p in straight.parameters.items()}
    run(straight, range(3, 6))
    resumed = make_optimizer({name: nn.Parameter(x) for name, x in weights.items()}, config)
    resumed.load(kept)
    assert resumed.state().keys() == kept.keys()
    run(resumed, range(3, 6))
    for name, expected in straight.parameters.items():
        assert torch.equal(resumed.parameters[name], expected), name
    assert all(torch.equal(resumed.state()[name], x) for name, x in straight.state().items())


def test_loaded_state_is_a_copy() -> None:
    first, second = (make_optimizer(parameters(torch.bfloat16), OptimizerConfig()) for _ in range(2))
    run(first, range(1))
    second.load(first.state())
    before = {name: x.clone() for name, x in first.state().items()}
    run(second, range(1, 3))
    assert all(torch.equal(first.state()[name], x) for name, x in before.items())


@pytest.mark.parametrize("on_demand", [1, 1 << 40])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 16), (torch.float64, 16), (torch.bfloat16, 16), (torch.float64, 7)])
def test_rows_are_updated_as_the_whole(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, width: int, decay: float, on_demand: int
) -> None:
    """The same bits from sparse gradients as from dense ones, through a round trip too: rows come, stay away, and come back.

    Pieces of four rows hold none, few and most of those that came. What does not fill a vector is rounded otherwise.
    """
    monkeypatch.setattr("trueline.train.optimizer.CACHED", 4 * width)
    monkeypatch.setattr("trueline.train.optimizer.ON_DEMAND", on_demand)
    config, start = OptimizerConfig(weight_decay=decay), torch.randn(20, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    sparse, dense = (make_optimizer({"x": nn.Parameter(start.clone())}, config) for _ in range(2))
    for step, rows in enumerate([[3, 4, 11], [4], [0, 19, 3, 7, 8, 9, 10], [5], []]):
        gradient = torch.zeros(20, width, dtype=dtype)
        gradient[rows] = torch.randn(len(rows), width, generator=torch.Generator().manual_seed(step + 1)).to(dtype)
        dense.parameters["x"].grad = gradient
        sparse.parameters["x"].grad = gradient.clone() if step == 3 else gradient.to_sparse(1)  # a dense one in between
        for optimizer in (sparse, dense):
            optimizer.collect()
            optimizer.step(0.1)
        same = torch.equal if width == 16 else partial(torch.allclose, rtol=1e-13, atol=0)
        assert same(sparse.parameters["x"], dense.parameters["x"]), step
        assert all(same(sparse.state()[name], x) for name, x in dense.state().items())
        if step == 2:
            resumed = make_optimizer({"x": nn.Parameter(sparse.parameters["x"].detach().clone())}, config)
            resumed.load(sparse.state())
            sparse = resumed


@pytest.mark.parametrize(("dtype", "states"), [(torch.float32, "float32"), (torch.bfloat16, "float32"), (torch.bfloat16, "bfloat16")])
def test_sparse_gradients_are_summed_by_row(dtype: torch.dtype, states: str) -> None:
    weight = nn.Parameter(torch.zeros(50, 4, dtype=dtype))
    optimizer = Optimizer({"x": weight}, OptimizerConfig(states=states))
    tokens = torch.tensor([7, 7, 3, 49])
    for _ in range(3):
        nn.functional.embedding(tokens, weight, sparse=True).sum().backward()
        optimizer.collect()
    found = optimizer.gradients()["x"]
    expected = torch.zeros(50, 4).index_add(0, tokens, torch.full((4, 4), 3.0))
    assert torch.equal(found.to_dense().float(), expected) and found.is_sparse == (states == "float32")
    assert not found.is_sparse or found.values().shape == (3, 4)
    assert torch.equal(optimizer.gradients(all_of_them=True)["x"].float(), expected)  # what ranks add is dense


def test_16_bit_gradients_are_summed_in_float32() -> None:
    """1 + 300 times 2^-9: bfloat16 would stay at 1."""
    weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = Optimizer({"weight": weight}, OptimizerConfig())
    for value in [1.0] + [2.0**-9] * 300:
        weight.grad = torch.full_like(weight, value)
        optimizer.collect()
    assert optimizer.gradients()["weight"].item() == 1 + 300 * 2.0**-9


@pytest.mark.parametrize("states", ["float32", "bfloat16", "int8"])
def test_the_only_gradient_of_a_step_keeps_its_16_bits_and_gives_the_same_update(states: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Widened a piece at a time, and scaled then: the same bits as a float32 gradient that was scaled before."""
    monkeypatch.setattr("trueline.train.optimizer.CACHED", 256)
    monkeypatch.setattr("trueline.train.optimizer.PIECE", 512)
    config = OptimizerConfig(states=states, weight_decay=0.1)
    torch.manual_seed(0)
    start = torch.randn(40, 32).bfloat16()
    narrow, wide = (Optimizer({"x": nn.Parameter(start.clone())}, config, seed=3) for _ in range(2))
    scale = torch.tensor(0.37)
    for _ in range(3):
        gradient = torch.randn(40, 32).bfloat16()
        for optimizer in (narrow, wide):
            optimizer.parameters["x"].grad = gradient.clone()
            optimizer.collect()
        assert narrow.gradients()["x"].dtype == torch.bfloat16
        wide.sums["x"] = wide.sums["x"].float()
        norm = torch.linalg.vector_norm(norm_parts(narrow.gradients()["x"]))
        assert norm.item() == pytest.approx(gradient.double().norm().item(), rel=1e-6)
        for optimizer in (narrow, wide):
            optimizer.step(0.1, scale=scale)
        assert torch.equal(narrow.parameters["x"], wide.parameters["x"])
        assert all(torch.equal(narrow.state()[name], x) for name, x in wide.state().items())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda state: state | {"stranger.exp_avg": torch.zeros(1)}, "unexpected stranger"),
        (lambda state: state | {"weight.exp_avg": torch.zeros(1)}, r"weight.exp_avg has shape \[1\], expected \[3, 4\]"),
        (lambda state: state | {"bias.exp_avg": torch.zeros(5)}, "bias.exp_avg is torch.float32, expected torch.float64"),
    ],
)
def test_foreign_state_is_refused(change, complaint: str) -> None:  # type: ignore[no-untyped-def]
    optimizer = make_optimizer(parameters(), OptimizerConfig())
    run(optimizer, range(1))
    with pytest.raises(UserError, match=complaint):
        optimizer.load(change(optimizer.state()))


def test_states_of_float32_weights_are_refused_by_a_16_bit_model() -> None:
    wide = make_optimizer(parameters(torch.float32), OptimizerConfig())
    run(wide, range(1))
    with pytest.raises(UserError, match="missing weight.low"):
        make_optimizer(parameters(torch.bfloat16), OptimizerConfig()).load(wide.state())


def rates(total: int, **changes: object) -> list[float]:
    config = OptimizerConfig(**({"lr": 1.0} | changes))  # type: ignore[arg-type]
    return [learning_rate(step, total, config) for step in range(total)]


def test_learning_rate_by_hand() -> None:
    assert rates(6, warmup=2, schedule="linear") == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert rates(4, warmup=0, schedule="constant") == [1.0] * 4
    assert rates(4, warmup=0, schedule="linear", floor=0.5) == [1.0, 0.875, 0.75, 0.625]
    cosine = [0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]
    assert rates(4, warmup=0, schedule="cosine") == pytest.approx(cosine, abs=1e-15)
    assert rates(4, warmup=0, schedule="cosine", floor=0.1) == pytest.approx([0.1 + 0.9 * c for c in cosine], abs=1e-15)


def test_warmup_is_a_share_or_a_number() -> None:
    assert [warmup_steps(100, OptimizerConfig(warmup=w)) for w in (0.0, 0.05, 0.051, 1.0, 30.0)] == [0, 5, 6, 1, 30]
    assert rates(3, warmup=10) == pytest.approx([0.1, 0.2, 0.3])


def test_learning_rate_is_never_zero_before_the_end_and_stays_there_after() -> None:
    for schedule in ("linear", "cosine"):
        assert min(rates(50, warmup=0.1, schedule=schedule)) > 0
    config = OptimizerConfig(lr=1.0, warmup=0, schedule="linear", floor=0.25)
    assert learning_rate(10, 10, config) == learning_rate(99, 10, config) == 0.25


def test_a_model_and_an_update_need_no_compiler():
    """torch's compiler takes over a second to load, and loads by accident: by torch.optim.AdamW, by a draw on the meta device."""
    code = """
import sys, torch
from trueline.config.schema import OptimizerConfig
from trueline.model.decoder import Decoder, DecoderConfig
from trueline.train.optimizer import make_optimizer
config = DecoderConfig(8, 4, 1, 2, 1, 2, 4)
with torch.device("meta"):
    Decoder(config)
decoder = Decoder(config)
decoder.embed.weight.grad = torch.ones_like(decoder.embed.weight)
make_optimizer(dict(decoder.named_parameters()), OptimizerConfig()).step(0.1)
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
