"""Narrow optimizer states against NumPy: what is kept, how it is rounded, that a resumed run has the same bits, and what it costs."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from tests.model.test_rounding import CPU, neighbours, wide
from trueline.config.schema import OptimizerConfig
from trueline.data.sample import Sample
from trueline.data.stream import key
from trueline.errors import UserError
from trueline.model.batch import Batch, pack
from trueline.model.decoder import Decoder, DecoderConfig, init_weights
from trueline.model.heads import LanguageModel
from trueline.model.rounding import draws
from trueline.parallel.world import World
from trueline.recipes.sft import count_tokens, sft_objective
from trueline.train import optimizer as optimizer_module
from trueline.train.optimizer import Optimizer, make_optimizer
from trueline.train.step import train_step
from trueline.train.stores import BLOCK, PERIOD, decode, encode, join, levels, part, thresholds_from

SIZES = DecoderConfig(vocab_size=48, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, mlp_size=48)
NARROW = ("bfloat16", "int8")


def parted(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a whole parameter."""
    narrow, rest = torch.empty(len(x), dtype=torch.bfloat16), torch.empty(len(x), dtype=torch.int16)
    part(x.clone(), [narrow], [rest], [thresholds_from(0, len(x), CPU)], torch.empty(len(x), dtype=torch.int32))
    return narrow, rest


def joined(narrow: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    marks, rooms = [thresholds_from(0, narrow.numel(), CPU)], torch.empty(2, narrow.numel(), dtype=torch.int32)
    return join([narrow.flatten()], [rest.flatten()], marks, *rooms).view(narrow.shape)


def test_a_neighbour_and_the_lower_bits_hold_every_bit() -> None:
    """Against the bits in NumPy: the weight is the farther neighbour where the lower 16 bits and its threshold make a whole."""
    edges = torch.tensor([0x3F808000, 0x3F818000, -0x407F8000, 1, 0, 0x3F7FFFFF, -(2**31), -(2**31) + 5], dtype=torch.int32)
    x = torch.cat((edges.view(torch.float32).repeat(50), wide(PERIOD + 100_000)))
    found, rest = parted(x)
    bits, marks = x.view(torch.int32).numpy().astype(np.int64), thresholds_from(0, len(x), CPU).numpy().astype(np.int64)
    raised = (bits & 0xFFFF) + marks + 2**15 >= 2**16
    assert 0.49 < raised[400:].mean() < 0.51
    expected = ((bits >> 16) + raised).astype(np.int16)
    assert np.array_equal(found.view(torch.int16).numpy(), expected)
    assert np.array_equal(rest.numpy(), (bits & 0xFFFF).astype(np.uint16).astype(np.int16))
    assert torch.equal(joined(found, rest).view(torch.int32), x.view(torch.int32))
    same = x.bfloat16()
    assert torch.equal(parted(same.float())[0].view(torch.int16), same.view(torch.int16)) and not parted(same.float())[1].any()


def test_thresholds_belong_to_a_weight_s_place() -> None:
    table = thresholds_from(0, PERIOD, CPU)
    assert table.dtype == torch.int16 and abs(table.double().mean()) < 100 and table.min() < -32000 and table.max() > 32000
    for place, length in ((5, 7), (PERIOD - 3, 10), (3 * PERIOD + 1, PERIOD), (7, 2 * PERIOD + 5)):
        expected = table[(torch.arange(length) + place) % PERIOD]
        assert torch.equal(thresholds_from(place, length, CPU), expected)


@pytest.mark.parametrize("signed", [True, False])
def test_levels_are_those_of_the_paper(signed: bool) -> None:
    table = levels(signed, CPU).double().numpy()
    assert len(table) == 256 and (np.diff(table) > 0).all() and table[-1] == 1 and table[0] == (-1 if signed else 0) and 0 in table
    for i in range(7):  # in each decade, evenly spaced middles
        inside = table[(table > 10.0 ** (i - 7)) & (table < 10.0 ** (i - 6)) & (table < 1)]
        n = 2 ** (i if signed else i + 1)
        np.testing.assert_allclose(inside, 10.0 ** (i - 6) * (0.1 + 0.9 * (np.arange(n) + 0.5) / n), rtol=1e-6)
    assert (table < 0).sum() == (127 if signed else 0)


@pytest.mark.parametrize("signed", [True, False])
def test_8_bit_codes_are_neighbours_without_bias_and_a_square_is_never_zero(signed: bool) -> None:
    x, table, rounds = wide(600, seed=2), levels(signed, CPU), 2000
    x = x if signed else x**2
    x[-1] = 0
    scales = np.array([np.abs(x[i : i + BLOCK].numpy()).max() for i in range(0, len(x), BLOCK)])
    share = (x.numpy() / scales.repeat(BLOCK)[: len(x)]).astype(np.float64)
    below = np.array([np.flatnonzero(table.double().numpy() <= s)[-1] for s in share]).clip(0, 254)
    low, high = table.double().numpy()[below], table.double().numpy()[below + 1]
    found = []
    for step in range(rounds):
        codes, kept = encode(x, table, draws(step, len(x), CPU)(), signed)
        assert np.array_equal(kept.numpy(), scales)
        found.append(table.double().numpy()[codes.numpy()])
    drawn = np.stack(found)
    assert ((drawn == low) | (drawn == high)).all()
    part = (share - low) / (high - low)
    fair = np.abs(drawn.mean(0) - share) <= (high - low) * (4 * np.sqrt(np.maximum(part * (1 - part), 1 / rounds) / rounds) + 2 / 65536)
    floor = (below == 0) & (share > 0) & (not signed)
    assert fair[~floor].all() and (drawn[:, floor] > 0).all() and (signed or floor.any())
    torch.testing.assert_close(decode(codes, kept, table).double().numpy(), drawn[-1] * scales.repeat(BLOCK)[: len(x)], rtol=1e-6, atol=0)


def by_numpy(kind: str, start: np.ndarray, gradients: list[np.ndarray], config: OptimizerConfig, lr: float) -> np.ndarray:
    """The whole run of one matrix in float64, with the store's rounding from its definition and the published draws."""
    n = start.size
    w, m, v = start.astype(np.float64), np.zeros(n), np.zeros(n)
    tables = {"m": levels(True, CPU).double().numpy(), "v": levels(False, CPU).double().numpy()}

    def narrow(x: np.ndarray, u: np.ndarray) -> np.ndarray:
        low, high = neighbours(np.where(x == 0, 1, x).astype(np.float32))
        x32 = x.astype(np.float32).astype(np.float64)
        return np.where(x == 0, 0, np.where(np.abs(x32 - low) + np.abs(high - low) * (u / 65536) >= np.abs(high - low), high, low))

    def coded(x: np.ndarray, u: np.ndarray, name: str) -> np.ndarray:
        out = np.zeros(n)
        for i in range(n):
            scale = np.abs(x[i // BLOCK * BLOCK :][:BLOCK]).max() or 1.0
            share, table = x[i] / scale, tables[name]
            at = min(np.flatnonzero(table <= share)[-1], 254)
            at += u[i] / 65536 < (share - table[at]) / (table[at + 1] - table[at])
            out[i] = scale * table[max(at, 1) if name == "v" and x[i] > 0 else at]
        return out

    for step, g in enumerate(gradients):
        beta1, beta2 = config.betas
        w = w * (1 - lr * config.weight_decay)
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        w = w - lr * (m / (1 - beta1 ** (step + 1))) / (np.sqrt(v / (1 - beta2 ** (step + 1))) + config.eps)
        stream = np.random.Philox(key=key(9, "rounding", step, 0, 0))
        u = [stream.random_raw(-(-n // 4)).view(np.uint16)[:n].astype(np.float64) for _ in range(3)]
        w = narrow(w, u[0])
        m, v = (narrow(m, u[1]), narrow(v, u[2])) if kind == "bfloat16" else (coded(m, u[1], "m"), coded(v, u[2], "v"))
    return w


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_updates_are_numpys(kind: str) -> None:
    """float64 may fall on the other side of a draw where float32 fell on one: a few in a hundred thousand."""
    config = OptimizerConfig(states=kind, weight_decay=0.1, betas=(0.9, 0.99))
    draw = torch.Generator().manual_seed(4)
    weight = nn.Parameter(torch.randn(20, 30, generator=draw).bfloat16())
    start, gradients = weight.detach().double().numpy().ravel().copy(), [torch.randn(20, 30, generator=draw).bfloat16() for _ in range(6)]
    made = Optimizer({"w": weight}, config, seed=9)
    for gradient in gradients:
        weight.grad = gradient.clone()
        made.collect()
        made.step(0.01)
    expected = by_numpy(kind, start, [g.double().numpy().ravel() for g in gradients], config, 0.01)
    same = weight.detach().double().numpy().ravel() == expected
    assert same.mean() > 0.99, same.mean()


def model(dtype: torch.dtype = torch.bfloat16) -> LanguageModel:
    decoder = Decoder(SIZES)
    init_weights(decoder, torch.Generator().manual_seed(1))
    return LanguageModel(decoder.to(dtype))


def batches(step: int) -> list[Batch]:
    """Sequences that count up by a step of their own: something to learn."""
    draw = random.Random(step)
    rows = [(draw.randrange(48), draw.randrange(1, 4)) for _ in range(8)]
    samples = [Sample([(a + b * i) % 48 for i in range(12)], [i > 1 for i in range(12)]) for a, b in rows]
    return [pack(samples[:4]), pack(samples[4:])]


def advance(of: LanguageModel, made: Optimizer, steps: range) -> list[float]:
    settings = {"world": World(), "max_norm": 1.0, "lr": 3e-3, "seed": 0}
    return [train_step(made, batches(s), sft_objective(of), count_tokens, step=s + 1, **settings)["loss"] for s in steps]  # type: ignore[arg-type]


def start(states: str, seed: int = 7, dtype: torch.dtype = torch.bfloat16) -> tuple[LanguageModel, Optimizer]:
    of = model(dtype)
    return of, make_optimizer(dict(of.decoder.named_parameters()), OptimizerConfig(states=states, weight_decay=0.1), seed)


@pytest.mark.parametrize("cached", [100, 1 << 20])
def test_float32_states_have_the_bits_of_a_float32_copy(monkeypatch: pytest.MonkeyPatch, cached: int) -> None:
    """Beside torch's own AdamW on float32 copies: in pieces that cut and join parameters, with gradients of 16 bits and of sums, after
    which clipping scales both, and with steps in which a parameter has none."""
    monkeypatch.setattr(optimizer_module, "CACHED", cached)
    shapes, draw = {"a": (40, 7), "bias": (30,), "b": (3, 11), "c": (8, 8)}, torch.Generator().manual_seed(0)
    weights = {name: nn.Parameter(torch.randn(shape, generator=draw).bfloat16()) for name, shape in shapes.items()}
    copies = {name: nn.Parameter(p.detach().float()) for name, p in weights.items()}
    made = make_optimizer(weights, OptimizerConfig(weight_decay=0.1, betas=(0.9, 0.99)))
    matrices, vector = [copies[name] for name in ("a", "b", "c")], [copies["bias"]]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vector, "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.99), eps=1e-8, fused=True)
    scale = torch.tensor(0.37)
    for step in range(12):
        for name, weight in weights.items():
            summed = torch.zeros(shapes[name])
            for _ in range(0 if step % 3 == 1 and name == "b" else 2 if name == "a" else 1):
                weight.grad = torch.randn(shapes[name], generator=draw).bfloat16()
                summed += weight.grad
                made.collect(name)
            copies[name].grad = summed.mul_(scale) if summed.any() else None
        theirs.step()
        made.step(0.01, scale=scale)
    for name, weight in weights.items():
        assert torch.equal(joined(weight.detach(), made.kept[name]["low"]), copies[name]), name
        assert torch.equal(weight, parted(copies[name].detach().flatten())[0].view(shapes[name])) and made.kept[name]["low"].any()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("states", ["float32", "bfloat16", "int8", "float32 weights"])
def test_updates_in_the_backward_pass_are_the_same_bits(states: str, tied: bool) -> None:
    """Weights, states, losses and norms; each gradient is dropped before the next layer's is made."""
    found = []
    for inside in (False, True):
        dtype = torch.float32 if states == "float32 weights" else torch.bfloat16
        of = model(dtype)
        if tied:
            of.decoder.head.weight = of.decoder.embed.weight
        of.decoder.recompute = True
        config = OptimizerConfig(states=states.split()[0], weight_decay=0.1, max_norm=None, in_backward=inside)
        made = make_optimizer(dict(of.decoder.named_parameters()), config, 7)
        held: list[int] = []

        def count(_: object, made: Optimizer = made, held: list[int] = held) -> None:
            held.append(len(made.sums) + sum(p.grad is not None for p in made.parameters.values()))

        hooks = [p.register_post_accumulate_grad_hook(count) for p in made.parameters.values()]
        settings = {"world": World(), "max_norm": None, "lr": 3e-3, "seed": 0}
        logged = [train_step(made, batches(s)[:1], sft_objective(of), count_tokens, step=s + 1, **settings) for s in range(4)]
        assert max(held) == (1 if inside else len(made.parameters)) and len(held) == 4 * len(hooks)
        assert not made.gradients()
        found.append((logged, {n: p.detach() for n, p in made.parameters.items()} | made.state()))
    (plain, expected), (inner, same) = found
    assert inner == plain and same.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(same[name], value), name


def test_pieces_share_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces the draws differ, the step count does not; without a piece's end inside a block the scales are the same."""
    whole = start("int8")[1]
    monkeypatch.setattr(optimizer_module, "PIECE", 512)
    cut = start("int8")[1]
    for made in (whole, cut):
        for i, parameter in enumerate(made.parameters.values()):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)).bfloat16()
        made.collect()
        made.step(1e-3)
    for name in whole.parameters:
        assert cut.kept[name]["step"] == whole.kept[name]["step"] == 1
        assert torch.equal(cut.kept[name]["exp_avg_scale"], whole.kept[name]["exp_avg_scale"])


@pytest.mark.slow
def test_loss_curves_follow_float32() -> None:
    curves = {states: np.array(advance(*start(states), range(200))) for states in ("float32", *NARROW)}
    exact = curves["float32"]
    assert exact[-20:].mean() < 0.5 * exact[:5].mean()
    for states in NARROW:
        gap = abs(curves[states][-20:].mean() - exact[-20:].mean())
        assert gap < 0.1 * exact[:5].mean(), (states, gap, exact[-20:].mean())


def lowered(states: str, size: int, updates: int) -> tuple[torch.Tensor, Optimizer]:
    """Ones `[size, size]` after so many updates of 1e-5."""
    weight = nn.Parameter(torch.ones(size, size, dtype=torch.bfloat16))
    made = Optimizer({"w": weight}, OptimizerConfig(betas=(0.0, 0.0), eps=1e-12, states=states))  # type: ignore[arg-type]
    for _ in range(updates):
        weight.grad = torch.ones_like(weight)
        made.collect()
        made.step(1e-5)
    return weight.detach(), made


def test_small_updates_add_up_without_a_master() -> None:
    """1,000 updates of 1e-5: to the nearest bfloat16 each would be rounded away."""
    for states in ("float32", *NARROW):
        weight, made = lowered(states, 64, 1000)
        end = joined(weight, made.kept["w"]["low"]) if states == "float32" else weight
        assert end.double().mean().item() == pytest.approx(0.99, abs=6e-5 if states == "float32" else 5e-4), states  # 1,000 half ulps


@pytest.mark.parametrize("states", ["float32", *NARROW])
def test_small_updates_are_seen_at_once(states: str) -> None:
    """10 updates of 1e-5 are a fiftieth of a last place: to the nearest, no weight would have moved."""
    weight, _ = lowered(states, 512, 10)
    assert 1 - weight.double().mean().item() == pytest.approx(1e-4, rel=0.1)  # five deviations


@pytest.mark.parametrize("states", ["float32", *NARROW])
def test_resumed_or_straight_to_the_last_bit(states: str) -> None:
    straight, made = start(states)
    advance(straight, made, range(3))
    state = {name: x.clone() for name, x in made.state().items()}
    weights = {name: p.detach().clone() for name, p in made.parameters.items()}
    losses = advance(straight, made, range(3, 6))
    resumed, fresh = start(states)
    advance(resumed, fresh, range(2))
    fresh.load(state)
    with torch.no_grad():
        for name, parameter in fresh.parameters.items():
            parameter.copy_(weights[name])
    assert advance(resumed, fresh, range(3, 6)) == losses
    assert all(torch.equal(p, made.parameters[name]) for name, p in fresh.parameters.items())
    assert made.state().keys() == fresh.state().keys() and all(torch.equal(x, made.state()[name]) for name, x in fresh.state().items())


def test_another_seed_rounds_otherwise() -> None:
    for states, differs in (("float32", False), ("bfloat16", True), ("int8", True)):
        ends = [start(states, seed) for seed in (7, 8)]
        for end in ends:
            advance(*end, range(2))
        first, second = ([p.detach() for p in made.parameters.values()] for _, made in ends)
        assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True)) is differs, states


@pytest.mark.parametrize(("states", "wanted"), [("float32", 12.0), ("bfloat16", 6.0), ("int8", 4 + 8 / 256)])
def test_bytes_per_weight(states: str, wanted: float) -> None:
    """Weights and what is kept between updates; the float32 sum of gradients, 4 bytes more, lives within a step."""
    weight = nn.Parameter(torch.ones(64, 1024, dtype=torch.bfloat16))
    made = Optimizer({"w": weight}, OptimizerConfig(states=states))
    weight.grad = torch.ones_like(weight)
    made.collect()
    made.step(1e-3)
    held = [weight, *(x for name, x in made.state().items() if not name.endswith(".step"))]
    assert sum(x.numel() * x.element_size() for x in held) / weight.numel() == wanted
    assert not made.sums and weight.grad is None


@pytest.mark.parametrize("states", NARROW)
def test_float32_weights_are_refused(states: str) -> None:
    with pytest.raises(UserError, match=rf"optimizer.states: {states} needs bfloat16 weights, but embed.weight is float32"):
        start(states, dtype=torch.float32)


def test_states_of_another_kind_are_refused() -> None:
    of, made = start("int8")
    advance(of, made, range(1))
    for states in ("float32", "bfloat16"):
        with pytest.raises(UserError, match="optimizer.states as they were"):
            start(states)[1].load(made.state())
