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
from trueline.rollout.packed import PAYS, SLOWER, STEPS, Linear, PackedDecoder, can_pack, turned_pays
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


@pytest.mark.parametrize(
    ("adapter", "turned"), [*((adapter, False) for adapter in ADAPTERS), ("base", True), ("some_lora", True)]
)  # what LoRA was merged into is not turned
@pytest.mark.parametrize("config", CONFIGS)
def test_packed_logits_are_the_decoders(config: str, adapter: str, turned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_module, "turned_pays", lambda decoder: turned)
    decoder, role = make(CONFIGS[config], adapter)
    assert can_pack(decoder)
    lengths = [5, 1, 6, 4] if turned else [5, 1, 9, 4]
    assert difference(decoder, role, lengths) < 2e-5
    if role is not None:
        assert difference(decoder, None, lengths) < 2e-5  # without the role, without its adapter


@pytest.mark.parametrize(("step", "turned"), [(1, False), (1, True), (8, False)])  # as in float32, there with AVX2, and in bfloat16
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 32, 63, 64, 65, 200, 256, 257, 333, 600])
def test_any_number_of_rows(rows: int, step: int, turned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STEPS, torch.float32, step)
    monkeypatch.setattr(packed_module, "turned_pays", lambda decoder: turned)
    monkeypatch.setattr(packed_module, "SLOWER", 300)  # the larger ones are packed on the way
    decoder, _ = make(CONFIG)
    assert difference(decoder, None, [1] * (rows % 50) + [rows - rows % 50] * (rows >= 50)) < 2e-5


@pytest.mark.parametrize("how", ["add", "mul"])
@pytest.mark.parametrize("rows", [1, 5, 8, 24, 40])
def test_a_linear_is_one_however_it_is_multiplied(rows: int, how: str) -> None:
    """States and what is added lie by rows or by channels: the numbers are the same."""
    draw = torch.Generator().manual_seed(0)
    weight, bias, x, other = (torch.randn(shape, generator=draw) for shape in ((12, 20), (12,), (rows, 20), (rows, 12)))
    expected = x.double() @ weight.double().T
    for own in (None, bias):
        linears = Linear(weight, own), Linear(weight, own, turned=True)
        plain = expected + (0 if own is None else own)
        after = plain + other if how == "add" else plain * other
        assert (linears[1].packed is None) is (own is None)
        for linear in linears:
            for lying in (lambda y: y, lambda y: y.t().contiguous().t()):
                torch.testing.assert_close(linear(lying(x)).double(), plain, rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(linear(lying(x), "swish").double(), F.silu(plain), rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(linear.combine(lying(x), lying(other), how).double(), after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
def test_turned_products_answer_as_others_do(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the engine, with 8 requests at once: logits that lie token by token are drawn from alike."""
    decoder, role = make(CONFIG)
    prompts, sampling, found = [[i + 1, 2] for i in range(8)], Sampling(PAYS, temperature=temperature, top_k=20), []
    for turned in (False, True):
        monkeypatch.setattr(packed_module, "turned_pays", lambda decoder, turned=turned: turned)
        engine = Engine(LanguageModel(decoder, role))
        with engine.hold():
            found.append(engine.generate(prompts, sampling, list(range(8))))
            assert isinstance(engine.decoder, PackedDecoder) and (engine.decoder.head.linear.turned is not None) is turned
    assert [r.tokens for r in found[0]] == [r.tokens for r in found[1]]
    assert [r.logprobs for r in found[0]] == [pytest.approx(r.logprobs, abs=1e-4) for r in found[1]]


def test_where_turning_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(capability: str, dtype: torch.dtype = torch.float32, layers: int = 40) -> bool:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        with torch.device("meta"):
            return turned_pays(Decoder(replace(CONFIG, hidden_size=256, mlp_size=256, num_layers=layers)).to(dtype))

    assert found("AVX2") and not found("AVX512") and not found("DEFAULT")
    assert not found("AVX2", torch.bfloat16) and not found("AVX2", layers=20)


def test_a_weight_is_packed_once_that_pays() -> None:
    linear = Linear(torch.randn(12, 20), turned=True)
    for _ in range(SLOWER):
        linear(torch.randn(16, 20))  # what it is good at
    linear(torch.randn(SLOWER - 1, 20))
    linear.combine(torch.randn(1, 20), torch.randn(1, 12), "add")
    assert linear.packed is None
    linear(torch.randn(1, 20))
    packed = linear.packed
    linear(torch.randn(1, 20))
    assert packed is not None and linear.packed is packed


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
        linears = [value for value in vars(part).values() if isinstance(value, Linear)]
        own = [x for value in (part, *linears) for x in vars(value).values()]
        for x in (*part._parameters.values(), *own):
            if isinstance(x, torch.Tensor):
                memory = x.untyped_storage() if x.layout == torch.strided else None
                found[memory.data_ptr() if memory else id(x)] = memory.nbytes() if memory else x.numel() * x.element_size()
    return found


@pytest.mark.parametrize("turned", [False, True], ids=["packed", "turned"])
@pytest.mark.parametrize("adapter", ["base", "lora"])
def test_handing_the_weights_over(adapter: str, turned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without packing nothing is copied; with it each matrix once, LoRA merged into it. Turned, only what is merged, and q, k and v."""
    monkeypatch.setattr(packed_module, "turned_pays", lambda decoder: turned)
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
                base = [p for name, p in decoder.named_parameters() if p.dim() == 2 and "embed" not in name and ".adapters." not in name]
                if turned and adapter == "base":
                    base = [layer.attention.get_parameter(f"{name}.weight") for layer in decoder.layers for name in "qkv"]
                matrices = sum(p.nbytes for p in base)
                assert 0.9 * matrices < sum(new.values()) < 1.15 * matrices  # and biases in one; no adapter's own, no embedding
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
