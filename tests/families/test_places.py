from dataclasses import replace

import pytest
import torch
from torch import Tensor

from trueline.config.schema import AdapterConfig
from trueline.families.family import Family, Weight
from trueline.families.glm4 import GLM4
from trueline.families.llama import LLAMA
from trueline.families.places import PROJECTIONS, export_lora, half_of, places, unfuse
from trueline.families.qwen2 import QWEN2
from trueline.model.adapters import adapter_parameters, add_adapter, low_ranks
from trueline.model.decoder import Decoder, DecoderConfig

SIZES = DecoderConfig(vocab_size=11, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp_size=12)


def split_heads(weight: Tensor, config: DecoderConfig) -> list[Tensor]:
    """A made-up family: for every key/value head, the queries of its group, then its key, then its value."""
    groups = weight.unflatten(0, (config.num_kv_heads, -1))
    wide = config.num_heads // config.num_kv_heads * config.head_dim
    return [x.flatten(0, 1) for x in groups.split((wide, config.head_dim, config.head_dim), 1)]


def join_heads(parts: list[Tensor], config: DecoderConfig) -> Tensor:
    return torch.cat([p.unflatten(0, (config.num_kv_heads, -1)) for p in parts], 1).flatten(0, 1)


OURS = tuple(f"layers.{{}}.attention.{name}.weight" for name in "qkv")
FUSED = replace(LLAMA, weights=(Weight("h.{}.qkv.weight", OURS, split_heads, join_heads),), targets=dict.fromkeys("qkv", "qkv"))


@pytest.mark.parametrize("family", [QWEN2, GLM4, LLAMA])
def test_every_projection_has_one_place_named_as_the_family_says(family: Family) -> None:
    found = places(family, SIZES)
    for layer in range(2):
        here = {name: path for path, place in found.items() if place.layer == layer for name in place.names}
        assert set(here) == set(PROJECTIONS)
        assert {name: path.rpartition(".")[2] for name, path in here.items()} == family.targets
        assert all(path.startswith(f"model.layers.{layer}.") for path in here.values())


@pytest.mark.parametrize("targets", [("q", "k", "v"), ("v", "q"), ("k",)])
@pytest.mark.parametrize("scales", [(1.0, 1.0, 1.0), (1.0, 2.0, 0.5)])
def test_the_fused_lora_is_the_joined_change_and_comes_apart_again(targets: tuple[str, ...], scales: tuple[float, ...]) -> None:
    decoder = Decoder(SIZES).double()
    add_adapter(decoder, "policy", AdapterConfig(kind="lora", rank=3, alpha=6, targets=targets), 0)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    for p in adapter_parameters(decoder, "policy").values():
        p.data.copy_(torch.randn(p.shape, generator=generator))
    for half in (block.attention for block in decoder.layers):
        for part, factor in zip(low_ranks(half, "policy").values(), scales, strict=False):
            part.scale *= factor

    exported = export_lora(decoder, "policy", FUSED)
    assert {path: rank for path, (rank, _) in exported.sizes.items()} == {f"h.{i}.qkv": 3 * len(targets) for i in range(2)}
    for path, place in places(FUSED, SIZES).items():
        half, (rank, alpha) = half_of(decoder, place), exported.sizes[path]
        parts = low_ranks(half, "policy")
        changes = {n: parts[n].scale * parts[n].up.weight @ parts[n].down.weight for n in parts}
        whole = [changes.get(n, torch.zeros_like(getattr(half, n).weight)) for n in "qkv"]
        down, up = exported.tensors[f"{path}.lora_A.weight"], exported.tensors[f"{path}.lora_B.weight"]
        torch.testing.assert_close(alpha / rank * up @ down, join_heads(whole, SIZES), rtol=0, atol=1e-12)
        back = dict(unfuse(place, down, up, alpha, exported.blocks[path], SIZES))
        assert set(back) == set(targets)
        for name, (one, two, own) in back.items():
            assert torch.equal(one, parts[name].down.weight)
            torch.testing.assert_close(own / len(one) * two, parts[name].scale * parts[name].up.weight, rtol=0, atol=1e-12)


def test_without_notes_the_parts_share_what_the_whole_reads() -> None:
    place = places(FUSED, SIZES)["h.1.qkv"]
    down, up = torch.randn(3, 16), torch.randn(32, 3)
    parts = dict(unfuse(place, down, up, 6.0, {}, SIZES))
    assert list(parts) == ["q", "k", "v"]
    assert all(torch.equal(one, down) and alpha == 6.0 for one, _, alpha in parts.values())
    assert torch.equal(join_heads([two for _, two, _ in parts.values()], SIZES), up)


@pytest.mark.parametrize("notes", [{"q": 1, "k": 2}, {"q": 2, "v": 3}, {"q": 1, "gate": 2}])
def test_notes_that_do_not_hold_are_not_used(notes: dict[str, int]) -> None:
    place = places(FUSED, SIZES)["h.0.qkv"]
    parts = dict(unfuse(place, torch.randn(3, 16), torch.randn(32, 3), 6.0, notes, SIZES))
    assert {len(one) for one, _, _ in parts.values()} == {3} and len(parts) == 3
