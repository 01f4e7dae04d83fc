"""Drawing tokens, against exact probabilities and a NumPy oracle."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trueline.rollout.sampling import Sampling, draw, sample, seed_tensor, uniforms

EVEN = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000  # every part of [0, 1) equally often


def oracle(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Probabilities after temperature, top-k and top-p, written over sorted lists."""
    scaled = logits / sampling.temperature
    p = np.exp(scaled - scaled.max())
    order = sorted(range(len(p)), key=lambda i: -p[i])[: sampling.top_k or None]
    total, reached, kept = sum(p[i] for i in order), 0.0, []
    for i in order:
        if reached >= sampling.top_p * total:
            break
        kept.append(i)
        reached += p[i]
    out = np.zeros_like(p)
    out[kept] = p[kept] / reached
    return out


def frequencies(logits: torch.Tensor, sampling: Sampling, u: torch.Tensor) -> np.ndarray:
    tokens = sample(logits.expand(len(u), -1), u, sampling)
    return np.bincount(tokens.numpy(), minlength=logits.shape[-1]) / len(u)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1),
        Sampling(1, temperature=0.6),
        Sampling(1, temperature=1.7, top_k=4),
        Sampling(1, top_p=0.8),
        Sampling(1, temperature=1.3, top_k=6, top_p=0.7),
        Sampling(1, top_k=1),
        Sampling(1, top_k=99, top_p=0.5),
    ],
)
def test_frequencies_are_the_probabilities(sampling: Sampling) -> None:
    """Pearson's chi-square over 20,000 seeds, below what chance exceeds once in 10,000 (33.7 for 9 degrees of freedom)."""
    logits = torch.randn(10, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 1.5
    expected = oracle(logits.numpy(), sampling)
    n = 20_000
    counts = n * frequencies(logits, sampling, uniforms(torch.arange(n), torch.full((n,), 5)))
    assert counts[expected == 0].sum() == 0
    inside = expected > 0
    assert ((counts - n * expected)[inside] ** 2 / (n * expected[inside])).sum() < 33.7


@given(
    logits=st.lists(st.floats(-6, 6), min_size=1, max_size=12, unique_by=lambda x: round(x, 3)),
    top_p=st.floats(0.05, 1),
    top_k=st.integers(0, 14),
    temperature=st.floats(0.3, 3),
)
@settings(max_examples=60, deadline=None)
def test_truncated_set_is_the_oracles(logits: list[float], top_p: float, top_k: int, temperature: float) -> None:
    sampling = Sampling(1, temperature, top_p, top_k)
    expected = oracle(np.array(logits), sampling)
    seen = frequencies(torch.tensor(logits, dtype=torch.float64), sampling, EVEN)
    # each token of the set covers its share of the even grid, up to the grid's step
    assert np.abs(seen - expected).max() <= 2 / len(EVEN)


@pytest.mark.parametrize("vocabulary", [1, 63, 64, 65, 1000, 4096])
def test_inverse_cdf_over_any_vocabulary(vocabulary: int) -> None:
    """Block sums change nothing: the token is the first whose cumulative probability exceeds the uniform number."""
    draw_of = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(200, vocabulary, generator=draw_of, dtype=torch.float64) * 3
    u = torch.rand(200, generator=draw_of, dtype=torch.float64)
    cdf = logits.softmax(-1).numpy().cumsum(-1)
    expected = [int(np.searchsorted(row, x * row[-1], side="right")) for row, x in zip(cdf, u.numpy(), strict=True)]
    assert sample(logits, u, Sampling(1)).tolist() == expected


def test_nucleus_larger_than_the_first_candidates() -> None:
    """Nearly flat logits: top-p must look at far more than the tokens it sorts first."""
    logits = torch.linspace(0, 1, 3000, dtype=torch.float64)[torch.randperm(3000, generator=torch.Generator().manual_seed(0))]
    expected = oracle(logits.numpy(), Sampling(1, top_p=0.95))
    assert (expected > 0).sum() > 2000
    seen = frequencies(logits, Sampling(1, top_p=0.95), EVEN[::8])
    assert seen[expected == 0].sum() == 0
    assert np.abs(seen - expected).max() <= 2 / len(EVEN[::8])


@pytest.mark.parametrize("sampling", [Sampling(1), Sampling(1, top_p=0.9), Sampling(1, top_k=20), Sampling(1, top_k=300, top_p=0.7)])
def test_a_row_does_not_depend_on_its_neighbours(sampling: Sampling) -> None:
    """Peaked and flat rows together, ties included: flat rows need more candidates, peaked ones must not notice."""
    logits = torch.zeros(40, 700, dtype=torch.float64)
    logits[::2] = torch.randn(20, 700, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4
    u = uniforms(torch.arange(40), torch.zeros(40, dtype=torch.int64))
    alone = [int(sample(row[None], x[None], sampling)) for row, x in zip(logits, u, strict=True)]
    assert sample(logits, u, sampling).tolist() == alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sampling", [Sampling(1), Sampling(1, top_p=0.999999), Sampling(1, top_k=3)])
def test_impossible_tokens_are_never_drawn(sampling: Sampling, dtype: torch.dtype) -> None:
    """Also at the ends of [0, 1), where rounding could step over the last possible token."""
    logits = torch.full((1, 130), -torch.inf, dtype=dtype)
    logits[0, [7, 66, 100]] = torch.tensor([0.1, 0.2, 0.3], dtype=dtype)
    for u, token in ((0.0, None), (1 - 2.0**-53, None), (0.5, 66)):
        drawn = int(sample(logits, torch.tensor([u], dtype=torch.float64), sampling))
        assert drawn in (7, 66, 100)
        assert token is None or sampling.top_k or sampling.top_p < 1 or drawn == token


def test_temperature_zero_is_the_most_likely_token() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.0], [5.0, 1.0, 4.0]])
    assert sample(logits, torch.tensor([0.99, 0.99]), Sampling(1, temperature=0, top_p=0.1, top_k=2)).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0, 0.5, 1, 2])
@pytest.mark.parametrize("top", [{}, {"top_p": 0.6}, {"top_k": 3}])
def test_log_probabilities_ignore_the_truncation(temperature: float, top: dict[str, float]) -> None:
    logits = torch.randn(50, 90, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
    u = uniforms(torch.arange(50), torch.ones(50, dtype=torch.int64))
    tokens, logprobs = draw(logits.clone(), u, Sampling(1, temperature, **top))  # type: ignore[arg-type]
    scaled = logits.numpy() / (temperature or 1)
    expected = scaled[range(50), tokens.numpy()] - np.log(np.exp(scaled).sum(-1))
    assert np.abs(logprobs.numpy() - expected).max() < 1e-12
    assert draw(logits.float(), u, Sampling(1))[1].dtype == torch.float32


def splitmix(z: int) -> int:
    """Python integers, as an oracle."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


@given(seed=st.integers(-(2**64), 2**65), number=st.integers(0, 10**9))
@settings(deadline=None)
def test_uniforms_are_splitmix(seed: int, number: int) -> None:
    golden = 0x9E3779B97F4A7C15
    expected = splitmix((splitmix((seed + golden) % 2**64) + (number + 1) * golden) % 2**64) >> 11
    got = uniforms(seed_tensor([seed], torch.device("cpu")), torch.tensor([number]))
    assert float(got) == expected / 2**53 < 1


def test_uniforms_are_uniform_and_unrelated() -> None:
    """Seeds and token numbers that follow one another: means, spread and correlations as chance has them (five standard deviations)."""
    seeds, numbers = torch.meshgrid(torch.arange(300), torch.arange(300), indexing="ij")
    u = uniforms(seeds.flatten(), numbers.flatten()).view(300, 300)
    assert abs(u.mean() - 0.5) < 5 * (1 / 12) ** 0.5 / 300
    assert abs(u.var() - 1 / 12) < 5 * (1 / 180) ** 0.5 / 300
    above = torch.triu_indices(300, 300, offset=1)
    swapped = (u[above[0], above[1]], u[above[1], above[0]])  # seed and number exchanged
    for a, b in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1]), (u[1:, 1:], u[:-1, :-1]), swapped):
        assert abs(((a - 0.5) * (b - 0.5)).mean() * 12) < 5 / a.numel() ** 0.5
    assert u.flatten().unique().numel() == 90_000


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
    ],
)
def test_impossible_settings_are_refused(settings_: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Sampling(**{"max_new_tokens": 1, **settings_})  # type: ignore[arg-type]
