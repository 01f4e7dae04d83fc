"""A decoder packed for the length of one `hold()`, on the CPU. One rule: it is made anew at every hold, so it is never stale.

The same network as `Decoder`, with fewer and faster steps: LoRA folded into the matrices, q, k and v in one, residuals, SwiGLU and rotary
embedding done in place of a pass of their own. In float32, where `native.c` can be compiled, all other matrices stay where they are and a
step is a few calls of it. Elsewhere each matrix is copied in the order in which oneDNN's kernel reads it, in float32 with norms' weights
folded in. In bfloat16 only the matrices and what goes in and out of them have 16 bits: all between them, and keys and values, is float32,
so it rounds less than the decoder does.
"""

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trueline.model.adapters import low_ranks, merged_weight
from trueline.model.decoder import MLP, Attention, Block, Decoder, DecoderConfig, Prefix, halves, rotation
from trueline.model.layout import Layout, Prefixed
from trueline.parallel.world import fast_bfloat16
from trueline.rollout.memory import Decode, Mixed
from trueline.rollout.native import STEP, Kernels, kernels

PAYS = 16  # tokens: packing costs as much time as it saves in about so many steps, on 25 million weights and 16 to 64 requests
FEW = 128  # rows: up to so many native.c's products are sooner done than PyTorch's, on AVX2
LARGE, SMALL = 256, 64  # rows a kernel is called with, or fewer than `SMALL`
PIECE = 1024  # rows of unpacked matrices, which have no such kernels, at a time: it bounds what they give
# rows are filled up to a multiple of this. A kernel is compiled for each number of rows, in about a millisecond, and forgotten when
# training in bfloat16 has compiled a thousand others; AMX takes 16 rows in the time of one. In float32 each row takes time of its own
STEPS = {torch.float32: 1, torch.bfloat16: 8}


def can_pack(decoder: Decoder) -> bool:
    """float32, or bfloat16 where the CPU computes in it, in a PyTorch built with oneDNN."""
    weight = decoder.embed.weight
    built = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    whole = type(weight.detach()) is Tensor  # not one rank's part of it
    known = weight.dtype == torch.float32 or weight.dtype == torch.bfloat16 and fast_bfloat16()
    return built and whole and weight.device.type == "cpu" and known


def native_for(decoder: Decoder) -> Kernels | None:
    """What answers in place of packed copies: in float32, for sizes that it takes."""
    config = decoder.config
    sizes = (config.hidden_size, config.mlp_size, config.head_dim)
    fits = decoder.embed.weight.dtype == torch.float32 and not any(size % STEP for size in sizes)
    return kernels() if fits else None


def copied_bytes(decoder: Decoder, role: str | None) -> int:
    """Of the matrices that `PackedDecoder(decoder, role)` makes anew."""
    every, weight = native_for(decoder) is None, decoder.embed.weight
    total = weight.nbytes if every else 0  # the head's are as many
    for half in halves(decoder):
        merged = low_ranks(half, role) if role is not None else {}
        names = (name for group in half.groups() for name in group if every or name in "qkv" or name in merged)
        total += sum(cast(nn.Linear, getattr(half, name)).weight.nbytes for name in names)
    return total


class PackedLinear:
    """Weight `[out, in]` and bias `[out]` in oneDNN's order."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        self.weight, self.bias = _pack(weight), bias

    def __call__(self, x: Tensor, then: str = "none", form: str = "") -> Tensor:
        """Of `x` `[T, in]`: the linear, then "swish", "gelu" or "none"."""
        return _linear(x, self.weight, self.bias, then, form)

    def combine(self, x: Tensor, other: Tensor, how: str) -> Tensor:
        """The linear of `x`, "add" or "mul" `other` `[T, out]`."""
        return _linear_with(x, other, self.weight, self.bias, how)


class NativeLinear:
    """`PackedLinear` of a float32 weight as it lies: of few rows by native.c, of many by PyTorch."""

    def __init__(self, native: Kernels, weight: Tensor, bias: Tensor | None = None):
        self.native, self.weight, self.bias = native, weight.detach().contiguous(), bias

    def __call__(self, x: Tensor, then: str = "none", form: str = "") -> Tensor:
        if len(x) <= FEW:
            return self.native.linear(x, self.weight, self.bias, then)
        y = F.linear(x, self.weight, self.bias)
        return F.silu(y, inplace=True) if then == "swish" else F.gelu(y, approximate=form) if then == "gelu" else y

    def combine(self, x: Tensor, other: Tensor, how: str) -> Tensor:
        if len(x) <= FEW:
            return self.native.linear(x, self.weight, self.bias, "none", other, how)
        y = F.linear(x, self.weight, self.bias)
        return y.add_(other) if how == "add" else y.mul_(other)


Linear = PackedLinear | NativeLinear


class PackedDecoder(nn.Module):
    """`decoder` as `role` uses it. `head` belongs to this forward: it may carry the weight of the final norm."""

    stored = torch.float32  # keys and values

    @torch.no_grad()
    def __init__(self, decoder: Decoder, role: str | None):
        super().__init__()
        config = self.config = decoder.config
        self.embed = decoder.embed
        self.order = _channel_order(config)
        native = self.native = native_for(decoder)
        self.layers = nn.ModuleList(PackedBlock(cast(Block, block), role, config, self.order, native) for block in decoder.layers)
        weight = cast(nn.Linear, decoder.head).weight
        self.end, after = _fold(decoder.norm, config, weight.dtype == torch.float32, native)
        self.head = PackedHead(weight if after is None else weight * after, native)
        self.turns = torch.empty(0)
        prefix = cast(Prefix, decoder.prefixes[role]) if role is not None and role in decoder.prefixes else None
        self.prefix = None if prefix is None else (prefix.keys.detach()[..., self.order].float(), prefix.values.detach().float())

    def forward(self, tokens: Tensor, layout: Layout, role: str | None = None, wanted: Tensor | None = None) -> Tensor:
        """States `[T, D]` for `head`, of packed `tokens` `[T]`, or only those at places `wanted`: of a prompt, the last token's is used."""
        if self.prefix is not None:
            layout = Prefixed(layout, *self.prefix, self.config.prefix_shifts)
        turn = self._turn(layout.positions)[:, None]
        x = F.embedding(_fill(tokens, self.embed.weight.dtype), self.embed.weight).float()
        pieces = _pieces(len(x), self.native)
        for layer in self.layers[:-1]:
            x = layer(x, layout, turn, pieces)
        x = self.layers[-1](x, layout, turn, pieces, wanted)
        return self.end(x[: len(tokens) if wanted is None else len(wanted)])

    def _turn(self, positions: Tensor) -> Tensor:
        """`rotation` of `positions`, as complex numbers `[T, 1, channels / 2]`: read from a table of those that came up so far."""
        if positions.dim() == 2:  # ChatGLM-6B's two rows
            return torch.complex(*rotation(positions, self.config)).flatten(2)
        if (longest := int(positions.max()) + 1) > self.turns.shape[0]:
            self.turns = torch.complex(*rotation(torch.arange(2 * longest), self.config)).flatten(2)
        return self.turns[positions]


class PackedBlock(nn.Module):
    """`decoder.Block` on rows filled up as `STEPS` says."""

    def __init__(self, block: Block, role: str | None, config: DecoderConfig, order: Tensor, native: Kernels | None):
        super().__init__()
        attention, mlp = block.attention, block.mlp
        self.layer, self.head_dim, self.window, self.eps = attention.layer, config.head_dim, attention.window, config.norm_eps
        heads, groups = config.num_heads, config.num_kv_heads
        self.groups, self.shared = groups, heads // groups
        self.dtype = attention.q.weight.dtype
        self.wide = self.dtype == torch.float32
        merged = _merged(attention, role) | _merged(mlp, role)
        for name in "qk":
            merged[name] = tuple(None if x is None else _reorder_channels(x, order) for x in merged[name])  # type: ignore[assignment]
        weight, bias = (self._grouped([merged[name][part] for name in "qkv"]) for part in (0, 1))
        assert weight is not None
        self.residual_scale = config.residual_scale
        self.native = native
        self.attention_norm, into = _fold(block.attention_norm, config, self.wide, native)
        self.mlp_norm, after = _fold(block.mlp_norm, config, self.wide, native)

        def linear(weight: Tensor, bias: Tensor | None, columns: Tensor | None = None) -> Linear:
            return _made((weight if columns is None else weight * columns).to(self.dtype), bias, native)

        self.qkv = linear(weight, bias, into)
        self.o, self.up, self.down = linear(*merged["o"]), linear(*merged["up"], after), linear(*merged["down"])
        self.gate = linear(*merged["gate"], after) if config.gated else None
        self.head_norms: Tensor | None = None  # [H / G + 1, d]: a query's or key's own norm
        if config.qk_norm:
            norms = ((attention.q_norm, self.shared), (attention.k_norm, 1))
            self.head_norms = torch.cat([norm.weight.detach()[order].float().expand(count, -1) for norm, count in norms])
        after_norms = (block.attention_post_norm, block.mlp_post_norm)
        self.post_norms = [_plain_norm(norm) for norm in after_norms] if config.post_norms else None

    def forward(self, x: Tensor, layout: Layout, turn: Tensor, pieces: list[int], wanted: Tensor | None = None) -> Tensor:
        count, rows = turn.shape[0], x.shape[0]
        heads = _by_pieces(self._before, pieces, x).float().view(rows, self.groups, -1, self.head_dim)
        if count < rows:
            heads = heads[:count]
        if self.head_norms is not None:
            turning = heads[:, :, : self.shared + 1]
            turning.copy_(F.rms_norm(turning, (self.head_dim,), eps=self.eps).mul_(self.head_norms))
        seen = self._attend(heads, layout, turn)
        if wanted is not None:
            seen, x = seen[wanted], _fill(x[wanted], self.dtype)
            pieces = _pieces(len(x), self.native)
        return _by_pieces(self._after, pieces, _fill(seen, self.dtype), x)

    def _attend(self, heads: Tensor, layout: Layout, turn: Tensor) -> Tensor:
        """`heads` `[N, G, H / G + 2, d]`, not turned yet -> `[N, H x d]`."""
        if isinstance(layout, Mixed):
            n = len(layout.decode.rows)
            old = self._attend(heads[:n], layout.decode, turn[:n])
            return torch.cat((old, self._attend(heads[n:], layout.prefill, turn[n:])))
        if isinstance(layout, Decode) and layout.native is not None:
            return layout.turn_and_attend(self.layer, heads, turn, self.window).flatten(1)
        turned = torch.view_as_complex(heads[:, :, : self.shared + 1].unflatten(-1, (-1, 2)))
        turned[..., : turn.shape[-1]].mul_(turn)
        if isinstance(layout, Decode) and layout.views is not None:
            return layout.attend_groups(self.layer, heads.flatten(0, 1), self.window).view(len(heads), -1)
        q, k, v = heads[:, :, : self.shared].flatten(1, 2), heads[:, :, self.shared], heads[:, :, self.shared + 1]
        return layout.attend(self.layer, q, k, v, self.window).flatten(1)

    def _grouped(self, parts: list[Tensor | None]) -> Tensor | None:
        """Rows of q, k and v, weights or biases, in one: each key head's queries, then its key, then its value."""
        if any(part is None for part in parts):
            return None
        return torch.cat([cast(Tensor, part).unflatten(0, (self.groups, -1)) for part in parts], 1).flatten(0, 1)

    def _before(self, x: Tensor) -> Tensor:
        return self.qkv(self.attention_norm(x).to(self.dtype))

    def _after(self, seen: Tensor, x: Tensor) -> Tensor:
        kept = x if self.residual_scale is None else self.residual_scale * self.attention_norm(x)
        x = self._add(kept, seen.to(self.dtype), self.o, 0)
        normed = self.mlp_norm(x)
        kept = x if self.residual_scale is None else self.residual_scale * normed
        normed = normed.to(self.dtype)
        if self.gate is None:
            product = self.up(normed, "gelu", "tanh")
        else:
            product = self.up.combine(normed, self.gate(normed, "swish"), "mul")
        return self._add(kept, product, self.down, 1)

    def _add(self, kept: Tensor, x: Tensor, linear: Linear, half: int) -> Tensor:
        """`kept` + the linear of `x`; the kernel adds where both are float32."""
        if self.post_norms is not None:
            return kept + self.post_norms[half](linear(x).float())
        return linear.combine(x, kept, "add") if self.wide else kept + linear(x)


class PackedHead(nn.Module):
    """`Decoder.head` after the final norm."""

    def __init__(self, weight: Tensor, native: Kernels | None):
        super().__init__()
        self.linear, self.dtype, self.native = _made(weight, None, native), weight.dtype, native

    def forward(self, x: Tensor) -> Tensor:
        rows = _fill(x, self.dtype)
        return _by_pieces(self.linear, _pieces(len(rows), self.native), rows.to(self.dtype))[: len(x)]


class Scale:
    """RMSNorm of `x` `[T, D]`: x / sqrt(|x|^2 + D eps), times `weight`, or without one with it left to the matrix that follows."""

    def __init__(self, root: float, eps: float, weight: Tensor | None = None):
        self.floor, self.weight = torch.tensor(root * eps**0.5), weight

    def __call__(self, x: Tensor) -> Tensor:
        scaled = x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self.floor)
        return scaled if self.weight is None else scaled.mul_(self.weight)


def _fold(
    norm: nn.RMSNorm | nn.LayerNorm, config: DecoderConfig, into: bool, native: Kernels | None
) -> tuple[Callable[[Tensor], Tensor], Tensor | None]:
    """What is done to a state, and what the columns of the matrices that follow are multiplied by, where a norm's weight goes `into` them.

    A LayerNorm stays what it is, and so do matrices that are not copied, and bfloat16 ones: multiplied, they would be rounded twice.
    """
    if isinstance(norm, nn.LayerNorm):
        return _plain_norm(norm), None
    if native is not None:
        return partial(native.rms_norm, weight=norm.weight.detach(), eps=config.norm_eps), None
    root = config.hidden_size**0.5
    weight = norm.weight.detach().float() * root
    return (Scale(root, config.norm_eps), weight) if into else (Scale(root, config.norm_eps, weight), None)


def _plain_norm(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """`norm`, an RMSNorm or a LayerNorm, on float32 states."""
    assert isinstance(norm, nn.RMSNorm | nn.LayerNorm)
    weight = norm.weight.detach().float()
    if isinstance(norm, nn.LayerNorm):
        return partial(F.layer_norm, normalized_shape=weight.shape, weight=weight, bias=norm.bias.detach().float(), eps=norm.eps)
    return partial(F.rms_norm, normalized_shape=list(weight.shape), weight=weight, eps=norm.eps)


def _channel_order(config: DecoderConfig) -> Tensor:
    """Channels of a head in the order that puts the two that turn together side by side; q and k in one order have the same products."""
    size, channels = config.rope_dim or config.head_dim, torch.arange(config.head_dim)
    if config.rope_rows:
        return channels.view(2, 2, -1).transpose(1, 2).flatten()
    if config.rope == "half":
        channels[:size] = channels[:size].view(2, -1).T.flatten()
    return channels


def _reorder_channels(rows: Tensor, order: Tensor) -> Tensor:
    """`rows` `[heads x d, ...]`, a weight or a bias."""
    return rows.unflatten(0, (-1, len(order)))[:, order].flatten(0, 1)


def _merged(half: Attention | MLP, role: str | None) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Weight and bias of each linear, `role`'s LoRA added to the weight."""
    adapters = low_ranks(half, role) if role is not None else {}
    merged: dict[str, tuple[Tensor, Tensor | None]] = {}
    for name, linear in half.named_children():
        if isinstance(linear, nn.Linear):
            weight = merged_weight(half, name, adapters[name]) if name in adapters else linear.weight.detach()
            merged[name] = (weight, None if linear.bias is None else linear.bias.detach())
    return merged


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), SMALL)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, then: str = "none", form: str = "") -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, then, [], form)


def _linear_with(x: Tensor, other: Tensor, weight: Tensor, bias: Tensor | None, how: str) -> Tensor:
    """The linear, then plus or times `other`."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, bias, how)


def _fill(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """`rows` `[T]` or `[T, D]` and as many zeros as `STEPS` asks for."""
    missing = -len(rows) % STEPS[dtype]
    return F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, missing)) if missing else rows


def _made(weight: Tensor, bias: Tensor | None, native: Kernels | None) -> Linear:
    return PackedLinear(weight, bias) if native is None else NativeLinear(native, weight, bias)


def _pieces(rows: int, native: Kernels | None) -> list[int]:
    """Sizes that sum to `rows`: few different ones, whatever `rows` is."""
    if native is not None:
        return [PIECE] * (rows // PIECE) + [rows % PIECE] * (rows % PIECE > 0)
    return [LARGE] * (rows // LARGE) + [SMALL] * (rows % LARGE // SMALL) + [rows % SMALL] * (rows % SMALL > 0)


def _by_pieces(function: Callable[..., Tensor], pieces: list[int], *rows: Tensor) -> Tensor:
    if len(pieces) == 1:
        return function(*rows)
    return torch.cat([function(*parts) for parts in zip(*(x.split(pieces) for x in rows), strict=True)])
