"""Attention kernels behind one signature: per-sequence SDPA on CPU and as the fallback, varlen flash attention on CUDA."""

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from functools import cache
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from trueline.errors import UserError

SHORT = 512  # queries; below it the CPU's bfloat16 kernel takes as long as the float32 one, 5 times as long with 40 (forward and backward)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    contexts: tuple[int, ...] = (),
    prefix_keys: Tensor | None = None,
    prefix_values: Tensor | None = None,
    window: int | None = None,
    seen: tuple[int, ...] | None = None,
) -> Tensor:
    """Causal attention inside each of several sequences laid end to end.

    `q` `[T, H, d]`, `k`, `v` `[T, G, d]` with H a multiple of G; `lengths` sum to T. `seen`: so many keys and values has each sequence,
    when these are more than its queries, which are then the last of it; their lengths sum to those of `k` and `v`. `contexts`: the first
    so many tokens of each sequence are seen by all of it. `prefix_keys`, `prefix_values` `[P, G, d]` stand before every sequence.
    `window`: each token sees so many of the newest, itself and the prefix counted. Returns `[T, H, d]`.
    """
    front = 0 if prefix_keys is None else len(prefix_keys)
    seen = seen or lengths
    if window is not None and window >= front + max(seen):
        window = None
    plain = not contexts and prefix_keys is None
    if plain and q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and (kernel := varlen_kernel()) is not None:
        return _varlen(kernel, q, k, v, lengths, seen, window)
    if plain and window is None:
        return _runs(q, k, v, lengths, seen)
    parts = []
    for i, (q1, k1, v1) in enumerate(zip(q.split(lengths), k.split(seen), v.split(seen), strict=True)):
        before = seen[i] - lengths[i]
        mask = _causal(lengths[i], seen[i], q.device)
        if contexts and contexts[i]:
            mask[:, : contexts[i]] = True
        if prefix_keys is not None and prefix_values is not None:
            k1, v1 = torch.cat((prefix_keys.to(k1.dtype), k1)), torch.cat((prefix_values.to(v1.dtype), v1))
            mask = F.pad(mask, (front, 0), value=True)
        if window is not None:
            mask = mask & torch.ones_like(mask).triu_(front + before - window + 1)
        q4, k4, v4 = (x.transpose(0, 1)[None] for x in (q1, k1, v1))
        parts.append(_sdpa(q4, k4, v4, mask)[0].transpose(0, 1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _causal(queries: int, keys: int, device: torch.device) -> Tensor:
    """Which keys each query sees, bool `[queries, keys]`; the queries are the last of the keys' sequence."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril_(keys - queries)


def _runs(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], seen: tuple[int, ...]) -> Tensor:
    """One call per run of neighbours of equal length: each run is an ordinary batch (micro-batches are packed longest first).

    A call per sequence is 2.6 times the speed of a padded batch on CPU and 4.6 times that of a dense block mask. The packed tensors are cut
    by one split each: its backward is one concatenation, that of a slice a whole tensor of zeros.
    """
    runs = [(n, m, len(list(same))) for (n, m), same in groupby(zip(lengths, seen, strict=True))]
    cuts, key_cuts = [n * count for n, _, count in runs], [m * count for _, m, count in runs]
    parts = []
    for (n, m, count), *pieces in zip(runs, q.split(cuts), k.split(key_cuts), v.split(key_cuts), strict=True):
        q4, k4, v4 = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in pieces)
        parts.append(_sdpa(q4, k4, v4, None if n == m else _causal(n, m, q.device)).transpose(1, 2).flatten(0, 1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def decode_attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """One query token per sequence against its past: `q` `[N, H, d]`, `keys`, `values` `[N, G, s, d]` (views will do) -> `[N, H, d]`.

    `mask` `[N, G, 1, s]` is added to the scores. The H / G heads that share a key head become its query tokens: no key is repeated.
    """
    q = q.unflatten(1, (keys.shape[1], -1))
    if q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64):
        # two batched products: 1.5 to 3 times the speed of the fused CPU kernel, which is made for long queries
        scores = torch.baddbmm(mask.flatten(0, 1), q.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2), alpha=q.shape[-1] ** -0.5)
        return torch.bmm(scores.softmax(-1), values.flatten(0, 1)).view(q.shape).flatten(1, 2)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask).flatten(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`q` `[N, H, t, d]`, `k`, `v` `[N, G, s, d]`; causal without a mask."""
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.shape[2] < SHORT:
        return _sdpa(q.float(), k.float(), v.float(), mask).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1])


@cache
def varlen_kernel() -> Callable[..., Tensor] | None:
    """torch's variable-length flash attention where this torch has it. Imported when first needed: it drags in two seconds of compiler."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return None
    found: Callable[..., Tensor] = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    return found


def _varlen(
    kernel: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    seen: tuple[int, ...],
    window: int | None,
) -> Tensor:
    """Flash attention over the packed axis. Not run on a GPU yet: see docs/not-yet.md.

    Where a sequence has more keys than queries, the kernel's causal mask is aligned at their ends, as ours is.

    torch 2.11 has it without grouped heads and with another name for causal, 2.13 with both: look, do not ask for the version.
    """
    known = inspect.signature(kernel).parameters
    ends, key_ends = (torch.tensor([0, *counts], device=q.device).cumsum(0).to(torch.int32) for counts in (lengths, seen))
    if window is not None and "window_size" not in known:
        raise UserError("this model has sliding windows, which need a newer PyTorch on this device; install torch 2.12 or later")
    left = -1 if window is None else window - 1
    options: dict[str, object] = {"window_size": (left, 0)} if "window_size" in known else {"is_causal": True}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out = kernel(q, k, v, ends, key_ends, max(lengths), max(seen), **options)
    return out if isinstance(out, Tensor) else out[0]
