"""Rounding at random against its definition: a neighbour, and the right one on average."""

import numpy as np
import torch

from trueline.model.rounding import draws, stochastic

CPU = torch.device("cpu")


def wide(n: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=draw) * 10.0 ** torch.randint(-6, 3, (n,), generator=draw)


def neighbours(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bfloat16 numbers around float32 `x` on its own side of zero: the nearer to zero and the farther. From the format: 8 bits."""
    exponent = np.floor(np.log2(np.abs(x.astype(np.float64))))
    unit = 2.0 ** (exponent - 7)
    low = np.floor(np.abs(x.astype(np.float64)) / unit) * unit
    return np.sign(x) * low, np.sign(x) * (low + unit)


def test_stochastic_rounding_takes_a_neighbour_and_has_no_bias() -> None:
    x, rounds = wide(200, seed=1), 4000
    low, high = neighbours(x.numpy())
    found = np.stack([stochastic(x, draws(step, len(x), CPU)()).double().numpy() for step in range(rounds)])
    assert ((found == low) | (found == high)).all()
    share = (x.double().numpy() - low) / (high - low)
    error = np.abs(found.mean(0) - x.double().numpy()) / np.abs(high - low)
    assert (error <= 4 * np.sqrt(np.maximum(share * (1 - share), 1 / rounds) / rounds)).all()


def test_draws_belong_to_their_number() -> None:
    seen = [draws(number, 64, CPU)().tolist() for number in (0, 1, 2**63)]
    assert len({tuple(row) for row in seen}) == 3 and seen[0] == draws(0, 64, CPU)().tolist()
    stream = draws(0, 100_001, CPU)
    first, second = stream(), stream()
    assert first.min() >= 0 and first.max() < 65536 and not torch.equal(first, second)
    assert abs(first.double().mean() - 32767.5) < 4 * 65536 / np.sqrt(12 * len(first))
