"""One new token per request against its past, by the fastest way this machine has. One rule: every way gives what the plain one gives."""

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from trueline.model.attention import decode_attention

PROGRAMS, MOST_SPLITS = 264, 64  # aimed at: two for each of an H100's or H200's 132 processors


def cached_attention(
    q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, window: int | None = None, pages: Tensor | None = None
) -> Tensor:
    """Attention of each request's newest token, which its `lengths` `[N]` int32 count, to what is stored: `q` `[N, H, d]` -> `[N, H, d]`.

    `keys`, `values` `[rows, G, columns, d]`, channels side by side, of which request i has row i; or with `pages` `[N, most]` int32 the
    pages `[pages, G, page size, d]`, of which request i has `pages[i]`, in this order. A learned prefix counts as stored tokens.
    `window`: the newest token sees so many, itself included. A request of length 0 gets a finite answer that means nothing.
    """
    if (kernel := kernel_for(q)) is not None:
        columns = keys.shape[2] * (1 if pages is None else pages.shape[1])
        return kernel(q, keys, values, lengths, window, pages, splits_for(len(q) * keys.shape[1], columns))
    return plain_attention(q, keys, values, lengths, window, pages)


def plain_attention(
    q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, window: int | None = None, pages: Tensor | None = None
) -> Tensor:
    """`cached_attention` in PyTorch's own operations, on any device."""
    if pages is not None:  # [N, most, G, size, d] -> [N, G, most x size, d]
        keys, values = (part[pages[: len(q)].long()].transpose(1, 2).flatten(2, 3) for part in (keys, values))
    keys, values = keys[: len(q)], values[: len(q)]
    ahead = torch.arange(keys.shape[2], device=q.device) - (lengths[:, None] - 1)
    unseen = ahead > 0 if window is None else (ahead > 0) | (ahead <= -window)
    unseen[:, 0] &= lengths > 0  # without anything to see, a softmax has no answer
    mask = torch.zeros(unseen.shape, dtype=q.dtype, device=q.device).masked_fill_(unseen, -torch.inf)
    return decode_attention(q, keys, values, mask[:, None, None].expand(-1, keys.shape[1], -1, -1).contiguous())


def kernel_for(q: Tensor) -> Callable[..., Tensor] | None:
    """The kernel that takes `q`, or None: it needs Triton and a CUDA device."""
    return _kernel() if q.is_cuda and q.dtype in (torch.float32, torch.bfloat16, torch.float16) else None


@cache
def _kernel() -> Callable[..., Tensor] | None:
    """Imported when first needed: an optional library, which takes seconds."""
    if importlib.util.find_spec("triton") is None:
        return None
    found: Callable[..., Tensor] = importlib.import_module("trueline.rollout.decode_kernel").split_attention
    return found


def splits_for(programs: int, columns: int) -> int:
    """Splits of the past, a power of two that depends on shapes only: enough to keep the device busy, none below 64 columns."""
    splits = 1
    while splits < MOST_SPLITS and splits * programs < PROGRAMS and 2 * splits * 64 <= columns:
        splits *= 2
    return splits
