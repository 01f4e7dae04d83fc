"""The packed decoder is the decoder: the same logits for every choice a family makes."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trueline.config.schema import AdapterConfig
from trueline.model.adapters import add_adapter
from trueline.model.decoder import Decoder, DecoderConfig, init_weights
from trueline.model.heads import LanguageModel
from trueline.model.layout import Packed
from trueline.model.rotary import RopeScaling
from trueline.parallel.world import fast_bfloat16
from trueline.rollout import packed as packed_module
from trueline.rollout.engine import Engine
from trueline.rollout.memory import Pages, Slots
from trueline.rollout.native import kernels
from trueline.rollout.packed import (
    FEW,
    PAYS,
    STEPS,
    NativeLinear,
    PackedDecoder,
    PackedLinear,
    can_pack,
    copied_bytes,
    native_for,
)  # fmt: skip
from trueline.rollout.sampling import Sampling

CONFIG = DecoderConfig(vocab_size=70, hidden_size=24, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=8, mlp_size=40, init_std=0.3)
CONFIGS = {
    "qwen2": CONFIG,
    "glm4": replace(CONFIG, rope="interleaved", rope_dim=4, norm_eps=1.5625e-7),
    "glm4_unbiased": replace(CONFIG, rope="interleaved", rope_dim=8, qkv_bias=False, num_kv_heads=6),
    "llama": replace(CONFIG, qkv_bias=False, tied_embeddings=True, rope_theta=5e5, norm_eps=1e-3),
    "llama_biased": replace(CONFIG, o_bias=True, mlp_bias=True),
    "part_of_half": replace(CONFIG, rope_dim=6),
    "qwen3": replace(CONFIG, qkv_bias=False, qk_norm=True, norm_eps=1e-3),
    "glm4_0414": replace(CONFIG, rope="interleaved", rope_dim=4, post_norms=True, norm_eps=1e-3),
    "interleaved_qk_norm": replace(CONFIG, rope="interleaved", rope_dim=4, qk_norm=True, post_norms=True, norm_eps=1e-3),
    "yarn": replace(CONFIG, rope_scaling=RopeScaling("yarn", 4.0, 16, 1, 32, 1.2)),
    "windows": replace(CONFIG, windows=(None, 3)),
    "chatglm": replace(
        CONFIG, num_kv_heads=6, o_bias=True, mlp_bias=True, rope_rows=True, norm="layer", gated=False, residual_scale=56**0.5,
        prefix_shifts=False, norm_eps=1e-3,
    ),
    "still_prefix": replace(CONFIG, prefix_shifts=False),
}
ADAPTERS = {
    "base": None,
    "lora": AdapterConfig(kind="lora", rank=3, alpha=6.0, dropout=0.5, targets=("q", "k", "v", "o", "gate", "up", "down")),
    "dora": AdapterConfig(kind="lora", rank=3, alpha=6.0, dora=True, rslora=True, targets=("q", "k", "v", "o", "gate", "up", "down")),
    "some_lora": AdapterConfig(kind="lora", rank=2, targets=("k", "down")),
    "ptuning": AdapterConfig(kind="ptuning", tokens=5),
}


needs_native = pytest.mark.skipif(kernels() is None, reason="no C compiler, or not a CPU that native.c was tried on")


def grown(config: DecoderConfig) -> DecoderConfig:
    """Of sizes that native.c takes, head for head and channel for channel what `config` has."""
    return replace(config, hidden_size=32, head_dim=16, mlp_size=48, rope_dim=config.rope_dim and 2 * config.rope_dim, init_std=0.25)


def make(config: DecoderConfig, adapter: str = "base") -> tuple[Decoder, str | None]:
    """Every weight random, biases and norms too."""
    decoder, chosen = Decoder(config), ADAPTERS[adapter]
    init_weights(decoder, torch.Generator().manual_seed(0))
    if chosen is not None:
        for role in ("policy", "critic"):
            add_adapter(decoder, role, chosen, 0)
    draw = torch.Generator().manual_seed(1)
    for name, parameter in decoder.named_parameters():
        if parameter.dim() == 1 or ".adapters." in name or name.startswith("prefixes"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * 0.2 + ("norm" in name))
    return decoder, "policy" if chosen else None


@torch.no_grad()
def difference(decoder: Decoder, role: str | None, lengths: list[int]) -> float:
    """Largest difference of logits relative to their spread, of all tokens and of the last of each sequence alone."""
    layout = Packed.of(lengths)
    if decoder.config.rope_rows:  # contexts seen both ways, and two rows of positions
        layout = Packed.of(lengths, [n // 2 for n in lengths], anchors=[n // 3 or None for n in lengths])
    tokens = torch.randint(0, 70, (sum(lengths),), generator=torch.Generator().manual_seed(2))
    wide = decoder.double().eval()
    expected = wide.head(wide(tokens, layout, role))  # type: ignore[misc]
    packed = PackedDecoder(decoder.float(), role)
    got, ends = packed.head(packed(tokens, layout, role)), torch.tensor(lengths).cumsum(0) - 1
    last = packed.head(packed(tokens, layout, role, ends))
    assert got.dtype == torch.float32 and got.shape == expected.shape and len(last) == len(lengths)
    gaps = (got - expected).abs().max(), (last - expected[ends]).abs().max()
    return float(max(gaps) / expected.std())


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs_native)], ids=["packed", "native"])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("config", CONFIGS)
def test_packed_logits_are_the_decoders(config: str, adapter: str, native: bool) -> None:
    decoder, role = make(grown(CONFIGS[config]) if native else CONFIGS[config], adapter)
    assert can_pack(decoder) and (native_for(decoder) is not None) is native
    assert difference(decoder, role, [5, 1, 9, 4]) < 2e-5
    if role is not None:
        assert difference(decoder, None, [5, 1, 9, 4]) < 2e-5  # without the role, without its adapter


@pytest.mark.parametrize("step", [1, 8])  # as in float32 and in bfloat16
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 63, 64, 65, 200, 256, 257, 333, 600])
def test_any_number_of_rows(rows: int, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STEPS, torch.float32, step)
    decoder, _ = make(CONFIG)
    assert difference(decoder, None, [1] * (rows % 50) + [rows - rows % 50] * (rows >= 50)) < 2e-5


@needs_native
@pytest.mark.parametrize("rows", [1, 9, FEW, FEW + 1, 1024, 1100])
def test_any_number_of_rows_by_native(rows: int) -> None:
    decoder, _ = make(grown(CONFIG))
    assert difference(decoder, None, [1] * (rows % 50) + [rows - rows % 50] * (rows >= 50)) < 2e-5


@pytest.mark.parametrize("how", ["add", "mul"])
@pytest.mark.parametrize("rows", [1, 5, 40, FEW + 7])
def test_a_linear_is_one_however_it_is_multiplied(rows: int, how: str) -> None:
    draw = torch.Generator().manual_seed(0)
    weight, bias, x, other = (torch.randn(shape, generator=draw) for shape in ((13, 32), (13,), (rows, 32), (rows, 13)))
    expected, found = x.double() @ weight.double().T, kernels()
    for own in (None, bias):
        plain = expected + (0 if own is None else own)
        after = plain + other if how == "add" else plain * other
        for linear in (PackedLinear(weight, own), *((NativeLinear(found, weight, own),) if found else ())):
            torch.testing.assert_close(linear(x).double(), plain, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(linear(x, "swish").double(), F.silu(plain), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(linear(x, "gelu", "tanh").double(), F.gelu(plain, approximate="tanh"), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(linear.combine(x, other, how).double(), after, rtol=1e-5, atol=1e-5)


@needs_native
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("adapter", ["base", "lora", "ptuning"])
@pytest.mark.parametrize("config", CONFIGS)
def test_native_answers_are_the_decoders(config: str, adapter: str, paged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts read beside running answers, rows that move, slots or pages; against the decoder in float64, token for token."""
    decoder, role = make(grown(CONFIGS[config]), adapter)
    prompts = [[i + 1, 2, *range(3, 3 + i % 5 * 4)] for i in range(9)]
    sampling = Sampling(PAYS + 20, stop=frozenset(range(0, 70, 14)))
    if paged:
        monkeypatch.setattr("trueline.rollout.memory.needs_pages", lambda *given: True)
    found = []
    for wide in (False, True):
        engine = Engine(LanguageModel(decoder.double() if wide else decoder, role), 4, packed=not wide, budget=2**24)
        with engine.hold():
            found.append(engine.generate(prompts, sampling, list(range(len(prompts)))))
            assert wide or (isinstance(engine.decoder, PackedDecoder) and engine.decoder.native is not None)
            assert isinstance(engine.memory, Pages if paged else Slots)
    assert [r.tokens for r in found[0]] == [r.tokens for r in found[1]]
    assert len({len(r.tokens) for r in found[0]}) > 1  # some stop before others
    assert [r.logprobs for r in found[0]] == [pytest.approx(r.logprobs, abs=1e-4) for r in found[1]]


@needs_native
def test_a_native_answer_depends_on_no_neighbour() -> None:
    """Not to the last bit: other requests, their number and their lengths change nothing. (Nor do prompts of few tokens in all.)"""
    decoder, role = make(grown(CONFIG))
    prompts, sampling, found = [[i + 1, 2, *range(3, 3 + i % 5 * 4)] for i in range(13)], Sampling(30), []
    for chosen in ([0, 1, 2, 3], [2], [2, *range(4, 13)]):
        engine = Engine(LanguageModel(decoder, role), 13)
        with engine.hold():
            answers = engine.generate([prompts[i] for i in chosen], sampling, [100 + i for i in chosen])
        found.append(answers[chosen.index(2)])
    assert found[0].tokens == found[1].tokens == found[2].tokens
    assert found[0].logprobs == found[1].logprobs == found[2].logprobs


def test_packing_leaves_the_decoder_alone() -> None:
    decoder, role = make(CONFIG, "lora")
    decoder.train()
    before = {name: p.clone() for name, p in decoder.named_parameters()}
    names = [name for name, _ in decoder.named_modules()]
    PackedDecoder(decoder, role)
    assert [name for name, _ in decoder.named_modules()] == names and decoder.training
    for name, p in decoder.named_parameters():
        assert torch.equal(p, before[name]) and p.requires_grad and p.grad is None


def storages(module: torch.nn.Module) -> dict[int, int]:
    """Address -> bytes of all that the module's tensors lie in, also those in plain attributes."""
    found: dict[int, int] = {}
    for part in module.modules():
        linears = [value for value in vars(part).values() if isinstance(value, PackedLinear | NativeLinear)]
        own = [x for value in (part, *linears) for x in vars(value).values()]
        for x in (*part._parameters.values(), *own):
            if isinstance(x, torch.Tensor):
                memory = x.untyped_storage() if x.layout == torch.strided else None
                found[memory.data_ptr() if memory else id(x)] = memory.nbytes() if memory else x.numel() * x.element_size()
    return found


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs_native)], ids=["packed", "native"])
@pytest.mark.parametrize("adapter", ["base", "lora", "some_lora"])
def test_handing_the_weights_over(adapter: str, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without packing nothing is copied; with it each matrix once, LoRA merged into it. By native.c only q, k, v and what is merged."""
    if not native:
        monkeypatch.setattr(packed_module, "kernels", lambda: None)
    decoder, role = make(replace(CONFIG, hidden_size=64, mlp_size=192, head_dim=16, num_heads=4, num_layers=3), adapter)
    trained = storages(decoder)
    for packed, sampling in ((False, Sampling(40)), (True, Sampling(PAYS - 1)), (True, Sampling(PAYS))):
        engine = Engine(LanguageModel(decoder, role), packed=packed)
        with engine.hold():
            engine.generate([[1, 2, 3]], sampling, [0])
            assert engine.decoder is not None
            new = {at: size for at, size in storages(engine.decoder).items() if at not in trained}
            if sampling.max_new_tokens < PAYS or not packed:
                assert engine.decoder is decoder and not new
            else:
                matrices = {name: p.nbytes for name, p in decoder.named_parameters() if p.dim() == 2 and ".adapters." not in name}
                made = {"base": "qkv", "lora": ("q", "k", "v", "o", "gate", "up", "down"), "some_lora": ("q", "k", "v", "down")}[adapter]
                copied = [size for name, size in matrices.items() if "embed" not in name and (not native or name.split(".")[-2] in made)]
                assert copied_bytes(decoder, role) == sum(copied)
                assert 0.9 * sum(copied) < sum(new.values()) < 1.15 * sum(copied)  # and biases in one; no adapter's own, no embedding
        assert engine.decoder is None


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None, then: str = "none", form: str = "") -> Tensor:
    """As oneDNN's: float32 inside, the answer in `x`'s dtype."""
    y = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    after = {"none": lambda y: y, "gelu": partial(F.gelu, approximate=form or "none"), "swish": F.silu}
    return after[then](y).to(x.dtype)


def plain_linear_with(x: Tensor, other: Tensor, weight: Tensor, bias: Tensor | None, how: str) -> Tensor:
    y = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return (y + other.float() if how == "add" else y * other.float()).to(x.dtype)


@pytest.fixture
def bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's own bfloat16 products where it has tiles (AMX), plain ones elsewhere."""
    if not fast_bfloat16():
        monkeypatch.setattr(packed_module, "fast_bfloat16", lambda: True)
        monkeypatch.setattr(packed_module, "_pack", lambda weight: weight.detach().clone())
        monkeypatch.setattr(packed_module, "_linear", plain_linear)
        monkeypatch.setattr(packed_module, "_linear_with", plain_linear_with)


@pytest.mark.usefixtures("bfloat16_products")
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("config", CONFIGS)
def test_packed_bfloat16_rounds_no_more_than_the_decoder(config: str, adapter: str) -> None:
    decoder, role = make(replace(CONFIGS[config], hidden_size=64, vocab_size=70), adapter)
    decoder.to(torch.bfloat16).eval()
    assert can_pack(decoder)
    lengths = [5, 1, 9, 4]
    layout = Packed.of(lengths)
    if decoder.config.rope_rows:
        layout = Packed.of(lengths, [n // 2 for n in lengths], anchors=[n // 3 or None for n in lengths])
    tokens = torch.randint(0, 70, (sum(lengths),), generator=torch.Generator().manual_seed(2))
    packed = PackedDecoder(decoder, role)
    with torch.no_grad():
        got, plain = packed.head(packed(tokens, layout, role)), decoder.head(decoder(tokens, layout, role))  # type: ignore[misc]
        expected = decoder.double().head(decoder(tokens, layout, role))  # type: ignore[misc]
    assert got.dtype == torch.bfloat16
    gap, usual = (float((x - expected).abs().mean() / expected.std()) for x in (got, plain))
    # a LoRA that is merged is rounded with its matrix
    merged = "lora" in adapter or adapter == "dora"
    assert 0 < gap < (1.6 if merged else 1.05) * usual and gap < (0.05 if merged else 0.03)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_what_is_packed(dtype: torch.dtype) -> None:
    decoder, _ = make(CONFIG)
    assert can_pack(decoder)
    assert can_pack(decoder.to(dtype)) == (dtype == torch.bfloat16 and fast_bfloat16())
    with torch.device("meta"):
        assert not can_pack(Decoder(CONFIG))
