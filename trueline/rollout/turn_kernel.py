"""Rotary embedding of new tokens' queries and keys, and the storing of keys and values, as one launch in Triton: some twenty otherwise.

Rounds where `decoder.rotate` does: each product, then the sum. Imported by `rollout/decode.py` alone. Run in Triton's interpreter and
compiled, never on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def turn_head(  # type: ignore[no-untyped-def]
    q, k, v, out, keys, values, cos, sin, columns, q_row, q_head, k_row, k_head, v_row, v_head,
    keys_row, keys_head, keys_column, values_row, values_head, values_column,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, CHANNELS: tl.constexpr, TURNED: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """A program for each request and each of its H query heads, G key heads and G value heads, in this order."""
    request, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.load(columns + request)
    if head < HEADS:
        source, target = q + request * q_row + head * q_head, out + (request * HEADS + head) * SIZE
    elif head < HEADS + GROUPS:
        group = head - HEADS
        source, target = k + request * k_row + group * k_head, keys + request * keys_row + group * keys_head + column * keys_column
    else:
        group = head - HEADS - GROUPS
        source, target = v + request * v_row + group * v_head, values + request * values_row + group * values_head + column * values_column
    channels = tl.arange(0, CHANNELS)
    if INTERLEAVED:
        first, other, pair = channels % 2 == 0, channels ^ 1, channels // 2
    else:
        first, pair = channels < TURNED // 2, channels % (TURNED // 2)
        other = tl.where(first, channels + TURNED // 2, channels - TURNED // 2)
    turned = channels < tl.where(head < HEADS + GROUPS, TURNED, 0)  # values do not
    at = request * (TURNED // 2) + pair
    kind = out.dtype.element_ty
    x = tl.load(source + channels, mask=channels < SIZE, other=0.0)
    y = tl.load(source + other, mask=turned, other=0.0).to(tl.float32)
    straight = (x.to(tl.float32) * tl.load(cos + at, mask=turned, other=0.0).to(tl.float32)).to(kind).to(tl.float32)
    across = (y * tl.load(sin + at, mask=turned, other=0.0).to(tl.float32)).to(kind).to(tl.float32)
    both = tl.where(first, straight - across, straight + across).to(kind)
    tl.store(target + channels, tl.where(turned, both, x), mask=channels < SIZE)


def turn_and_store(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, columns: Tensor, interleaved: bool
) -> Tensor:
    """Queries `[N, H, d]`, turned; keys (turned) and values `[N, G, d]` are stored in row i of `keys`, `values` `[rows, G, columns, d]` at
    column `columns[i]`. `cos`, `sin` `[N, 1, half of the channels that turn]`, all in one dtype. Asks nothing of the device."""
    requests, heads, size = q.shape
    groups, out = k.shape[1], torch.empty(q.shape, dtype=q.dtype, device=q.device)
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    turn_head[(requests, heads + 2 * groups)](
        q, k, v, out, keys, values, cos, sin, columns, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        *keys.stride()[:3], *values.stride()[:3], HEADS=heads, GROUPS=groups, SIZE=size, CHANNELS=triton.next_power_of_2(size),
        TURNED=2 * cos.shape[-1], INTERLEAVED=interleaved, num_warps=1,
    )  # fmt: skip
    return out
