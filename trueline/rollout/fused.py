"""A decoder for the length of one `hold()` on an accelerator. One rule: it is made anew at every hold, so it is never stale.

The same network as `Decoder`, for steps of many small kernels, each of which takes longer to begin than to run: q, k and v in one product,
gate and up in one, LoRA merged, residuals added by the products. Weights that have no LoRA are read where they are trained. Run on a CPU
and on a device that passes for CUDA, never on a GPU.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trueline.model.adapters import low_ranks, merged_weight
from trueline.model.decoder import MLP, Attention, Block, Decoder, Turn, halves
from trueline.model.layout import Layout
from trueline.parallel.memory import free_memory

PAYS = 16  # tokens: merging all of a model takes about as long as it saves in so many steps, by counting
SHARE = 4  # one part of so many of what is free may be taken by merged weights; keys and values, logits and activations need the rest


def can_fuse(decoder: Decoder, role: str | None, tokens: int) -> bool:
    """On an accelerator, for answers of so many tokens: where nothing is merged, or merging pays and what is merged fits."""
    weight = decoder.embed.weight
    if type(weight.detach()) is not Tensor or weight.device.type == "cpu":  # one rank's part of it; packed.py
        return False
    return may_merge(merged_bytes(decoder, role), tokens, free_memory(weight.device))


def may_merge(merged: int, tokens: int, free: int) -> bool:
    """Whether so many bytes of matrices are merged for answers of so many tokens, with so many bytes free."""
    return not merged or tokens >= PAYS and merged <= free // SHARE


def merged_bytes(decoder: Decoder, role: str | None) -> int:
    """What `FusedDecoder` holds beside the weights that are trained."""
    found = 0
    for half in halves(decoder):
        for group in half.groups():
            if role is not None and low_ranks(half, role).keys() & set(group):
                found += sum(cast(nn.Linear, getattr(half, name)).weight.nbytes for name in group)
    return found


class FusedDecoder(nn.Module):
    """`decoder` as `role` uses it; under inference mode only, for its activations are overwritten."""

    @torch.no_grad()
    def __init__(self, decoder: Decoder, role: str | None):
        super().__init__()
        self.decoder, self.head = decoder, decoder.head
        self.layers = nn.ModuleList(FusedBlock(cast(Block, block), role) for block in decoder.layers)
        read = [x for product in self.modules() if isinstance(product, Product) for part in product.parts for x in part if x is not None]
        self.addresses = tuple(x.data_ptr() for x in read)

    def forward(self, tokens: Tensor, layout: Layout, role: str | None = None, wanted: Tensor | None = None) -> Tensor:
        """States `[T, D]` of packed `tokens` `[T]` after the final norm, or only those at places `wanted`."""
        x, layout, turn = self.decoder.enter(tokens, layout, role)
        for layer in self.layers[:-1]:
            x = layer(x, layout, turn)
        x = self.layers[-1](x, layout, turn, wanted)
        return cast(Tensor, self.decoder.norm(x))


class FusedBlock(nn.Module):
    """`decoder.Block`, which it reads."""

    def __init__(self, block: Block, role: str | None):
        super().__init__()
        self.block = block
        self.qkv, self.o = (Product(block.attention, group, role) for group in block.attention.groups())
        self.into, self.down = (Product(block.mlp, group, role) for group in block.mlp.groups())

    def forward(self, x: Tensor, layout: Layout, turn: Turn, wanted: Tensor | None = None) -> Tensor:
        """The layer's output `[T, D]`, or of the places `wanted` alone; `x` is overwritten."""
        block = self.block
        seen = block.attention_norm(x)
        q, k, v = block.attention.turned(*self.qkv(seen), *turn)
        mixed = layout.attend(block.attention.layer, q, k, v, block.attention.window).flatten(1)
        if wanted is not None:
            x, seen, mixed = x[wanted], seen[wanted], mixed[wanted]
        x = self.o.add_to(block.kept(x, seen), mixed, block.attention_post_norm)
        seen = block.mlp_norm(x)
        inner = self.into(seen)
        inner = F.silu(inner[0]).mul_(inner[1]) if block.mlp.gated else F.gelu(inner[0], approximate="tanh")
        return self.down.add_to(block.kept(x, seen), inner, block.mlp_post_norm)


class Product(nn.Module):
    """Linears `names` of `half` on one input, as one matrix product where their weights are merged, or lie one behind the other."""

    def __init__(self, half: Attention | MLP, names: Sequence[str], role: str | None):
        super().__init__()
        adapters = low_ranks(half, role) if role is not None else {}
        linears = [cast(nn.Linear, getattr(half, name)) for name in names]
        self.sizes = [linear.out_features for linear in linears]
        weights, biases = [linear.weight.detach() for linear in linears], [None if x.bias is None else x.bias.detach() for x in linears]
        if adapters.keys() & set(names):
            merged = [merged_weight(half, n, adapters[n]) if n in adapters else w for n, w in zip(names, weights, strict=True)]
            whole: Tensor | None = merged[0] if len(merged) == 1 else torch.cat(merged)
        else:
            whole = adjacent(weights)
        self.parts: list[tuple[Tensor, Tensor | None]] = list(zip(weights, biases, strict=True))
        if whole is not None:
            given = [bias for bias in biases if bias is not None]
            self.parts = [(whole, (adjacent(given) if adjacent(given) is not None else torch.cat(given)) if given else None)]

    def forward(self, x: Tensor) -> Sequence[Tensor]:
        """Each linear's output, `[T, out]`."""
        if len(self.parts) == 1:
            return F.linear(x, *self.parts[0]).split(self.sizes, -1)
        return [F.linear(x, *part) for part in self.parts]

    def add_to(self, kept: Tensor, x: Tensor, norm: nn.Module) -> Tensor:
        """`kept` `[T, D]`, which is overwritten, plus what `norm` makes of the only linear's output."""
        ((weight, bias),) = self.parts
        if bias is None and isinstance(norm, nn.Identity):
            return kept.addmm_(x, weight.t())
        return kept.add_(norm(F.linear(x, weight, bias)))


def adjacent(tensors: Sequence[Tensor]) -> Tensor | None:
    """Tensors `[n, ...]` as the one `[sum of n, ...]` that they are parts of, in this order; None if they are not."""
    first = tensors[0]
    place = first.storage_offset()
    for tensor in tensors:
        together = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and tensor.shape[1:] == first.shape[1:]
        if not together or tensor.storage_offset() != place or not tensor.is_contiguous():
            return None
        place += tensor.numel()
    return first.as_strided((sum(len(tensor) for tensor in tensors), *first.shape[1:]), first.stride())
