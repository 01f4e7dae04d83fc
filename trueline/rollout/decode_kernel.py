"""One new token per request against its past, in Triton. One rule: lengths, pages and window are numbers on the device or arguments, never
constants of the compiled kernel, so that it is compiled once for a model and a captured graph stays right while answers grow.

The past is split as in Flash-Decoding (Dao, Haziza, Massa and Sizov 2023): a program for each request, key head and split. Query heads that
share a key head are the rows of one matrix product, so a key is read once. A second kernel adds the splits up by their log-sum-exp.
Imported by `rollout/decode.py` alone, where Triton and a CUDA device are. It was run in Triton's interpreter only, never on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["window", "page_size", "pages_row"])
def attend_splits(  # type: ignore[no-untyped-def]
    q, keys, values, pages, lengths, partial, totals, scale, window, page_size, pages_row, q_row, q_head,
    k_row, k_head, k_column, v_row, v_head, v_column,
    SHARE: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, PAGED: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """`partial` `[N, H, splits, SIZE]` and `totals` `[N, H, splits]`, float32: each split's mean of values, and its log-sum-exp."""
    request, group, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(2)
    length = tl.load(lengths + request)
    first = tl.maximum(length - window, 0)
    share = tl.cdiv(tl.cdiv(length - first, BLOCK), splits) * BLOCK
    start = first + split * share
    end = tl.minimum(start + share, length)

    heads, channels = tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    head = group * SHARE + heads
    real, wide = heads < SHARE, channels < SIZE
    asked = tl.load(q + request * q_row + head[:, None] * q_head + channels[None, :], mask=real[:, None] & wide[None, :], other=0.0)
    asked = asked.to(tl.float32) if WIDE else asked
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    seen = tl.zeros([ROWS, CHANNELS], tl.float32)
    for at in range(start, end, BLOCK):
        columns = at + tl.arange(0, BLOCK)
        inside = columns < end
        if PAGED:
            place = tl.load(pages + request * pages_row + columns // page_size, mask=inside, other=0).to(tl.int64)
            columns = columns % page_size
        else:
            place = request
        read = inside[:, None] & wide[None, :]
        at_key = (place * k_row + group * k_head + columns * k_column)[:, None] + channels[None, :]
        at_value = (place * v_row + group * v_head + columns * v_column)[:, None] + channels[None, :]
        key = tl.load(keys + at_key, mask=read, other=0.0)
        key = key.to(tl.float32) if WIDE else key
        scores = tl.dot(asked, tl.trans(key), input_precision="ieee") * scale
        scores = tl.where(inside[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights, shrink = tl.exp(scores - higher[:, None]), tl.exp(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        value = tl.load(values + at_value, mask=read, other=0.0)
        value = value.to(tl.float32) if WIDE else value
        seen = seen * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        top = higher
    at_split = (request * tl.num_programs(1) * SHARE + head) * splits + split
    tl.store(totals + at_split, top + tl.log(tl.maximum(total, 1.0)), mask=real)  # minus infinity of an empty split
    mean = seen / tl.maximum(total, 1.0)[:, None]  # at least 1, the largest score's own weight, where there is anything
    tl.store(partial + at_split[:, None] * SIZE + channels[None, :], mean, mask=real[:, None] & wide[None, :])


@triton.jit
def add_splits(partial, totals, out, SPLITS: tl.constexpr, SIZE: tl.constexpr, CHANNELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """`out` `[N, H, SIZE]`: the splits' means by their weight; zero where all splits are empty."""
    at = tl.program_id(0).to(tl.int64) * SPLITS + tl.arange(0, SPLITS)
    channels = tl.arange(0, CHANNELS)
    wide = channels < SIZE
    total = tl.load(totals + at)
    top = tl.max(total, 0)
    weights = tl.exp(total - tl.where(top == float("-inf"), 0.0, top))
    means = tl.load(partial + at[:, None] * SIZE + channels[None, :], mask=wide[None, :], other=0.0)
    whole = tl.sum(weights, 0)
    mixed = tl.sum(means * weights[:, None], 0) / tl.maximum(whole, 1.0)
    tl.store(out + tl.program_id(0).to(tl.int64) * SIZE + channels, mixed.to(out.dtype.element_ty), mask=wide)


def split_attention(
    q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, window: int | None, pages: Tensor | None, splits: int
) -> Tensor:
    """`decode.cached_attention` with the number of `splits`, a power of two. Asks nothing of the device and allocates by shapes only."""
    (requests, heads, size), groups = q.shape, keys.shape[1]
    share, channels = heads // groups, max(16, triton.next_power_of_2(size))  # a matrix product has at least 16 rows and channels
    partial = torch.empty(requests, heads, splits, size, dtype=torch.float32, device=q.device)
    totals = torch.empty(requests, heads, splits, dtype=torch.float32, device=q.device)
    out = torch.empty(requests, heads, size, dtype=q.dtype, device=q.device)
    q = q if q.stride(2) == 1 else q.contiguous()
    attend_splits[(requests, groups, splits)](
        q, keys, values, pages if pages is not None else lengths, lengths, partial, totals, size**-0.5,
        2**31 - 1 if window is None else window, keys.shape[2], 0 if pages is None else pages.stride(0), *q.stride()[:2],
        *keys.stride()[:3], *values.stride()[:3],
        SHARE=share, ROWS=max(16, triton.next_power_of_2(share)), SIZE=size, CHANNELS=channels,
        BLOCK=64 if q.element_size() == 2 else 32, PAGED=pages is not None,
        WIDE=not isinstance(attend_splits, triton.JITFunction),  # the interpreter's products take bfloat16 for whole numbers
        num_warps=4, num_stages=2,
    )  # fmt: skip
    add_splits[(requests * heads,)](partial, totals, out, SPLITS=splits, SIZE=size, CHANNELS=channels, num_warps=4)
    return out
