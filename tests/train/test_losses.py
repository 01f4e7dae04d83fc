"""Every loss against plain Python over single numbers, by hand or from the paper a second time, and against finite differences."""

import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from trueline.train.losses import (
    adaptive_kl,
    dpo_loss,
    gae,
    kl,
    kl_rewards,
    ppo_clipped,
    ppo_policy_loss,
    ppo_value_loss,
    ranking_loss,
    tokenwise_ranking,
    whiten,
)


def numbers(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def assert_close(found: Tensor, expected: object, tolerance: float = 1e-12) -> None:
    np.testing.assert_allclose(found.detach().numpy(), np.asarray(expected, dtype=np.float64), rtol=0, atol=tolerance)


def test_ranking_loss() -> None:
    chosen, rejected = numbers(7, seed=1), numbers(7, seed=2)
    assert_close(ranking_loss(chosen, rejected), [-log_sigmoid(c - r) for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)])
    assert ranking_loss(torch.tensor([1000.0, -1000.0]), torch.zeros(2)).tolist() == [0.0, 1000.0]  # no overflow


def tokenwise_oracle(scores: list[float], tokens: list[int], lengths: list[int]) -> list[float]:
    results, at = [], 0
    for i in range(0, len(lengths), 2):
        sides = []
        for n in lengths[i : i + 2]:
            sides.append((tokens[at : at + n], scores[at : at + n]))
            at += n
        (ct, cs), (rt, rs) = sides
        first = next((j for j in range(min(len(ct), len(rt))) if ct[j] != rt[j]), min(len(ct), len(rt)))
        last = max(len(ct), len(rt))
        first = min(first, last - 1)
        terms = [-log_sigmoid(cs[min(j, len(ct) - 1)] - rs[min(j, len(rt) - 1)]) for j in range(first, last)]
        results.append(sum(terms) / len(terms))
    return results


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6))
def test_tokenwise_ranking_against_a_loop(seed: int) -> None:
    draw = random.Random(seed)
    lengths = [draw.randint(1, 6) for _ in range(2 * draw.randint(1, 4))]
    tokens = [draw.randint(0, 1) for _ in range(sum(lengths))]  # two ids: common beginnings, prefixes and equal sides occur
    scores = numbers(sum(lengths), seed=seed)
    found = tokenwise_ranking(scores, torch.tensor(tokens), lengths)
    assert_close(found, tokenwise_oracle(scores.tolist(), tokens, lengths))


def test_tokenwise_ranking_by_hand() -> None:
    """Chosen 7 1 2, rejected 7 3: they part at position 1; at position 2 the rejected side's last score stands."""
    scores = torch.tensor([9.0, 1.0, 2.0, 9.0, 0.5], dtype=torch.float64)
    found = tokenwise_ranking(scores, torch.tensor([7, 1, 2, 7, 3]), [3, 2])
    assert_close(found, [(-log_sigmoid(0.5) - log_sigmoid(1.5)) / 2])


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "hinge"])
def test_dpo_loss(kind: str) -> None:
    columns = [numbers(9, seed=s, scale=3) for s in range(4)]
    beta, smoothing = 0.3, 0.1 if kind == "sigmoid" else 0.0
    expected = []
    for c, r, rc, rr in zip(*(x.tolist() for x in columns), strict=True):
        h = (c - rc) - (r - rr)
        expected.append(
            {
                "sigmoid": -(1 - smoothing) * log_sigmoid(beta * h) - smoothing * log_sigmoid(-beta * h),
                "ipo": (h - 1 / (2 * beta)) ** 2,
                "hinge": max(0.0, 1 - beta * h),
            }[kind]
        )
    assert_close(dpo_loss(*columns, beta, kind, smoothing), expected)


def test_dpo_starts_at_log_two() -> None:
    policy = numbers(2, 5, seed=3)
    loss = dpo_loss(policy[0], policy[1], policy[0], policy[1], 0.7)
    assert loss.tolist() == [math.log(2)] * 5


def test_dpo_prefers_the_chosen_answer() -> None:
    policy = torch.zeros(2, 1, requires_grad=True)
    dpo_loss(policy[0], policy[1], torch.zeros(1), torch.zeros(1), 0.1).sum().backward()
    assert policy.grad is not None and policy.grad[0] < 0 < policy.grad[1]


def test_ppo_policy_loss() -> None:
    new, old, advantages = numbers(50, seed=1), numbers(50, seed=2), numbers(50, seed=3)
    expected, clipped = [], []
    for n, o, a in zip(new.tolist(), old.tolist(), advantages.tolist(), strict=True):
        ratio = math.exp(n - o)
        bounded = min(max(ratio, 0.8), 1.2)
        expected.append(max(-a * ratio, -a * bounded))
        clipped.append(-a * bounded > -a * ratio)
    assert_close(ppo_policy_loss(new, old, advantages, 0.2), expected)
    assert ppo_clipped(new, old, advantages, 0.2).tolist() == clipped and any(clipped) and not all(clipped)


def test_ppo_gradient_is_zero_exactly_where_it_is_clipped() -> None:
    new = numbers(50, seed=1).requires_grad_()
    old, advantages = numbers(50, seed=2), numbers(50, seed=3)
    ppo_policy_loss(new, old, advantages, 0.2).sum().backward()
    assert new.grad is not None and torch.equal(new.grad == 0, ppo_clipped(new, old, advantages, 0.2))


def test_ppo_value_loss() -> None:
    new, old, returns = numbers(50, seed=1), numbers(50, seed=2), numbers(50, seed=3)
    expected = []
    for v, o, r in zip(new.tolist(), old.tolist(), returns.tolist(), strict=True):
        bounded = min(max(v, o - 0.2), o + 0.2)
        expected.append(0.5 * max((v - r) ** 2, (bounded - r) ** 2))
    assert_close(ppo_value_loss(new, old, returns, 0.2), expected)


def test_kl_rewards_by_hand() -> None:
    """Two sequences of three tokens, the first of each a prompt's; the score comes on top of the last token's penalty."""
    logprobs = torch.tensor([0.0, -1.0, -2.0, 0.0, -0.5, -0.25])
    reference = torch.tensor([0.0, -1.5, -1.0, 0.0, -0.5, -1.25])
    rewards = kl_rewards(logprobs, reference, torch.tensor([3.0, -4.0]), torch.tensor([2, 5]), 0.1)
    assert_close(rewards, [0, -0.05, 0.1 + 3, 0, 0, -0.1 - 4], 1e-6)


def test_drifting_from_the_reference_costs_reward() -> None:
    """The seeds' sign error: the more likely the policy makes its tokens than the reference does, the lower its reward."""
    reference, nothing, end = torch.full((4,), -2.0), torch.zeros(1), torch.tensor([3])
    rewards = [kl_rewards(torch.full((4,), level), reference, nothing, end, 0.1).sum().item() for level in (-2.0, -1.0, -0.1)]
    assert rewards[0] == 0 > rewards[1] > rewards[2]
    assert kl(torch.tensor(-0.1), torch.tensor(-2.0)) > 0


def gae_oracle(rewards: list[float], values: list[float], discount: float, decay: float) -> list[float]:
    """The defining sum, A_t = sum_l (discount decay)^l delta_{t+l}, over one sequence's trained tokens."""
    following = [*values[1:], 0.0][: len(values)]
    deltas = [r + discount * f - v for r, f, v in zip(rewards, following, values, strict=True)]
    return [sum((discount * decay) ** (j - t) * deltas[j] for j in range(t, len(deltas))) for t in range(len(deltas))]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from([(1.0, 0.95), (0.9, 0.0), (0.97, 1.0), (1.0, 1.0)]))
def test_gae_against_the_sum(seed: int, factors: tuple[float, float]) -> None:
    draw = random.Random(seed)
    lengths = [draw.randint(1, 9) for _ in range(draw.randint(1, 5))]
    total = sum(lengths)
    trained = torch.tensor([draw.random() < 0.7 for _ in range(total)])  # with gaps, and sequences without any
    rewards, values = numbers(total, seed=seed), numbers(total, seed=seed + 1)
    found = gae(rewards, values, trained, lengths, *factors)
    expected, start = np.zeros(total), 0
    for n in lengths:
        places = [i for i in range(start, start + n) if trained[i]]
        expected[places] = gae_oracle([rewards[i].item() for i in places], [values[i].item() for i in places], *factors)
        start += n
    assert_close(found, expected)


def test_gae_is_at_least_float32() -> None:
    halves = torch.ones(4, dtype=torch.bfloat16)
    assert gae(halves, halves, torch.ones(4, dtype=torch.bool), [4], 1.0, 0.95).dtype == torch.float32


def test_gae_with_decay_one_is_return_minus_value() -> None:
    rewards, values = numbers(6, seed=1), numbers(6, seed=2)
    found = gae(rewards, values, torch.ones(6, dtype=torch.bool), [6], 1.0, 1.0)
    assert_close(found, [rewards[t:].sum().item() - values[t].item() for t in range(6)])


def test_whiten() -> None:
    x, mask = numbers(40, seed=1, scale=5) + 3, numbers(40, seed=2) > 0
    found = whiten(x, mask)
    kept = x[mask].numpy()
    assert_close(found[mask], (kept - kept.mean()) / np.sqrt(kept.var() + 1e-8))
    assert not found[~mask].any()


def test_whiten_ignores_what_is_masked_and_survives_equal_values() -> None:
    x = torch.tensor([2.0, 2.0, float("nan"), 2.0])
    assert whiten(x, torch.tensor([True, True, False, True])).tolist() == [0, 0, 0, 0]


def test_whiten_on_two_ranks_is_whiten_of_all() -> None:
    """Each rank's calls are answered with the sums over both, gathered in a first pass."""
    x, mask = numbers(30, seed=1), numbers(30, seed=2) > -1
    parts = [(x[:11], mask[:11]), (x[11:], mask[11:])]
    counts = sum(torch.stack((p[m].sum(), m.sum().double())) for p, m in parts)
    mean = counts[0] / counts[1]
    squares = sum(((p[m] - mean) ** 2).sum() for p, m in parts)
    found = []
    for part, kept in parts:
        answers = [squares, counts]
        found.append(whiten(part, kept, lambda t, answers=answers: answers.pop()))  # type: ignore[misc]
    assert_close(torch.cat(found), whiten(x, mask))


def test_adaptive_kl() -> None:
    assert adaptive_kl(0.2, 6.0, 6.0, 10_000, 8) == 0.2
    assert adaptive_kl(0.2, 6.6, 6.0, 10_000, 100) == pytest.approx(0.2 * (1 + 0.1 * 0.01))
    assert adaptive_kl(0.2, 600.0, 6.0, 10_000, 100) == pytest.approx(0.2 * (1 + 0.2 * 0.01))  # bounded
    assert adaptive_kl(0.2, -600.0, 6.0, 10, 10_000) == pytest.approx(0.2 * 0.8)  # and never of the other sign


GRADIENTS: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("ranking", lambda x: ranking_loss(x[:4], x[4:])),
    ("tokenwise", lambda x: tokenwise_ranking(x, torch.tensor([1, 2, 3, 1, 4, 1, 2, 5]), [3, 2, 1, 2])),
    ("sigmoid", lambda x: dpo_loss(x[:2], x[2:4], x[4:6], x[6:], 0.5, "sigmoid", 0.2)),
    ("ipo", lambda x: dpo_loss(x[:2], x[2:4], x[4:6], x[6:], 0.5, "ipo")),
    ("hinge", lambda x: dpo_loss(x[:2], x[2:4], x[4:6], x[6:], 0.5, "hinge")),
    ("policy", lambda x: ppo_policy_loss(x, numbers(8, seed=5), numbers(8, seed=6), 0.2)),
    ("value", lambda x: ppo_value_loss(x, numbers(8, seed=5), numbers(8, seed=6), 0.2)),
]


@pytest.mark.parametrize(("name", "function"), GRADIENTS, ids=[name for name, _ in GRADIENTS])
def test_gradients_are_finite_differences(name: str, function: Callable[[Tensor], Tensor]) -> None:
    assert gradcheck(function, (numbers(8, seed=4).requires_grad_(),), atol=1e-7)
