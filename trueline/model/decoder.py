"""One decoder for every family: they differ only in `DecoderConfig`.

Tokens are packed: every activation is `[T, D]`, several sequences end to end, told apart by a `Layout`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trueline.data.sample import Blocks
from trueline.model.compiled import compiled
from trueline.model.layout import Layout, Prefixed
from trueline.model.norm import RMSNorm
from trueline.model.rotary import RopeScaling, speeds


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and the few choices in which families differ."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    o_bias: bool = False
    mlp_bias: bool = False
    rope: Literal["half", "interleaved"] = "half"  # which two channels turn together
    rope_theta: float = 1e4
    rope_dim: int | None = None  # rotated part of a head; None is all of it
    rope_rows: bool = False  # ChatGLM-6B: two positions turn a half of each head each, and angles are rounded as it publishes them
    norm: Literal["rms", "layer"] = "rms"
    gated: bool = True  # SwiGLU; else ChatGLM-6B's plain GELU
    residual_scale: float | None = None  # ChatGLM-6B: scale * norm(x) + f(norm(x)) in place of x + f(norm(x))
    blocks: Blocks | None = None  # the tokens that tell a context seen both ways from the answer
    prefix_shifts: bool = True  # P-tuning: the tokens' positions start at the prefix's length, not at 0
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = False  # RMSNorm of each query and key head, before it is turned
    post_norms: bool = False  # RMSNorm of what each half adds, before it is added
    windows: tuple[int | None, ...] = ()  # tokens each layer sees, itself included; None sees all, empty: every layer does
    tied_embeddings: bool = False
    init_std: float = 0.02


def rotation(positions: Tensor, config: DecoderConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, each `[T, 1, rope_dim / 2]` float32 (arXiv:2104.09864 sect. 3.4).

    With `rope_rows` `[T, 1, 2, head_dim / 4]`: the angles of each row of positions `[2, T]`, of which `[T]` is a first row beside zeros.
    """
    if config.rope_rows:
        rows = positions if positions.dim() == 2 else torch.stack((positions, torch.zeros_like(positions)))
        exponents = torch.arange(0, config.head_dim // 2, 2, device=rows.device).float() / (config.head_dim // 2)
        # its constructor rounds them through float16 in every dtype; the published weights have seen no others
        angles = rows.T.float()[:, None, :, None] * (1.0 / config.rope_theta**exponents).half().float()
        return angles.cos(), angles.sin()
    size = config.rope_dim or config.head_dim
    # the angles are float32 whatever the model's dtype, as every family's own code has them
    angles = positions.float()[:, None] * speeds(config.rope_theta, size, config.rope_scaling, positions.device)
    amplitude = config.rope_scaling.amplitude if config.rope_scaling else 1.0
    return angles.cos()[:, None] * amplitude, angles.sin()[:, None] * amplitude


def rotate(x: Tensor, cos: Tensor, sin: Tensor, config: DecoderConfig) -> Tensor:
    """Rotary embedding of `x` `[T, H, d]`, in `x`'s dtype."""
    if config.rope_rows:
        a, b = x.unflatten(-1, (2, -1)).chunk(2, dim=-1)
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    size = config.rope_dim or config.head_dim
    turned, rest = (x, None) if size == x.shape[-1] else (x[..., :size], x[..., size:])
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    interleaved = config.rope == "interleaved"
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    a, b = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack((a, b), -1).flatten(-2) if interleaved else torch.cat((a, b), -1)
    return turned if rest is None else torch.cat((turned, rest), -1)


class LowRank(nn.Module):
    """LoRA (arXiv:2106.09685 eq. 3) beside a linear of weight W `[out, in]`: `scale * up(down(dropout(x)))` is added to its output.

    With `dora` (arXiv:2402.09353 eq. 5) each row of W + scale * up @ down is brought to a learned length, its `magnitude` `[out]`. The
    rows' own lengths count as constants (sect. 4.3, and PEFT). Neither changes anything until trained.
    """

    magnitude: nn.Parameter | None

    def __init__(self, size_in: int, size_out: int, rank: int, alpha: float, dropout: float, dora: bool = False):
        super().__init__()
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(size_in, rank, bias=False)
        self.up = nn.Linear(rank, size_out, bias=False)
        nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
        self.register_parameter("magnitude", nn.Parameter(torch.ones(size_out)) if dora else None)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor, y: Tensor, linear: nn.Linear) -> Tensor:
        """`y` = `linear(x)` `[T, out]` with this adapter."""
        inner = self.dropout(x)
        change = self.scale * self.up(self.down(inner))
        if self.magnitude is None:
            return y + change
        share = self._share(linear.weight)
        # PEFT's dropout is on the input of both parts
        dropped = self.training and self.dropout.p > 0
        bare = F.linear(inner, linear.weight) if dropped else y if linear.bias is None else y - linear.bias
        return y + (share - 1).to(y.dtype) * bare + share.to(y.dtype) * change

    def merged(self, weight: Tensor) -> Tensor:
        """The linear's `weight` `[out, in]` with this adapter in it, in float32 at least."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        total = torch.addmm(weight.to(wide), self.up.weight.to(wide), self.down.weight.to(wide), alpha=self.scale)
        return total if self.magnitude is None else total * self._share(weight)[:, None]

    def row_lengths(self, weight: Tensor) -> Tensor:
        """Length of each row of W + scale * up @ down `[out]`, a constant to the gradient, rounded as the magnitudes are."""
        with torch.no_grad():
            return torch.linalg.vector_norm(weight + self.scale * (self.up.weight @ self.down.weight), dim=1)

    def _share(self, weight: Tensor) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        return cast(Tensor, self.magnitude).to(wide) / self.row_lengths(weight).to(wide)


class Prefix(nn.Module):
    """P-tuning v2 (arXiv:2110.07602): learned keys and values `[L, P, G, d]` that every token of every sequence also sees."""

    def __init__(self, layers: int, tokens: int, kv_heads: int, head_dim: int):
        super().__init__()
        self.keys = nn.Parameter(torch.empty(layers, tokens, kv_heads, head_dim))
        self.values = nn.Parameter(torch.empty(layers, tokens, kv_heads, head_dim))


def project(module: nn.Module, name: str, x: Tensor, role: str | None) -> Tensor:
    """`module`'s linear `name`, plus the adapter that `role` has there. Role None is the bare model.

    The role travels as an argument, not as state: with recompute, the backward pass runs this forward again, under whatever role is
    active by then.
    """
    linear = cast(nn.Linear, getattr(module, name))
    y: Tensor = linear(x)
    adapters = cast(nn.ModuleDict, module.adapters)
    if role is not None and role in adapters:
        own = cast(nn.ModuleDict, adapters[role])
        if name in own:
            y = own[name](x, y, linear)
    return y


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        self.q = nn.Linear(config.hidden_size, config.num_heads * config.head_dim, bias=config.qkv_bias)
        self.k = nn.Linear(config.hidden_size, config.num_kv_heads * config.head_dim, bias=config.qkv_bias)
        self.v = nn.Linear(config.hidden_size, config.num_kv_heads * config.head_dim, bias=config.qkv_bias)
        self.o = nn.Linear(config.num_heads * config.head_dim, config.hidden_size, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, eps=config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, eps=config.norm_eps)
        self.window = config.windows[layer] if config.windows else None
        self.adapters = nn.ModuleDict()  # role -> projection name -> LowRank

    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Names of the linears, those of one input together."""
        return ("q", "k", "v"), ("o",)

    def heads(self, x: Tensor, cos: Tensor | None, sin: Tensor | None, role: str | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of states `[T, D]`, turned unless the layout does it: `[T, H, d]` and twice `[T, G, d]`."""
        q, k, v = (project(self, name, x, role) for name in "qkv")
        return self.turned(q, k, v, cos, sin)

    def turned(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """`heads` of what the three linears give."""
        # -1 heads: under tensor parallelism a rank holds a slice of them
        q, k, v = (x.unflatten(-1, (-1, self.config.head_dim)) for x in (q, k, v))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if cos is None or sin is None:
            return q, k, v
        return rotate(q, cos, sin, self.config), rotate(k, cos, sin, self.config), v


class MLP(nn.Module):
    """SwiGLU (arXiv:2002.05202), or GELU in its tanh form (arXiv:1606.08415 sect. 2)."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        if config.gated:
            self.gate = nn.Linear(config.hidden_size, config.mlp_size, bias=config.mlp_bias)
        self.gated = config.gated
        self.up = nn.Linear(config.hidden_size, config.mlp_size, bias=config.mlp_bias)
        self.down = nn.Linear(config.mlp_size, config.hidden_size, bias=config.mlp_bias)
        self.adapters = nn.ModuleDict()

    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Names of the linears, those of one input together."""
        return ("gate", "up") if self.gated else ("up",), ("down",)

    def forward(self, x: Tensor, role: str | None) -> Tensor:
        if self.gated:
            return project(self, "down", F.silu(project(self, "gate", x, role)) * project(self, "up", x, role), role)
        return project(self, "down", F.gelu(project(self, "up", x, role), approximate="tanh"), role)


def make_norm(config: DecoderConfig) -> RMSNorm | nn.LayerNorm:
    kind = RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(config.hidden_size, eps=config.norm_eps)


class Block(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.residual_scale = config.residual_scale
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, layer)
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)
        after = [RMSNorm(config.hidden_size, eps=config.norm_eps) if config.post_norms else nn.Identity() for _ in range(2)]
        self.attention_post_norm, self.mlp_post_norm = after

    def forward(self, x: Tensor, layout: Layout, turn: "Turn", role: str | None, compile: bool = False) -> Tensor:
        before: Callable[..., Any] = compiled(Block.before) if compile else Block.before
        after: Callable[..., Tensor] = compiled(Block.after) if compile else Block.after
        kept, q, k, v = before(self, x, *turn, role)
        mixed = layout.attend(self.attention.layer, q, k, v, self.attention.window).flatten(1)
        del q, k, v  # nothing but attention needs them
        return after(self, kept, mixed, role)

    def before(self, x: Tensor, cos: Tensor | None, sin: Tensor | None, role: str | None) -> tuple[Tensor, ...]:
        """What attention's output is added to, and its queries, keys and values."""
        seen = self.attention_norm(x)
        return self.kept(x, seen), *self.attention.heads(seen, cos, sin, role)

    def after(self, kept: Tensor, mixed: Tensor, role: str | None) -> Tensor:
        """The layer's output from attention's, `mixed` `[T, H * d]`."""
        x = kept + self.attention_post_norm(project(self.attention, "o", mixed, role))
        seen = self.mlp_norm(x)
        return self.kept(x, seen) + self.mlp_post_norm(self.mlp(seen, role))

    def kept(self, x: Tensor, normed: Tensor) -> Tensor:
        """What either half's output is added to, given its input before and after the norm."""
        return x if self.residual_scale is None else self.residual_scale * normed


Turn = tuple[Tensor, Tensor] | tuple[None, None]
"""Cosines and sines, or none where the layout turns heads itself."""


def embedding(config: DecoderConfig) -> nn.Embedding:
    """As nn.Embedding makes it, but on the meta device nothing is drawn: that would load torch's compiler, over a second of every start."""
    weight = torch.empty(config.vocab_size, config.hidden_size)
    return nn.Embedding.from_pretrained(weight if weight.is_meta else weight.normal_(), freeze=False)


class Decoder(nn.Module):
    """Embedding, blocks, final norm, and the vocabulary head (used by `heads.LanguageModel`, absent from reward models)."""

    def __init__(self, config: DecoderConfig, with_head: bool = True):
        super().__init__()
        self.config = config
        self.recompute = 0  # so many of the first layers are run again in the backward pass, in place of keeping their activations
        self.compile_layers = False  # where gradients are made
        self.embed = embedding(config)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.norm = make_norm(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False) if with_head else None
        if self.head is not None and config.tied_embeddings:
            self.head.weight = self.embed.weight
        self.prefixes = nn.ModuleDict()  # role -> Prefix

    def forward(self, tokens: Tensor, layout: Layout, role: str | None = None) -> Tensor:
        """Hidden states `[T, D]` of packed `tokens` `[T]` (or of their embeddings `[T, D]`), after the final norm."""
        x, layout, turn = self.enter(tokens, layout, role)
        for i, layer in enumerate(self.layers):
            given = (x, layout, turn, role, self.compile_layers and torch.is_grad_enabled())
            recomputed = i < self.recompute and torch.is_grad_enabled()
            x = checkpoint(layer, *given, use_reentrant=False) if recomputed else layer(*given)
        return self.norm(x)

    def enter(self, tokens: Tensor, layout: Layout, role: str | None) -> tuple[Tensor, Layout, Turn]:
        """What the first layer is given."""
        layout = self._seen(layout, role)
        turn: Turn = self._turn(layout)
        if (turning := getattr(layout, "turning", None)) is not None and (own := turning(*turn, self.config)) is not None:
            layout, turn = own, (None, None)
        return self.embed(tokens) if tokens.dim() == 1 else tokens, layout, turn

    def _turn(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """Cosines and sines in the model's dtype, as all layers use them."""
        cos, sin = rotation(layout.positions, self.config)
        return cos.to(self.embed.weight.dtype), sin.to(self.embed.weight.dtype)

    def layer_memory(self, tokens: Tensor, layout: Layout, role: str | None = None) -> tuple[int, int]:
        """Bytes that one layer keeps of packed `tokens` for its backward pass, and how many when it is recomputed.

        Measured on the layers themselves: on one of each window, and the largest counts.
        """
        layout = self._seen(layout, role)
        turn = self._turn(layout)
        known = {x.untyped_storage()._cdata for x in (*self.parameters(), *turn)}
        x = self.embed(tokens).detach().requires_grad_()
        most = 0
        for layer in {cast(Block, layer).attention.window: layer for layer in self.layers}.values():
            kept: dict[int, int] = {}

            def note(saved: Tensor, kept: dict[int, int] = kept) -> Tensor:
                storage = saved.untyped_storage()
                if storage._cdata not in known:
                    kept[storage._cdata] = storage.nbytes()
                return saved

            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
                held = layer(x, layout, turn, role, self.compile_layers)  # held until the count is done, so that no memory is used twice
            most = max(most, sum(kept.values()))
            del held
        return most, x.untyped_storage().nbytes()

    def _seen(self, layout: Layout, role: str | None) -> Layout:
        """`layout` with the prefix that `role` has."""
        if role is None or role not in self.prefixes:
            return layout
        prefix = cast(Prefix, self.prefixes[role])
        return Prefixed(layout, prefix.keys, prefix.values, self.config.prefix_shifts)


def halves(decoder: Decoder) -> Iterator[Attention | MLP]:
    """The attention and the mlp of every layer: where the linears are, and LoRA on them."""
    for block in decoder.layers:
        yield cast(Block, block).attention
        yield cast(Block, block).mlp


@torch.no_grad()
def adjoin(decoder: Decoder) -> None:
    """Lays the weights of linears that have one input one behind the other in memory: then one product can read them as one matrix."""
    for half in halves(decoder):
        for group in half.groups():
            linears = [cast(nn.Linear, getattr(half, name)) for name in group]
            for parameters in ([x.weight for x in linears], [x.bias for x in linears if x.bias is not None]):
                if len(parameters) > 1:
                    parts = torch.cat([p.data for p in parameters]).split([len(p) for p in parameters])
                    for parameter, part in zip(parameters, parts, strict=True):
                        parameter.data = part


@torch.no_grad()
def init_weights(decoder: Decoder, generator: torch.Generator) -> None:
    """Random weights for experiments: normal with `config.init_std` (residual projections scaled by depth), norms one, biases zero.

    Drawn tensor by tensor on the generator's device: nine billion take a minute or more on a CPU, and one on the weights' own device spares
    that. The seed's numbers are others there.
    """
    for name, parameter in decoder.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            residual = name.endswith(("attention.o.weight", "mlp.down.weight"))
            std = decoder.config.init_std / ((2 * decoder.config.num_layers) ** 0.5 if residual else 1.0)
            # drawn in float32, so that a seed is one model whatever its dtype
            parameter.copy_(torch.empty(parameter.shape, device=generator.device).normal_(0.0, std, generator=generator))
