"""The fused decoder is the decoder: the same logits for every choice a family makes, and no weight is held twice that need not be."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.rollout.test_packed import ADAPTERS, CONFIGS, make
from trueline.config.schema import OptimizerConfig
from trueline.model.adapters import low_ranks, merged_weight, trainable
from trueline.model.decoder import Decoder, adjoin, halves, init_weights
from trueline.model.heads import LanguageModel
from trueline.model.layout import Packed
from trueline.rollout import engine as engine_module
from trueline.rollout import fused as fused_module
from trueline.rollout.engine import Engine
from trueline.rollout.fused import SHARE, FusedDecoder, Product, adjacent, can_fuse, merged_bytes
from trueline.rollout.packed import PAYS
from trueline.rollout.sampling import Sampling
from trueline.train.optimizer import make_optimizer

LENGTHS = [5, 1, 9, 4]


def layout_of(decoder: Decoder) -> Packed:
    if decoder.config.rope_rows:  # contexts seen both ways, and two rows of positions
        return Packed.of(LENGTHS, [n // 2 for n in LENGTHS], anchors=[n // 3 or None for n in LENGTHS])
    return Packed.of(LENGTHS)


def tokens() -> Tensor:
    return torch.randint(0, 70, (sum(LENGTHS),), generator=torch.Generator().manual_seed(2))


@torch.inference_mode()
def gaps(decoder: Decoder, role: str | None) -> float:
    """Largest difference of logits relative to their spread, of all tokens and of the last of each sequence alone."""
    expected = decoder.head(decoder(tokens(), layout_of(decoder), role))  # type: ignore[misc]
    fused, ends = FusedDecoder(decoder, role), torch.tensor(LENGTHS).cumsum(0) - 1
    got = fused.head(fused(tokens(), layout_of(decoder), role))  # type: ignore[misc]
    last = fused.head(fused(tokens(), layout_of(decoder), role, ends))  # type: ignore[misc]
    assert got.dtype == expected.dtype and got.shape == expected.shape and len(last) == len(ends)
    return float(max((got - expected).abs().max(), (last - expected[ends]).abs().max()) / expected.std())


CASES = [(config, adapter, True) for config in CONFIGS for adapter in ADAPTERS] + [("llama_biased", "base", False), ("glm4", "lora", False)]


@pytest.mark.parametrize(("config", "adapter", "together"), CASES)
def test_logits_are_the_decoders(config: str, adapter: str, together: bool) -> None:
    decoder, role = make(CONFIGS[config], adapter)
    decoder.double().eval()
    if together:
        adjoin(decoder)
    assert gaps(decoder, role) < 1e-10
    if role is not None:
        assert gaps(decoder, None) < 1e-10  # without the role, without its adapter


@pytest.mark.parametrize("adapter", ["base", "lora", "dora"])
def test_bfloat16_rounds_hardly_more_than_the_decoder(adapter: str) -> None:
    decoder, role = make(CONFIGS["glm4"], adapter)
    wide = copy.deepcopy(decoder.to(torch.bfloat16).eval()).double()
    with torch.inference_mode():
        expected, plain = (x.head(x(tokens(), layout_of(x), role)).double() for x in (wide, decoder))  # type: ignore[misc]
        fused = FusedDecoder(decoder, role)
        got = fused.head(fused(tokens(), layout_of(decoder), role)).double()  # type: ignore[misc]
    # a LoRA that is merged is rounded with its matrix
    assert 0 < (got - expected).norm() < (1.05 if adapter == "base" else 1.6) * (plain - expected).norm() < 0.1 * expected.norm()


def products(fused: FusedDecoder) -> list[Product]:
    return [module for module in fused.modules() if isinstance(module, Product)]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_what_has_no_lora_is_read_where_it_is_trained(adapter: str) -> None:
    decoder, role = make(CONFIGS["llama_biased"], adapter)
    adjoin(decoder)
    trained = {p.untyped_storage().data_ptr() for p in decoder.parameters()}
    before = {name: p.clone() for name, p in decoder.named_parameters()}
    fused = FusedDecoder(decoder, role)
    assert all(len(product.parts) == 1 for product in products(fused)) and len(products(fused)) == 4 * decoder.config.num_layers
    parts = [part for product in products(fused) for part in product.parts[0]]
    copied = [x for x in parts if x is not None and x.untyped_storage().data_ptr() not in trained]
    assert sum(x.nbytes for x in copied) == merged_bytes(decoder, role)
    assert bool(copied) == ("lora" in adapter or adapter == "dora")
    if adapter == "some_lora":  # k and down: q, k and v in one, and down
        config = decoder.config
        attention = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim * config.hidden_size
        assert merged_bytes(decoder, role) == 4 * config.num_layers * (attention + config.hidden_size * config.mlp_size)
    assert merged_bytes(decoder, None) == 0
    for name, p in decoder.named_parameters():
        assert torch.equal(p, before[name]) and p.requires_grad and p.grad is None


@pytest.mark.parametrize("together", [True, False])
def test_addresses_are_of_all_that_is_read(together: bool) -> None:
    decoder, role = make(CONFIGS["llama_biased"], "lora")
    if together:
        adjoin(decoder)
    fused = FusedDecoder(decoder.to(torch.bfloat16), role)
    parts = [x for product in products(fused) for part in product.parts for x in part if x is not None]
    assert set(fused.addresses) == {x.data_ptr() for x in parts} and len(parts) == 2 * len(products(fused))
    assert all(x.is_contiguous() for x in parts)


def test_a_merge_is_the_adapters_own() -> None:
    decoder, role = make(CONFIGS["glm4"], "some_lora")
    decoder.to(torch.bfloat16)
    assert role is not None
    fused = FusedDecoder(decoder, role)
    for product, half in zip([p for p in products(fused) if p.sizes == [24]][1::2], list(halves(decoder))[1::2], strict=True):
        assert torch.equal(product.parts[0][0], merged_weight(half, "down", low_ranks(half, role)["down"]))


def test_weights_of_one_input_lie_one_behind_the_other() -> None:
    decoder, _ = make(CONFIGS["llama_biased"])
    plain = copy.deepcopy(decoder)
    adjoin(decoder)
    for ours, theirs in zip(decoder.named_parameters(), plain.named_parameters(), strict=True):
        assert ours[0] == theirs[0] and torch.equal(ours[1], theirs[1]) and ours[1].is_contiguous()
    for half in halves(decoder):
        for group in half.groups():
            linears = [getattr(half, name) for name in group]
            for kind in ("weight", "bias"):
                parts = [getattr(linear, kind).detach() for linear in linears]
                whole = adjacent(parts)
                assert whole is not None and torch.equal(whole, torch.cat(parts))
                assert whole.data_ptr() == parts[0].data_ptr()
                assert len(parts) == 1 or adjacent(parts[::-1]) is None
                assert all(a.data_ptr() + a.nbytes == b.data_ptr() for a, b in pairwise(parts))
    # a copy's do not
    linears = [getattr(copy.deepcopy(decoder).layers[0].attention, name) for name in "qkv"]  # type: ignore[union-attr]
    assert adjacent([linear.weight.detach() for linear in linears]) is None


@pytest.mark.parametrize("states", ["float32", "bfloat16"])
def test_weights_that_lie_together_train_as_others_do(states: str) -> None:
    trained = []
    for together in (False, True):
        decoder, _ = make(CONFIGS["glm4"])
        decoder.to(torch.bfloat16)
        if together:
            adjoin(decoder)
        optimizer = make_optimizer(trainable(decoder, None, "full"), OptimizerConfig(states=states))  # type: ignore[arg-type]
        for _ in range(3):
            decoder(tokens(), layout_of(decoder)).float().square().sum().backward()
            optimizer.collect()
            optimizer.step(1e-2)
            optimizer.clear()
        trained.append(dict(decoder.named_parameters()))
    assert all(torch.equal(p, trained[1][name]) for name, p in trained[0].items())


@pytest.mark.parametrize("adapter", ["base", "lora", "ptuning"])
def test_answers_are_the_decoders_also_after_an_update(adapter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, role = make(CONFIGS["glm4"], adapter)
    model = LanguageModel(decoder.double().eval(), role)
    prompts, seen = [[3, 1, 4], [1], [5, 9, 2, 6, 5], [8, 9], [1]], []
    for fused in (False, True):
        monkeypatch.setattr(engine_module, "can_fuse", lambda decoder, role, tokens, fused=fused: fused)
        engine = Engine(LanguageModel(copy.deepcopy(decoder), role), running=3)
        for _ in range(2):
            with engine.hold():
                seen.append(engine.generate(prompts, Sampling(20), list(range(len(prompts)))))
                assert isinstance(engine.decoder, FusedDecoder) == fused
            assert engine.decoder is None
            with torch.no_grad():
                for name, p in engine.model.decoder.named_parameters():
                    if "norm" not in name:
                        p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)), dtype=p.dtype))
    (first, second), (fused_first, fused_second) = seen[:2], seen[2:]
    assert [r.tokens for r in first] != [r.tokens for r in second]
    for expected, got in zip(first + second, fused_first + fused_second, strict=True):
        assert got.tokens == expected.tokens and got.logprobs == pytest.approx(expected.logprobs, abs=1e-9)
    assert model.decoder is decoder


def test_when_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):  # stands for any device but the CPU
        lora, role = Decoder(CONFIGS["glm4"]), "policy"
    assert not can_fuse(make(CONFIGS["glm4"])[0], None, 1000)
    free = 0
    monkeypatch.setattr(fused_module, "free_memory", lambda device: free)
    assert can_fuse(lora, None, 1)
    monkeypatch.setattr(fused_module, "merged_bytes", lambda decoder, role: 1000)
    assert not can_fuse(lora, role, 1000)
    free = SHARE * 1000
    assert can_fuse(lora, role, PAYS) and not can_fuse(lora, role, PAYS - 1)
    free -= 1
    assert not can_fuse(lora, role, PAYS)


def test_one_product_where_there_can_be_one() -> None:
    decoder = Decoder(CONFIGS["qwen2"])
    init_weights(decoder, torch.Generator().manual_seed(0))
    attention = decoder.layers[0].attention
    assert len(Product(attention, "qkv", None).parts) == 3  # type: ignore[arg-type]
    adjoin(decoder)
    assert len(Product(attention, "qkv", None).parts) == 1  # type: ignore[arg-type]
    x, found = torch.randn(3, decoder.config.hidden_size), Product(attention, "qkv", None)  # type: ignore[arg-type]
    for got, name in zip(found(x), "qkv", strict=True):
        assert torch.allclose(got, getattr(attention, name)(x), atol=1e-5)
