"""Attention kernels behind one signature: per-sequence SDPA on CPU and as the fallback, varlen flash attention on CUDA."""

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from functools import cache, lru_cache
from itertools import accumulate, groupby

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes as outside  # noqa: PLC2701

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
    if not contexts and (kernel := varlen_kernel_for(q)) is not None:
        if prefix_keys is not None and prefix_values is not None:
            k, v = _before_each(prefix_keys, k, seen), _before_each(prefix_values, v, seen)
        return varlen_attention(kernel, q, k, v, lengths, tuple(front + n for n in seen), window)
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
        seen = attend_past(q.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2), values.flatten(0, 1), mask.flatten(0, 1))
        return seen.view(q.shape).flatten(1, 2)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask).flatten(1, 2)


def attend_past(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """`q` `[B, t, d]`, `keys` `[B, d, s]`, `values` `[B, s, d]`, `mask` `[B, 1, s]` -> `[B, t, d]`.

    Two batched products: on a CPU 1.5 to 3 times the speed of the fused kernel, which is made for long queries.
    """
    return torch.bmm(torch.baddbmm(mask, q, keys, alpha=q.shape[-1] ** -0.5).softmax(-1), values)


def decode_prefixed(q: Tensor, prefix_keys: Tensor, prefix_values: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """`decode_attention` with `prefix_keys`, `prefix_values` `[P, G, d]` in front of every sequence, which are read once for all of them.

    `mask` `[N, G, 1, P + s]`.
    """
    n, groups, front = len(q), keys.shape[1], len(prefix_keys)
    asked = q.unflatten(1, (groups, -1))  # [N, G, H / G, d]
    together = asked.transpose(0, 1).flatten(1, 2)  # [G, N x H / G, d]
    before = torch.bmm(together, prefix_keys.to(q.dtype).permute(1, 2, 0)).unflatten(1, (n, -1)).transpose(0, 1)
    own = torch.bmm(asked.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2)).unflatten(0, (n, groups))
    scores = torch.cat((before, own), -1).mul_(q.shape[-1] ** -0.5).add_(mask)
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    seen = torch.bmm(weights[..., front:].flatten(0, 1), values.flatten(0, 1)).view(asked.shape)
    first = torch.bmm(weights[..., :front].transpose(0, 1).flatten(1, 2), prefix_values.to(q.dtype).transpose(0, 1))
    return (seen + first.unflatten(1, (n, -1)).transpose(0, 1)).flatten(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`q` `[N, H, t, d]`, `k`, `v` `[N, G, s, d]`; causal without a mask."""
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.shape[2] < SHORT:
        return _sdpa(q.float(), k.float(), v.float(), mask).to(q.dtype)
    shared = q.shape[1] // k.shape[1]
    if shared > 1 and q.is_cuda and (mask is not None or q.dtype == torch.float32):
        # flash takes neither a mask nor float32, and the kernel that does no shared heads: what is left would hold every score
        k, v, shared = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1), 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=shared > 1)


@cache
def varlen_kernel() -> Callable[..., Tensor] | None:
    """torch's variable-length flash attention where this torch has it. Imported when first needed: it drags in two seconds of compiler."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return None
    found: Callable[..., Tensor] = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    return found if "window_size" in inspect.signature(found).parameters else None


def varlen_kernel_for(q: Tensor) -> Callable[..., Tensor] | None:
    """The kernel if it takes `q`: 16 bits on a CUDA device that it runs on, heads of at most 256 channels, a multiple of 8."""
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16) or q.shape[-1] % 8 or q.shape[-1] > 256:
        return None
    kernel = varlen_kernel()
    return kernel if kernel is not None and runs(kernel, q.device, 1) else None


def varlen_attention(
    kernel: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], seen: tuple[int, ...], window: int | None
) -> Tensor:
    """Flash attention over the packed axis: `lengths` queries each, the last of `seen` keys. Never run on a GPU: see docs/not-yet.md."""
    share = q.shape[1] // k.shape[1]
    if share > 1 and not runs(kernel, q.device, share):
        k, v = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
    return _flash(kernel, q, k, v, lengths, seen, window)


def _flash(
    kernel: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], seen: tuple[int, ...], window: int | None
) -> Tensor:
    # (left, right): so many before and after the token itself; (-1, 0) is plain causal, aligned at the ends of queries and keys
    options: dict[str, object] = {"window_size": (-1 if window is None else window - 1, 0)}
    if q.shape[1] != k.shape[1] and "enable_gqa" in inspect.signature(kernel).parameters:
        options["enable_gqa"] = True
    return kernel(q, k, v, sequence_ends(lengths, q.device), sequence_ends(seen, q.device), max(lengths), max(seen), **options)


@cache
def runs(kernel: Callable[..., Tensor], device: torch.device, share: int) -> bool:
    """Whether `kernel` is right on `device`, forward and backward, with `share` query heads to a key head. Tried on two tokens.

    torch 2.11's signature has no word for shared heads, yet the operation below it takes them; later ones refuse them without the word.
    Whoever asks first may be in a recomputed layer, or have tensors without numbers: the trial is nothing to either.
    """
    with outside(), saved_tensors_hooks(lambda x: x, lambda x: x), torch.inference_mode(False), torch.enable_grad():
        q, k, v = (torch.ones(2, n, 64, dtype=torch.bfloat16, device=device) for n in (2 * share, 2, 2))
        v[:, 1] = 2
        v.requires_grad_()
        try:
            out = _flash(kernel, q, k, v, (2,), (2,), None)
            out.sum().backward()
        except (RuntimeError, ValueError):
            return False
        # the first token sees itself, the second both: to the gradient of v 1.5 and 0.5 from each head
        slopes = torch.tensor([1.5, 0.5], dtype=torch.float32, device=device)[:, None, None].mul(share).expand_as(v)
        return torch.allclose(out, v.repeat_interleave(share, dim=1), rtol=1e-2) and torch.allclose(v.grad.float(), slopes, rtol=1e-2)  # type: ignore[union-attr]


def _before_each(prefix: Tensor, rows: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """`prefix` `[P, G, d]` in front of each sequence of `rows` `[T, G, d]`."""
    return torch.cat([part for sequence in rows.split(lengths) for part in (prefix.to(rows.dtype), sequence)])


@lru_cache(maxsize=16)
def sequence_ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each sequence begins, and the end `[N + 1]` int32. Kept for all layers: each copy to the device would wait for it.

    With or without numbers, as tensors are made when it is asked first: whoever changes that makes it forget.
    """
    with torch.inference_mode(False):  # autograd keeps it
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
