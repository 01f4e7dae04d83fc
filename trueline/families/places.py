"""Which linears of a family can carry a LoRA, under which name, and how the LoRAs of several linears become that of their fused one.

One rule: both directions are exact; nothing is approximated by a lower rank.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trueline.families.family import Family, Weight
from trueline.model.adapters import low_ranks
from trueline.model.decoder import MLP, Attention, Decoder, DecoderConfig, LowRank, halves

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class Place:
    """One linear of theirs in one layer, and the linears of ours that it is made of."""

    layer: int
    names: tuple[str, ...]  # projections
    weight: Weight


@dataclass
class Exported:
    """A role's LoRA as tensors of theirs."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    sizes: dict[str, tuple[int, float]] = field(default_factory=dict)  # module -> rank, alpha
    dora: bool = False
    blocks: dict[str, dict[str, int]] = field(default_factory=dict)  # fused module -> projection -> rank, in the order they are stacked


def places(family: Family, config: DecoderConfig) -> dict[str, Place]:
    """Their module name -> `Place`, for every linear of every layer that can carry an adapter."""
    found = {}
    for weight in family.weights:
        parts = [re.fullmatch(r"layers\.\{\}\.(?:attention|mlp)\.(\w+)\.weight", name) for name in weight.ours]
        names = tuple(p[1] for p in parts if p and p[1] in PROJECTIONS)
        if names and len(names) == len(weight.ours):
            for layer in range(config.num_layers):
                found[weight.theirs.removesuffix(".weight").format(layer)] = Place(layer, names, weight)
    return found


def half_of(decoder: Decoder, place: Place) -> Attention | MLP:
    """Where in the decoder the linears of `place` are."""
    return next(half for half in list(halves(decoder))[2 * place.layer :] if hasattr(half, place.names[0]))


def export_lora(decoder: Decoder, role: str, family: Family) -> Exported:
    """`role`'s LoRA as `MODULE.lora_A.weight` `[R, in]`, `.lora_B.weight` `[out, R]` and, with DoRA, `.lora_magnitude_vector` `[out]`."""
    done = Exported()
    for path, place in places(family, decoder.config).items():
        half = half_of(decoder, place)
        found = low_ranks(half, role)
        parts = {name: found[name] for name in place.names if name in found}
        if not parts:
            continue
        down, up, scale = fuse(parts, place, half, decoder.config)
        rank = len(down)
        if sum(len(p.down.weight) for p in parts.values()) == rank and len(place.names) > 1:
            done.blocks[path] = {n: len(p.down.weight) for n, p in parts.items()}
        done.tensors[f"{path}.lora_A.weight"], done.tensors[f"{path}.lora_B.weight"] = down, up
        done.sizes[path] = (rank, scale * rank)
        if any(p.magnitude is not None for p in parts.values()):
            done.dora = True
            done.tensors[f"{path}.lora_magnitude_vector"] = fuse_magnitudes(parts, place, half, decoder.config)
    if not done.tensors:
        raise ValueError(f"role {role!r} has no adapter to save")
    return done


def fuse(parts: dict[str, LowRank], place: Place, half: Attention | MLP, config: DecoderConfig) -> tuple[Tensor, Tensor, float]:
    """One linear's LoRA from those of the linears it is made of: `down` `[R, in]`, `up` `[out, R]` and the scale.

    Where all parts share one `down` (an adapter that came from PEFT and was not trained), so does the whole. Otherwise the `down`s are
    stacked and each part's `up` stands in its own columns: up = [[up_gate, 0], [0, up_up]], which is exact at the sum of the ranks.
    """
    first = next(iter(parts.values()))
    if place.weight.join is None:
        return first.down.weight, first.up.weight, first.scale
    alike = all(p.scale == first.scale and torch.equal(p.down.weight, first.down.weight) for p in parts.values())
    if alike and len(parts) == len(place.names):
        return first.down.weight, place.weight.join([parts[n].up.weight for n in place.names], config), first.scale
    down = torch.cat([p.down.weight for p in parts.values()])
    ups, start = [], 0
    for name in place.names:
        block = down.new_zeros(getattr(half, name).out_features, len(down))
        if name in parts:
            up = parts[name].up.weight * (parts[name].scale / first.scale)
            block[:, start : start + up.shape[1]] = up
            start += up.shape[1]
        ups.append(block)
    return down, place.weight.join(ups, config), first.scale


def fuse_magnitudes(parts: dict[str, LowRank], place: Place, half: Attention | MLP, config: DecoderConfig) -> Tensor:
    """DoRA's row lengths of one linear from those of the linears it is made of; rows without an adapter keep the length they have."""
    columns = []
    for name in place.names:
        magnitude = parts[name].magnitude if name in parts else None
        rows = magnitude if magnitude is not None else torch.linalg.vector_norm(getattr(half, name).weight, dim=1)
        columns.append(rows[:, None])
    return (place.weight.join(columns, config) if place.weight.join else columns[0])[:, 0]


def unfuse(
    place: Place, down: Tensor, up: Tensor, alpha: float, block: dict[str, int], config: DecoderConfig
) -> Iterator[tuple[str, tuple[Tensor, Tensor, float]]]:
    """The LoRA of each of our linears from that of the linear they are fused into: `down`, `up` and alpha by projection.

    `block` is what `Exported.blocks` said of this linear when it was written; if empty, each part gets all of `down` and its rows of `up`.
    """
    if place.weight.split is None:
        yield place.names[0], (down, up, alpha)
        return
    ups = dict(zip(place.names, place.weight.split(up, config), strict=True))
    if block and sum(block.values()) == len(down) and set(block) <= set(ups):
        columns = dict(zip(block, zip(down.split(list(block.values())), range(len(block)), strict=True), strict=True))
        cut = {n: ups[n].split(list(block.values()), dim=1) for n in ups}
        # stale notes (someone trained on with PEFT) show as weights outside the blocks; then the parts share their `down`
        outside = [cut[n][i] for n in ups for i in range(len(block)) if n not in columns or columns[n][1] != i]
        if not any(x.any() for x in outside):
            for name, (part, i) in columns.items():
                yield name, (part, cut[name][i], alpha * block[name] / len(down))
            return
    for name, part in ups.items():
        yield name, (down, part, alpha)
