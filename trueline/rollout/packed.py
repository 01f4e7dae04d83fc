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
from trueline.model.decoder import MLP, Attention, Block, Decoder, DecoderConfig, Prefix
from trueline.model.layout import Layout, Prefixed
from trueline.model.rotary import speeds

LARGE, SMALL, STEP = 256, 64, 8  # rows a kernel is called with: it is compiled for each number of rows, in about a millisecond


def can_pack(decoder: Decoder) -> bool:
    """float32 on the CPU, in a PyTorch built with oneDNN, of a network as below (not ChatGLM-6B's)."""
    weight, config = decoder.embed.weight, decoder.config
    usual = config.norm == "rms" and config.gated and config.residual_scale is None and not config.rope_rows
    built = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    whole = type(weight.detach()) is Tensor  # not one rank's part of it
    return usual and built and whole and weight.device.type == "cpu" and weight.dtype == torch.float32


class PackedDecoder(nn.Module):
    """`decoder` as `role` uses it. `head` belongs to this forward: it carries the weight of the final norm."""

    @torch.no_grad()
    def __init__(self, decoder: Decoder, role: str | None):
        super().__init__()
        config = self.config = decoder.config
        self.embed = decoder.embed
        self.order = _channel_order(config)
        self.layers = nn.ModuleList(PackedBlock(cast(Block, block), role, config, self.order) for block in decoder.layers)
        self.end = Scale(config)
        self.head = PackedHead(cast(nn.Linear, decoder.head), cast(nn.RMSNorm, decoder.norm), config)
        size = config.rope_dim or config.head_dim
        self.speeds = speeds(config.rope_theta, size, config.rope_scaling)
        self.amplitude = torch.tensor(config.rope_scaling.amplitude if config.rope_scaling else 1.0)
        prefix = cast(Prefix, decoder.prefixes[role]) if role is not None and role in decoder.prefixes else None
        self.prefix = None if prefix is None else (prefix.keys.detach()[..., self.order], prefix.values.detach())

    def forward(self, tokens: Tensor, layout: Layout, role: str | None = None) -> Tensor:
        """States `[T, D]` for `head`, of packed `tokens` `[T]`."""
        if self.prefix is not None:
            layout = Prefixed(layout, *self.prefix, self.config.prefix_shifts)
        angles = layout.positions.float()[:, None, None] * self.speeds
        turn = torch.polar(self.amplitude.expand_as(angles), angles)  # cosine and sine as one complex number
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
        self.scale = Scale(config)
        into, after = (self.scale.weight(cast(nn.RMSNorm, norm)) for norm in (block.attention_norm, block.mlp_norm))
        self.qkv = _pack(torch.cat([merged[name][0] for name in "qkv"]) * into), bias
        self.o = _pack(merged["o"][0]), merged["o"][1]
        self.gate = _pack(merged["gate"][0] * after), merged["gate"][1]
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
        return _linear(self.scale(x), *self.qkv)

    def _after(self, seen: Tensor, x: Tensor) -> Tensor:
        x = _linear_with(seen, x, *self.o, "add") if self.post_norms is None else x + self.post_norms[0](_linear(seen, *self.o))
        scaled = self.scale(x)
        product = _linear_with(scaled, _linear(scaled, *self.gate, "swish"), *self.up, "mul")
        if self.post_norms is None:
            return _linear_with(product, x, *self.down, "add")
        return x + self.post_norms[1](_linear(product, *self.down))


class PackedHead(nn.Module):
    """`Decoder.head` after the final norm."""

    def __init__(self, head: nn.Linear, norm: nn.RMSNorm | nn.LayerNorm, config: DecoderConfig):
        super().__init__()
        self.weight = _pack(head.weight * Scale(config).weight(norm))

    def forward(self, x: Tensor) -> Tensor:
        rows = F.pad(x, (0, 0, 0, -len(x) % STEP)) if len(x) % STEP else x
        return _by_pieces(lambda part: _linear(part, self.weight, None), _pieces(len(rows)), rows)[: len(x)]


class Scale:
    """RMSNorm with its weight left to the matrix that follows: `x` `[T, D]` / sqrt(|x|^2 + D eps)."""

    def __init__(self, config: DecoderConfig):
        self.root = config.hidden_size**0.5
        self.floor = torch.tensor(self.root * config.norm_eps**0.5)

    def __call__(self, x: Tensor) -> Tensor:
        return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self.floor)

    def weight(self, norm: nn.RMSNorm | nn.LayerNorm) -> Tensor:
        return norm.weight.detach() * self.root


def _channel_order(config: DecoderConfig) -> Tensor:
    """Channels of a head in the order that puts the two that turn together side by side; q and k in one order have the same products."""
    size, channels = config.rope_dim or config.head_dim, torch.arange(config.head_dim)
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


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, then: str = "none") -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, then, [], "")


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
