"""The mathematics, and nothing else: tensors in, per-item losses out. No model, no config, no mean.

Per-token arguments are packed `[T]`, per-sequence ones `[N]`; all float32 or float64, the result in the same dtype.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor


def ranking_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Bradley-Terry, arXiv:2203.02155 eq. 1: -log sigmoid(r_c - r_r), for each pair's scores `[N]`."""
    return -F.logsigmoid(chosen - rejected)


def tokenwise_ranking(scores: Tensor, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
    """MindRLHF's comparison on every token, per pair `[N / 2]`: mean over t in [d, e) of -log sigmoid(rc_t - rr_t).

    `scores`, `tokens` `[T]` hold sequences of `lengths`, chosen at even indices, rejected at odd ones. d is the first position at which the
    two differ, e the longer one's length. Their padded batches compare the longer answer's last tokens with scores of pad tokens; there
    are none here, so the shorter answer's last score stands for it to the end. A pair that does not differ counts with its last token.
    """
    device = scores.device
    sizes = torch.tensor(lengths, device=device).view(-1, 2)
    starts = torch.tensor([0, *accumulate(lengths)][:-1], device=device).view(-1, 2)
    ends = sizes.amax(1, keepdim=True)
    at = torch.arange(int(ends.max()), device=device)
    index = starts[:, :, None] + at.expand(len(sizes), 2, -1).minimum(sizes[:, :, None] - 1)  # [N / 2, 2, longest]
    differs = (tokens[index[:, 0]] != tokens[index[:, 1]]) | (at >= sizes.amin(1, keepdim=True)) | (at == ends - 1)
    mask = (differs.cumsum(1) > 0) & (at < ends)
    return (ranking_loss(*scores[index].unbind(1)) * mask).sum(1) / mask.sum(1)


def _sigmoid(margin: Tensor, beta: float, smoothing: float) -> Tensor:
    return -(1 - smoothing) * F.logsigmoid(beta * margin) - smoothing * F.logsigmoid(-beta * margin)


def _ipo(margin: Tensor, beta: float, smoothing: float) -> Tensor:
    return (margin - 0.5 / beta) ** 2


def _hinge(margin: Tensor, beta: float, smoothing: float) -> Tensor:
    return F.relu(1 - beta * margin)


DPO_LOSSES: dict[str, Callable[[Tensor, float, float], Tensor]] = {"sigmoid": _sigmoid, "ipo": _ipo, "hinge": _hinge}


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Preference loss per pair `[N]` of h = (log p(c) - log ref(c)) - (log p(r) - log ref(r)), log-probabilities of whole answers.

    sigmoid, arXiv:2305.18290 eq. 7 with label smoothing e: -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h);
    ipo, arXiv:2310.12036 eq. 17: (h - 1 / (2 beta))^2, its arguments averaged over each answer's tokens;
    hinge, arXiv:2305.10425: max(0, 1 - beta h).
    """
    return DPO_LOSSES[kind]((chosen - ref_chosen) - (rejected - ref_rejected), beta, label_smoothing)


def kl(logprobs: Tensor, others: Tensor) -> Tensor:
    """log p - log q for tokens sampled from p: the one estimator of KL(p || q) for the reward, the report and the stop rule."""
    return logprobs - others


def ppo_policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """arXiv:1707.06347 eq. 7 per token, ratio = p / p_old: -min(ratio A, clip(ratio, 1 - clip, 1 + clip) A)."""
    ratio = (logprobs - old_logprobs).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def ppo_clipped(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """Whether a token's clipped ratio is the one that counts (its gradient is then zero), bool `[T]`."""
    ratio = (logprobs - old_logprobs).exp()
    return ((ratio > 1 + clip) & (advantages > 0)) | ((ratio < 1 - clip) & (advantages < 0))


def ppo_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Per token 1/2 max((V - R)^2, (V_old + clip(V - V_old, -clip, clip) - R)^2)."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def kl_rewards(logprobs: Tensor, ref_logprobs: Tensor, scores: Tensor, ends: Tensor, coefficient: float) -> Tensor:
    """arXiv:1909.08593 eq. 2 per token `[T]`: -coefficient (log p - log ref), and each sequence's score `[N]` at its index in `ends` `[N]`.

    Drifting from the reference costs reward. Both log-probabilities are zero on tokens that are not the policy's.
    """
    return (-coefficient * kl(logprobs, ref_logprobs)).index_add(0, ends, scores)


def gae(rewards: Tensor, values: Tensor, trained: Tensor, lengths: Sequence[int], discount: float, decay: float) -> Tensor:
    """arXiv:1506.02438 eq. 16 over packed `[T]` sequences of `lengths`; at least float32, zero on untrained tokens.

    delta_t = r_t + discount V_{t+1} - V_t, A_t = delta_t + discount decay A_{t+1}, where t + 1 is the sequence's next trained token and the
    value past its last one is zero.
    """
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    rewards, values = rewards.to(dtype), values.to(dtype)
    counts = torch.stack([part.sum() for part in trained.split(list(lengths))])
    longest = int(counts.max())
    if longest == 0:
        return torch.zeros_like(rewards)
    kept = torch.arange(longest, device=rewards.device) < counts[:, None]  # [N, longest]
    # one row per sequence, its trained tokens from the left: zeros past the end leave the recursion at zero
    r, v = (rewards.new_zeros(kept.shape).masked_scatter(kept, x[trained]) for x in (rewards, values))
    running = discount * F.pad(v[:, 1:], (0, 1)) + r - v
    columns = list(running.unbind(1))
    for t in range(longest - 2, -1, -1):
        columns[t] = columns[t] + discount * decay * columns[t + 1]
    return torch.zeros_like(rewards).masked_scatter(trained, torch.stack(columns, 1)[kept])


def whiten(x: Tensor, mask: Tensor, all_sum: Callable[[Tensor], Tensor] = lambda t: t) -> Tensor:
    """`x` `[T]` brought to mean 0 and variance 1 over `mask`, on every rank together through `all_sum`; zero elsewhere.

    (x - mean) / sqrt(variance + 1e-8), with sums in float64. The small number keeps equal advantages at zero.
    """
    kept = torch.where(mask, x, 0).double()
    total, count = all_sum(torch.stack((kept.sum(), mask.sum().double()))).unbind()
    mean = total / count
    centred = (kept - mean) * mask
    variance = all_sum((centred**2).sum()) / count
    return (centred * (variance + 1e-8).rsqrt()).to(x.dtype)


def adaptive_kl(coefficient: float, kl: float, target: float, horizon: int, count: int) -> float:
    """arXiv:1909.08593 sect. 2.2: coefficient (1 + clip(kl / target - 1, -0.2, 0.2) count / horizon), after `count` answers.

    `kl` and `target` in nats per answer. More answers than the horizon count as the horizon, so that the coefficient keeps its sign.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * min(count / horizon, 1.0))
