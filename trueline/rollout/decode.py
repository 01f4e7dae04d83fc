"""One new token per request against its past, by the fastest way this machine has. One rule: every way gives what the plain one gives."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from trueline.model.attention import decode_attention
from trueline.parallel.kernels import usable

KINDS = (torch.float32, torch.bfloat16, torch.float16)  # what both kernels take
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
    return _kernel(q.device, q.dtype) if q.is_cuda and q.dtype in KINDS else None


@cache
def _kernel(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor] | None:
    """`decode_kernel.split_attention`, tried on a few numbers."""

    def right(kernel: Callable[..., Tensor]) -> bool:
        numbers = torch.linspace(-1, 1, 2 * 4 * 32, dtype=dtype, device=device)
        keys, lengths = numbers.view(2, 1, 4, 32), torch.tensor([4, 2], dtype=torch.int32, device=device)
        given = numbers.sin().view(2, 4, 32), keys, keys.cos(), lengths, None, None
        return torch.allclose(kernel(*given, 2), plain_attention(*given), rtol=0.03, atol=0.03)

    return usable("trueline.rollout.decode_kernel", "split_attention", right)


def turning_kernel_for(q: Tensor) -> Callable[..., Tensor] | None:
    """`turn_kernel.turn_and_store` where it takes `q`."""
    return _turning_kernel(q.device, q.dtype) if q.is_cuda and q.dtype in KINDS else None


@cache
def _turning_kernel(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor] | None:
    """Tried on a few numbers: by a quarter turn the first of two becomes the second."""

    def right(kernel: Callable[..., Tensor]) -> bool:
        q = torch.linspace(-1, 1, 2 * 4 * 8, dtype=dtype, device=device).view(2, 4, 8)
        k, v, columns = q[:, :1], q[:, 1:2], torch.tensor([2, 0], device=device)
        keys, values = (torch.zeros(3, 1, 4, 8, dtype=dtype, device=device) for _ in range(2))
        turned = kernel(q, k, v, torch.zeros_like(q[:, :1, :2]), torch.ones_like(q[:, :1, :2]), keys, values, columns, True)
        expected = torch.stack((-q[..., 1:4:2], q[..., 0:4:2]), -1).flatten(-2)
        rows = torch.arange(2, device=device)
        same = [torch.equal(turned[..., :4], expected), torch.equal(turned[..., 4:], q[..., 4:])]
        same += [torch.equal(keys[rows, :, columns], turned[:, :1]), torch.equal(values[rows, :, columns], v)]
        return all(same) and int(keys.count_nonzero()) <= 16

    return usable("trueline.rollout.turn_kernel", "turn_and_store", right)


def splits_for(programs: int, columns: int) -> int:
    """Splits of the past, a power of two that depends on shapes only: enough to keep the device busy, none below 64 columns."""
    splits = 1
    while splits < MOST_SPLITS and splits * programs < PROGRAMS and 2 * splits * 64 <= columns:
        splits *= 2
    return splits
