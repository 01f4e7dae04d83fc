from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.model.test_rounding import neighbours
from trueline.config.schema import AdapterConfig
from trueline.errors import UserError
from trueline.model.adapters import (
    PREFIX_STD,
    adapter_parameters,
    add_adapter,
    copy_adapter,
    has_adapter,
    init_adapter,
    low_ranks,
    merge_adapter,
    merged_weight,
    remove_adapter,
    rename_adapter,
    trainable,
)
from trueline.model.decoder import Decoder, DecoderConfig, halves, init_weights
from trueline.model.layout import Packed

CONFIG = DecoderConfig(vocab_size=23, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp_size=24, init_std=0.3)
LORA = AdapterConfig(kind="lora", rank=3, alpha=6.0, targets=("q", "v", "o", "gate", "down"))
PTUNING = AdapterConfig(kind="ptuning", tokens=5)
TOKENS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])


def make(dtype: torch.dtype = torch.float64) -> Decoder:
    decoder = Decoder(CONFIG)
    init_weights(decoder, torch.Generator().manual_seed(1))
    return decoder.to(dtype)


def scramble(decoder: Decoder, role: str, seed: int = 2) -> None:
    """As if trained: no tensor of the adapter is zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_parameters(decoder, role).values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def run(decoder: Decoder, role: str | None) -> Tensor:
    return decoder(TOKENS, Packed.of([5, 3]), role)


def test_names_and_shapes() -> None:
    decoder = make()
    add_adapter(decoder, "policy", LORA, 0)
    add_adapter(decoder, "critic", PTUNING, 0)
    lora = {name: tuple(p.shape) for name, p in adapter_parameters(decoder, "policy").items()}
    assert len(lora) == CONFIG.num_layers * len(LORA.targets) * 2
    assert lora["layers.1.attention.adapters.policy.v.down.weight"] == (3, 16)
    assert lora["layers.1.attention.adapters.policy.v.up.weight"] == (8, 3)
    assert lora["layers.0.mlp.adapters.policy.down.down.weight"] == (3, 24)
    prefix = {name: tuple(p.shape) for name, p in adapter_parameters(decoder, "critic").items()}
    assert prefix == {"prefixes.critic.keys": (2, 5, 2, 4), "prefixes.critic.values": (2, 5, 2, 4)}


def test_full_adds_nothing() -> None:
    decoder = make()
    before = set(dict(decoder.named_parameters()))
    add_adapter(decoder, "policy", AdapterConfig(kind="full"), 0)
    assert set(dict(decoder.named_parameters())) == before and not has_adapter(decoder, "policy")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_is_the_decoders_and_the_draw_does_not_depend_on_it(dtype: torch.dtype) -> None:
    ours, wide = make(dtype), make(torch.float64)
    for decoder in (ours, wide):
        add_adapter(decoder, "policy", LORA, 7)
    for name, parameter in adapter_parameters(ours, "policy").items():
        assert parameter.dtype == dtype
        assert torch.equal(parameter, adapter_parameters(wide, "policy")[name].to(dtype))


@pytest.mark.parametrize("config", [LORA, PTUNING])
def test_draws_are_keyed_by_the_seed_and_leave_global_state_alone(config: AdapterConfig) -> None:
    states = []
    drawn = []
    for seed, noise in ((7, 1), (7, 2), (8, 1)):
        torch.manual_seed(noise)
        decoder = make()
        before = torch.get_rng_state()
        add_adapter(decoder, "policy", config, seed)
        states.append(torch.equal(before, torch.get_rng_state()))
        drawn.append(torch.cat([p.flatten() for n, p in adapter_parameters(decoder, "policy").items() if not n.endswith("up.weight")]))
    assert all(states)
    assert torch.equal(drawn[0], drawn[1])
    assert (drawn[0] == drawn[2]).sum() == 0


def test_draws_differ_between_tensors_and_roles() -> None:
    decoder = make()
    add_adapter(decoder, "policy", LORA, 7)
    add_adapter(decoder, "critic", LORA, 7)
    downs = [p for role in ("policy", "critic") for n, p in adapter_parameters(decoder, role).items() if n.endswith("q.down.weight")]
    assert len(downs) == 4
    assert len({tuple(d.flatten().tolist()) for d in downs}) == 4


def test_a_new_lora_changes_nothing_and_a_new_prefix_does() -> None:
    decoder = make()
    bare = run(decoder, None)
    add_adapter(decoder, "policy", LORA, 0)
    add_adapter(decoder, "prefixed", PTUNING, 0)
    assert torch.equal(run(decoder, "policy"), bare)
    assert torch.equal(run(decoder, None), bare)
    assert not torch.allclose(run(decoder, "prefixed"), bare)
    scramble(decoder, "policy")
    assert not torch.allclose(run(decoder, "policy"), bare)
    assert torch.equal(run(decoder, None), bare)


def test_initial_spread() -> None:
    wide = Decoder(DecoderConfig(vocab_size=5, hidden_size=256, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64, mlp_size=16))
    add_adapter(wide, "a", AdapterConfig(kind="lora", rank=64, targets=("q",)), 0)
    down = adapter_parameters(wide, "a")["layers.0.attention.adapters.a.q.down.weight"]
    assert down.abs().max() <= 256**-0.5 and abs(down.std() - 256**-0.5 / 3**0.5) < 1e-3
    add_adapter(wide, "b", AdapterConfig(kind="ptuning", tokens=128), 0)
    for parameter in adapter_parameters(wide, "b").values():
        assert abs(parameter.std() - PREFIX_STD) < 1e-3


def test_a_meta_decoder_gets_a_meta_adapter_drawn_later() -> None:
    real = make(torch.float32)
    add_adapter(real, "policy", LORA, 3)
    with torch.device("meta"):
        empty = Decoder(CONFIG)
    add_adapter(empty, "policy", LORA, 3)
    assert all(p.is_meta for p in adapter_parameters(empty, "policy").values())
    empty.to_empty(device="cpu")
    init_adapter(empty, "policy", 3)
    for name, parameter in adapter_parameters(empty, "policy").items():
        assert torch.equal(parameter, adapter_parameters(real, "policy")[name])


def test_only_the_chosen_adapter_is_trained() -> None:
    decoder = make()
    for role in ("policy", "critic", "reference"):
        add_adapter(decoder, role, LORA, 0)
    chosen = trainable(decoder, "policy", "lora")
    assert chosen == adapter_parameters(decoder, "policy")
    assert {n for n, p in decoder.named_parameters() if p.requires_grad} == set(chosen)
    both = chosen | trainable(decoder, "critic", "lora", keep=("policy",))
    assert {n for n, p in decoder.named_parameters() if p.requires_grad} == set(both)
    assert {n.split(".")[4] for n in both} == {"policy", "critic"}


def test_full_trains_the_base_and_no_adapter() -> None:
    decoder = make()
    base = set(dict(decoder.named_parameters()))
    add_adapter(decoder, "reference", PTUNING, 0)
    add_adapter(decoder, "other", LORA, 0)
    trainable(decoder, "other", "lora")
    assert set(trainable(decoder, None, "full")) == base
    assert {n for n, p in decoder.named_parameters() if p.requires_grad} == base


def test_a_role_without_an_adapter_cannot_be_trained() -> None:
    with pytest.raises(ValueError, match="'policy' has no adapter"):
        trainable(make(), "policy", "lora")


def test_no_gradient_is_asked_for_below_the_first_trained_module() -> None:
    decoder = make()
    add_adapter(decoder, "policy", LORA, 0)
    scramble(decoder, "policy")
    trainable(decoder, "policy", "lora")
    for half in (decoder.layers[0].attention, decoder.layers[0].mlp):
        del half.adapters["policy"]
    asked = {}
    for name in ("embed", "layers.0", "layers.1"):
        decoder.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: asked.update({name: out.requires_grad}))
    run(decoder, "policy").sum().backward()
    assert asked == {"embed": False, "layers.0": False, "layers.1": True}
    for name, parameter in decoder.named_parameters():
        assert (parameter.grad is not None) == (".adapters.policy." in name), name


@pytest.mark.parametrize("config", [LORA, PTUNING])
def test_gradients_are_those_of_finite_differences(config: AdapterConfig) -> None:
    decoder = make()
    add_adapter(decoder, "policy", config, 0)
    scramble(decoder, "policy")
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def loss() -> Tensor:
        return (run(decoder, "policy") * weight).sum()

    loss().backward()
    for name, parameter in adapter_parameters(decoder, "policy").items():
        flat, step = parameter.data.view(-1), 1e-6
        i = len(flat) // 2
        flat[i] += step
        above = loss().item()
        flat[i] -= 2 * step
        below = loss().item()
        flat[i] += step
        slope = parameter.grad.view(-1)[i].item()
        assert slope == pytest.approx((above - below) / (2 * step), rel=1e-5, abs=1e-6), name


def test_dropout_acts_in_training_alone_and_repeats_with_the_seed() -> None:
    decoder = make()
    add_adapter(decoder, "policy", LORA.model_copy(update={"dropout": 0.5}), 0)
    scramble(decoder, "policy")
    decoder.eval()
    still = run(decoder, "policy")
    assert torch.equal(run(decoder, "policy"), still)
    decoder.train()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(run(decoder, "policy"))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2]) and not torch.equal(outs[0], still)
    assert torch.equal(run(decoder, None), run(decoder, None))


def test_an_adapter_added_to_an_evaluating_decoder_evaluates() -> None:
    decoder = make().eval()
    add_adapter(decoder, "policy", LORA.model_copy(update={"dropout": 0.5}), 0)
    assert not any(m.training for m in decoder.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_merge_is_the_sum(dtype: torch.dtype) -> None:
    decoder = make(dtype)
    add_adapter(decoder, "policy", LORA, 0)
    scramble(decoder, "policy")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    linear, adapter = decoder.layers[1].mlp.down, decoder.layers[1].mlp.adapters["policy"]["down"]
    expected = (linear.weight.to(wide) + 2.0 * adapter.up.weight.to(wide) @ adapter.down.weight.to(wide)).to(dtype)
    untouched = decoder.layers[1].mlp.up.weight.clone()
    merge_adapter(decoder, "policy")
    torch.testing.assert_close(decoder.layers[1].mlp.down.weight, expected, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    assert torch.equal(decoder.layers[1].mlp.up.weight, untouched)
    assert not has_adapter(decoder, "policy")


def test_a_bfloat16_merge_keeps_changes_below_the_last_place() -> None:
    """What is written is a neighbour of the sum, and over many weights the change is there; to the nearest most of it is not."""
    config = replace(CONFIG, hidden_size=256, mlp_size=512, num_layers=1, init_std=0.02)
    decoder = Decoder(config)
    init_weights(decoder, torch.Generator().manual_seed(1))
    decoder.to(torch.bfloat16)
    add_adapter(decoder, "policy", LORA, 0)
    for half in halves(decoder):  # a new one changes nothing
        for name, new in low_ranks(half, "policy").items():
            assert torch.equal(merged_weight(half, name, new), getattr(half, name).weight)
    half = decoder.layers[0].mlp
    adapter, base = half.adapters["policy"]["down"], half.down.weight.detach().double().numpy()
    signs = torch.randint(0, 2, adapter.up.weight.shape, generator=torch.Generator().manual_seed(2)) * 2 - 1
    adapter.up.weight.data.copy_(signs * 1e-5)  # as after a step of AdamW
    change = 2.0 * adapter.up.weight.detach().double().numpy() @ adapter.down.weight.detach().double().numpy()
    found, nearest = merged_weight(half, "down", adapter), torch.from_numpy(base + change).bfloat16()
    assert found.dtype == torch.bfloat16 and torch.equal(found, merged_weight(half, "down", adapter))
    assert found.is_contiguous() and found.untyped_storage().nbytes() == 2 * found.numel()
    got = found.double().numpy()
    low, high = neighbours((base + change).astype(np.float32))
    assert ((np.abs(got - low) < 1e-12) | (np.abs(got - high) < 1e-12)).all()
    kept, lost = (float(((x - base) * change).sum() / (change**2).sum()) for x in (got, nearest.double().numpy()))
    error = float(np.sqrt((np.abs(high - low) * np.abs(change) * change**2).sum()) / (change**2).sum())  # deviation of `kept`, at most
    assert abs(kept - 1) < 4 * error < 0.4 and lost < 0.2
    adapter.up.weight.data.copy_(signs * 1e-2)  # grown: the nearest keeps it, and is nearer
    assert torch.equal(merged_weight(half, "down", adapter), adapter.merged(half.down.weight).bfloat16())
    adapter.up.weight.data[3, 1] = torch.nan  # stays to be seen, and is not rounded to a number
    assert merged_weight(half, "down", adapter).isnan().any()
    adapter.up.weight.data.copy_(signs * 1e-5)
    merge_adapter(decoder, "policy")
    assert torch.equal(half.down.weight, found)


def test_a_prefix_cannot_be_merged() -> None:
    decoder = make()
    add_adapter(decoder, "policy", PTUNING, 0)
    with pytest.raises(UserError, match="P-tuning adapter cannot be merged"):
        merge_adapter(decoder, "policy")
    assert has_adapter(decoder, "policy")


@pytest.mark.parametrize("config", [LORA, PTUNING])
def test_remove_and_rename(config: AdapterConfig) -> None:
    decoder = make()
    bare = run(decoder, None)
    add_adapter(decoder, "policy", config, 0)
    scramble(decoder, "policy")
    adapted = run(decoder, "policy")
    held = list(adapter_parameters(decoder, "policy").values())
    rename_adapter(decoder, "policy", "default")
    assert torch.equal(run(decoder, "default"), adapted) and not has_adapter(decoder, "policy")
    assert all(a is b for a, b in zip(held, adapter_parameters(decoder, "default").values(), strict=True))
    remove_adapter(decoder, "default")
    assert torch.equal(run(decoder, "default"), bare) and not adapter_parameters(decoder, "default")


@pytest.mark.parametrize("config", [LORA, PTUNING])
def test_a_copy_is_equal_frozen_and_its_own(config: AdapterConfig) -> None:
    decoder = make()
    add_adapter(decoder, "policy", config, 0)
    scramble(decoder, "policy")
    run(decoder, "policy").sum().backward()
    copy_adapter(decoder, "policy", "reference")
    before = run(decoder, "policy")
    assert torch.equal(run(decoder, "reference"), before)
    for parameter in adapter_parameters(decoder, "reference").values():
        assert not parameter.requires_grad and parameter.grad is None
    scramble(decoder, "policy", seed=9)
    assert torch.equal(run(decoder, "reference"), before)
    assert not torch.allclose(run(decoder, "policy"), before)


def test_a_taken_or_impossible_role_is_refused() -> None:
    decoder = make()
    for config in (LORA, PTUNING):
        remove_adapter(decoder, "policy")
        add_adapter(decoder, "policy", config, 0)
        with pytest.raises(ValueError, match="already has an adapter"):
            add_adapter(decoder, "policy", config, 0)
    with pytest.raises(ValueError, match="one word"):
        add_adapter(decoder, "a.b", LORA, 0)


def test_the_state_dict_carries_the_adapter() -> None:
    one, two = make(), make()
    for decoder in (one, two):
        add_adapter(decoder, "policy", LORA, 0)
    scramble(one, "policy")
    nn.Module.load_state_dict(two, one.state_dict())
    assert torch.equal(run(one, "policy"), run(two, "policy"))
