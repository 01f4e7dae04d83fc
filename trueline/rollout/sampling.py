"""Choosing the next token. One rule: a request's draw depends on its own logits, its seed and the token's number, and on nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 64  # the vocabulary is summed in blocks, then one block is searched
CANDIDATES = 128  # tokens sorted for top-p at first; rows whose nucleus is larger sort more


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. `temperature` 0 takes the most likely token; `top_k` 0 and `top_p` 1 leave the distribution whole."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: frozenset[int] = field(default_factory=frozenset)  # each of these ends an answer, and belongs to it

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be at least 0, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, not {self.top_k}")


@dataclass(frozen=True)
class Rollout:
    """One answer. `logprobs[i]` is log p(`tokens[i]` | before it) at the sampling temperature (0: at 1), before top-k and top-p."""

    prompt: list[int]
    tokens: list[int]  # the answer, its stop token included
    logprobs: list[float]
    finish: Literal["stop", "length"]
    text: str | None = None  # filled in above; the engine knows tokens only


def uniforms(seeds: Tensor, numbers: Tensor) -> Tensor:
    """A uniform number in [0, 1) for each (seed, token number), int64 of shapes that broadcast -> float64.

    SplitMix64's output function (Steele, Lea and Flood 2014), once over the seed and once over seed and counter: no generator state.
    """
    bits = _mix(_mix(seeds + _GOLDEN) + (numbers + 1) * _GOLDEN)
    return _shift(bits, 11).double() * 2.0**-53


def seed_tensor(seeds: Sequence[int], device: torch.device) -> Tensor:
    """Seeds as int64 `[N]`; whole numbers of any size count modulo 2**64."""
    return torch.tensor([_signed(s) for s in seeds], dtype=torch.int64, device=device)


def sample(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> Tensor:
    """Tokens `[N]` int64 for `logits` `[N, V]` and `uniforms` `[N]` in [0, 1): temperature, top-k, top-p, inverse CDF, in this order."""
    return draw(logits.clone(), uniforms, sampling)[0]


def draw(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """`sample`, and the tokens' log-probabilities `[N]` as `Rollout` defines them. May overwrite `logits`."""
    if sampling.temperature == 0:
        top, tokens = logits.max(-1)  # on a CPU a third of argmax's time
        return tokens, -logits.sub_(top[:, None]).exp_().sum(-1).log()  # log-sum-exp, whose maximum is known
    logits = logits.contiguous()  # a product may lay them token by token, where sums over a vocabulary are several times slower
    if sampling.temperature != 1:
        logits /= sampling.temperature
    # not softmax: in place, nothing of the vocabulary's size is made
    weights = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    if sampling.top_k:
        tokens = _nucleus(weights.topk(min(sampling.top_k, weights.shape[-1])), uniforms, sampling.top_p)
    elif sampling.top_p < 1:
        tokens = _top_p(weights, uniforms, sampling.top_p, CANDIDATES)
    else:
        tokens = _inverse_cdf(weights, uniforms)
    return tokens, (weights.gather(-1, tokens[:, None])[:, 0] / weights.sum(-1)).log()


def _top_p(weights: Tensor, uniforms: Tensor, top_p: float, candidates: int) -> Tensor:
    """Top-p alone. Sorting a whole vocabulary costs more than a small model's forward, and the nucleus is small most of the time."""
    candidates = min(candidates, weights.shape[-1])
    top = weights.topk(candidates)
    total = weights.sum(-1)
    tokens = _nucleus(top, uniforms, top_p, total)
    if candidates < weights.shape[-1]:
        # row by row, or a request's candidates, and with ties its token, would depend on its neighbours
        short = (top.values.sum(-1) < top_p * total).nonzero()[:, 0]
        if len(short):
            tokens[short] = _top_p(weights[short], uniforms[short], top_p, 16 * candidates)
    return tokens


def _nucleus(top: "torch.return_types.topk", uniforms: Tensor, top_p: float, total: Tensor | None = None) -> Tensor:
    """Draws from the shortest beginning of the sorted `top` that weighs at least `top_p` of `total` (by default, of all of `top`)."""
    values = top.values
    if top_p < 1:
        cumulative = values.cumsum(-1, dtype=torch.float64)
        before = pad(cumulative[:, :-1], (1, 0))
        values = values.masked_fill(before >= top_p * (cumulative[:, -1] if total is None else total)[:, None], 0)
    return top.indices.gather(-1, _inverse_cdf(values, uniforms)[:, None])[:, 0]


def _inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """First index whose cumulative weight exceeds `uniforms` x the sum; never one of weight 0. `weights` `[N, V]` -> `[N]`."""
    missing = -weights.shape[-1] % BLOCK
    blocks = (pad(weights, (0, missing)) if missing else weights).unflatten(-1, (-1, BLOCK))
    sums = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    target = uniforms[:, None] * sums[:, -1:]
    block = _first_above(sums, target)
    target = target - pad(sums, (1, 0)).gather(-1, block)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0].cumsum(-1, dtype=torch.float64)
    found = block * BLOCK + _first_above(inside, target)
    return found[:, 0].clamp_(max=weights.shape[-1] - 1)  # reached by numbers that are not finite only; the engine reports them


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """Index `[N, 1]` of the first entry of ascending `cumulative` `[N, M]` above `target` `[N, 1]`, which rounding may have raised."""
    last = cumulative[:, -1:].contiguous()
    found = torch.searchsorted(cumulative, torch.minimum(target, torch.nextafter(last, torch.zeros_like(last))), right=True)
    return found.clamp_(max=cumulative.shape[-1] - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Right shift of int64 as if it were unsigned."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    """The int64 with the same low 64 bits."""
    return (number + 2**63) % 2**64 - 2**63


_GOLDEN = _signed(0x9E3779B97F4A7C15)
