"""A decoder packed for the length of one `hold()`: float32 on the CPU. One rule: it is made anew at every hold, so it is never stale.

The same network as `Decoder`, with fewer and faster steps: LoRA and norm weights folded into the matrices, q, k and v in one, each matrix
in the order in which oneDNN's kernel reads it, and residuals, SwiGLU and rotary embedding done in place of a pass of their own.
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trueline.model.adapters import low_ranks
from trueline.model.decoder import MLP, Attention, Block, Decoder, DecoderConfig, Prefix, rotation
from trueline.model.layout import Layout, Prefixed

PAYS = 16  # tokens: packing costs as much time as it saves in about so many steps, on 25 million weights and 16 to 64 requests
LARGE, SMALL, STEP = 256, 64, 8  # rows a kernel is called with: it is compiled for each number of rows, in about a millisecond


def can_pack(decoder: Decoder) -> bool:
    """float32 on the CPU, in a PyTorch built with oneDNN."""
    weight = decoder.embed.weight
    built = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    whole = type(weight.detach()) is Tensor  # not one rank's part of it
    return built and whole and weight.device.type == "cpu" and weight.dtype == torch.float32


class PackedDecoder(nn.Module):
    """`decoder` as `role` uses it. `head` belongs to this forward: it carries the weight of the final norm."""

    @torch.no_grad()
    def __init__(self, decoder: Decoder, role: str | None):
        super().__init__()
        config = self.config = decoder.config
        self.embed = decoder.embed
        self.order = _channel_order(config)
        self.layers = nn.ModuleList(PackedBlock(cast(Block, block), role, config, self.order) for block in decoder.layers)
        self.end, after = _fold(decoder.norm, config)
        self.head = PackedHead(cast(nn.Linear, decoder.head).weight * after)
        prefix = cast(Prefix, decoder.prefixes[role]) if role is not None and role in decoder.prefixes else None
        self.prefix = None if prefix is None else (prefix.keys.detach()[..., self.order], prefix.values.detach())

    def forward(self, tokens: Tensor, layout: Layout, role: str | None = None) -> Tensor:
        """States `[T, D]` for `head`, of packed `tokens` `[T]`."""
        if self.prefix is not None:
            layout = Prefixed(layout, *self.prefix, self.config.prefix_shifts)
        turn = torch.complex(*rotation(layout.positions, self.config)).flatten(2)
        x = F.embedding(F.pad(tokens, (0, -len(tokens) % STEP)), self.embed.weight)
        pieces = _pieces(len(x))
        for layer in self.layers:
            x = layer(x, layout, turn, pieces)
        return self.end(x[: len(tokens)])


class PackedBlock(nn.Module):
    """`decoder.Block` on rows filled up to a multiple of `STEP`."""

    def __init__(self, block: Block, role: str | None, config: DecoderConfig, order: Tensor):
        super().__init__()
        attention, mlp = block.attention, block.mlp
        self.layer, self.head_dim, self.window, self.eps = attention.layer, config.head_dim, attention.window, config.norm_eps
        heads, groups = config.num_heads, config.num_kv_heads
        self.split = [heads, groups, groups]
        merged = _merged(attention, role) | _merged(mlp, role)
        for name in "qk":
            merged[name] = tuple(None if x is None else _reorder_channels(x, order) for x in merged[name])  # type: ignore[assignment]
        bias = None if merged["q"][1] is None else torch.cat([cast(Tensor, merged[name][1]) for name in "qkv"])
        self.residual_scale = config.residual_scale
        (self.attention_norm, into), (self.mlp_norm, after) = (_fold(norm, config) for norm in (block.attention_norm, block.mlp_norm))
        self.qkv = _pack(torch.cat([merged[name][0] for name in "qkv"]) * into), bias
        self.o = _pack(merged["o"][0]), merged["o"][1]
        self.gate = (_pack(merged["gate"][0] * after), merged["gate"][1]) if config.gated else None
        self.up = _pack(merged["up"][0] * after), merged["up"][1]
        self.down = _pack(merged["down"][0]), merged["down"][1]
        self.head_norms: Tensor | None = None  # [H + G, d]: a query's or key's own norm
        if config.qk_norm:
            norms = ((attention.q_norm, heads), (attention.k_norm, groups))
            self.head_norms = torch.cat([norm.weight.detach()[order].expand(count, -1) for norm, count in norms])
        self.post_norms = (block.attention_post_norm, block.mlp_post_norm) if config.post_norms else None

    def forward(self, x: Tensor, layout: Layout, turn: Tensor, pieces: list[int]) -> Tensor:
        heads = _by_pieces(self._before, pieces, x).unflatten(-1, (-1, self.head_dim))[: len(turn)]
        turning = heads[:, : sum(self.split[:2])]
        if self.head_norms is not None:
            turning.copy_(F.rms_norm(turning, (self.head_dim,), eps=self.eps).mul_(self.head_norms))
        turned = torch.view_as_complex(turning.unflatten(-1, (-1, 2)))
        turned[..., : turn.shape[-1]] *= turn
        q, k, v = heads.split(self.split, dim=1)
        seen = layout.attend(self.layer, q, k, v, self.window).flatten(1)
        if len(seen) < len(x):
            seen = F.pad(seen, (0, 0, 0, len(x) - len(seen)))
        return _by_pieces(self._after, pieces, seen, x)

    def _before(self, x: Tensor) -> Tensor:
        return _linear(self.attention_norm(x), *self.qkv)

    def _after(self, seen: Tensor, x: Tensor) -> Tensor:
        kept = x if self.residual_scale is None else self.residual_scale * self.attention_norm(x)
        x = _linear_with(seen, kept, *self.o, "add") if self.post_norms is None else kept + self.post_norms[0](_linear(seen, *self.o))
        normed = self.mlp_norm(x)
        kept = x if self.residual_scale is None else self.residual_scale * normed
        if self.gate is None:
            product = _linear(normed, *self.up, "gelu", "tanh")
        else:
            product = _linear_with(normed, _linear(normed, *self.gate, "swish"), *self.up, "mul")
        if self.post_norms is None:
            return _linear_with(product, kept, *self.down, "add")
        return kept + self.post_norms[1](_linear(product, *self.down))


class PackedHead(nn.Module):
    """`Decoder.head` after the final norm."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = _pack(weight)

    def forward(self, x: Tensor) -> Tensor:
        rows = F.pad(x, (0, 0, 0, -len(x) % STEP)) if len(x) % STEP else x
        return _by_pieces(lambda part: _linear(part, self.weight, None), _pieces(len(rows)), rows)[: len(x)]


class Scale:
    """RMSNorm with its weight left to the matrix that follows: `x` `[T, D]` / sqrt(|x|^2 + D eps)."""

    def __init__(self, root: float, eps: float):
        self.floor = torch.tensor(root * eps**0.5)

    def __call__(self, x: Tensor) -> Tensor:
        return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self.floor)


def _fold(norm: nn.RMSNorm | nn.LayerNorm, config: DecoderConfig) -> tuple[Scale | nn.LayerNorm, Tensor]:
    """What is done to a state, and what the columns of the matrices that follow are multiplied by. A LayerNorm stays what it is."""
    if isinstance(norm, nn.LayerNorm):
        return norm, torch.ones(())
    root = config.hidden_size**0.5
    return Scale(root, config.norm_eps), norm.weight.detach() * root


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
            weight = linear.weight.detach()
            if name in adapters:
                weight = adapters[name].merged(weight)
            merged[name] = (weight, None if linear.bias is None else linear.bias.detach())
    return merged


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), SMALL)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, then: str = "none", form: str = "") -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, then, [], form)


def _linear_with(x: Tensor, other: Tensor, weight: Tensor, bias: Tensor | None, how: str) -> Tensor:
    """The linear, then plus or times `other`."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, bias, how)


def _pieces(rows: int) -> list[int]:
    """Sizes that sum to `rows`: few different ones, whatever `rows` is."""
    return [LARGE] * (rows // LARGE) + [SMALL] * (rows % LARGE // SMALL) + [rows % SMALL] * (rows % SMALL > 0)


def _by_pieces(function: Callable[..., Tensor], pieces: list[int], *rows: Tensor) -> Tensor:
    if len(pieces) == 1:
        return function(*rows)
    return torch.cat([function(*parts) for parts in zip(*(x.split(pieces) for x in rows), strict=True)])
