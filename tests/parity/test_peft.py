"""Adapters against PEFT itself: the same logits from the same folder, in both directions, for every family."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM as Causal
from transformers import AutoModelForSequenceClassification as Classifier
from transformers import Glm4Config, GlmConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from trueline.config.schema import AdapterConfig
from trueline.families.family import Family
from trueline.families.glm4 import GLM4, GLM4_0414
from trueline.families.llama import LLAMA
from trueline.families.mistral import MISTRAL
from trueline.families.peft import Base, adapter_score, load_adapter, save_adapter
from trueline.families.qwen2 import QWEN2
from trueline.families.qwen3 import QWEN3
from trueline.model.adapters import adapter_parameters, add_adapter, copy_adapter, merge_adapter, remove_adapter
from trueline.model.decoder import Decoder
from trueline.model.layout import Packed

SIZES = {
    "vocab_size": 37,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 20,
    "pad_token_id": 0,
}
FAMILIES: dict[str, tuple[Family, Any]] = {"qwen2": (QWEN2, Qwen2Config), "glm": (GLM4, GlmConfig), "llama": (LLAMA, LlamaConfig)} | {
    "qwen3": (QWEN3, Qwen3Config),
    "glm4": (GLM4_0414, Glm4Config),
    "mistral": (MISTRAL, MistralConfig),
}
FIRST, SECOND = [3, 14, 15, 9, 26, 5, 35], [8, 9, 7, 9, 3]
EVERY = ("q", "k", "v", "o", "gate", "up", "down")

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.parity("adapters")]


class Twins:
    """A random transformers model and our decoder with the same weights, in float64."""

    def __init__(self, name: str, scorer: bool = False):
        torch.manual_seed(11)
        self.family, config = FAMILIES[name]
        extra = {"num_labels": 1} if scorer else {}
        kind = Classifier if scorer else Causal
        self.theirs = kind.from_config(config(**SIZES, **extra), dtype=torch.float64).eval()
        for p in self.theirs.parameters():
            p.data.normal_(std=0.2)
        self.decoder = Decoder(self.family.read_config(self.theirs.config.to_dict()), with_head=not scorer).double().eval()
        state, ours = self.theirs.state_dict(), self.decoder.state_dict()
        for weight in self.family.weights:
            for layer in range(3 if "{}" in weight.theirs else 1):
                if (source := state.get(weight.theirs.format(layer))) is None:
                    continue
                parts = weight.split(source, self.decoder.config) if weight.split else [source]
                for mine, part in zip(weight.ours, parts, strict=True):
                    if mine.format(layer) in ours:
                        ours[mine.format(layer)].copy_(part)
        self.base = Base(self.family, "some/base", "0" * 64)

    def wrap(self, config: LoraConfig | PrefixTuningConfig) -> PeftModel:
        """A copy of their model with a PEFT adapter of random numbers."""
        model = get_peft_model(copy.deepcopy(self.theirs), config).double().eval()
        for name, p in model.named_parameters():
            if "lora_magnitude" in name:
                p.data.uniform_(0.5, 2)
            elif "lora_" in name or "prompt_encoder" in name:
                p.data.normal_(std=0.3)
        return model

    def reload(self, folder: Path) -> nn.Module:
        return PeftModel.from_pretrained(copy.deepcopy(self.theirs), folder).double().eval()

    @torch.no_grad()
    def logits(self, role: str | None, *sequences: list[int]) -> Tensor:
        hidden = self.decoder(torch.tensor(sum(sequences, [])), Packed.of([len(s) for s in sequences]), role)
        return self.decoder.head(hidden) if self.decoder.head is not None else hidden


@torch.no_grad()
def ask(model: nn.Module, tokens: list[int]) -> Tensor:
    return model(input_ids=torch.tensor([tokens]), attention_mask=torch.ones(1, len(tokens), dtype=torch.int64)).logits[0]


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def linears(family: Family) -> list[str]:
    return sorted(set(family.targets.values()))


def trained(twins: Twins, config: AdapterConfig, role: str = "policy") -> None:
    """An adapter of ours with random numbers everywhere; PEFT reads adapters into float32, so they have no more digits than that."""
    add_adapter(twins.decoder, role, config, 5)
    generator = torch.Generator().manual_seed(6)
    for p in adapter_parameters(twins.decoder, role).values():
        p.data.copy_(torch.empty(p.shape, dtype=torch.float32).normal_(std=0.3, generator=generator))


@pytest.fixture(params=list(FAMILIES))
def twins(request: pytest.FixtureRequest) -> Twins:
    return Twins(request.param)


def same_as_peft(twins: Twins, model: PeftModel, folder: Path) -> AdapterConfig:
    """Saved by PEFT and loaded here: alone and packed, the logits are PEFT's; and the bare model is still the bare model."""
    model.save_pretrained(folder)
    bare = twins.logits(None, FIRST)
    config = load_adapter(folder, twins.decoder, "policy", twins.base)
    packed = twins.logits("policy", FIRST, SECOND)
    for tokens, ours in ((FIRST, packed[: len(FIRST)]), (SECOND, packed[len(FIRST) :])):
        close(ours, ask(model, tokens))
        torch.testing.assert_close(twins.logits("policy", tokens), ours, rtol=0, atol=1e-12)
    assert (packed[: len(FIRST)] - bare).abs().max() > 1e-3
    assert torch.equal(twins.logits(None, FIRST), bare)
    close(bare, ask(twins.theirs, FIRST))
    return config


# ------------------------------------------------------------------------------------------------------------------- theirs to ours


def test_lora_of_peft(twins: Twins, tmp_path: Path) -> None:
    model = twins.wrap(LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=10, lora_dropout=0.25, target_modules=linears(twins.family)))
    config = same_as_peft(twins, model, tmp_path)
    assert config == AdapterConfig(kind="lora", rank=3, alpha=10, dropout=0.25, targets=EVERY)


def variants(family: Family) -> dict[str, dict[str, Any]]:
    attention = ["q_proj", "o_proj"]
    return {
        "one layer": {"target_modules": linears(family), "layers_to_transform": 1},
        "some layers": {"target_modules": attention, "layers_to_transform": [0, 2], "layers_pattern": "layers"},
        "left out": {"target_modules": attention, "exclude_modules": ["o_proj"]},
        "left out in one layer": {"target_modules": attention, "exclude_modules": ["model.layers.1.self_attn.o_proj"]},
        "a pattern": {"target_modules": r".*\.self_attn\.(q|v)_proj"},
        "all linear": {"target_modules": "all-linear"},
        "rank-stabilised": {"target_modules": attention, "use_rslora": True},
        "ranks": {
            "target_modules": linears(family),
            "rank_pattern": {"q_proj": 5, "model.layers.1.mlp.down_proj": 2},
            "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 7, "o_proj": 1.5},
        },
        "rank-stabilised ranks": {
            "target_modules": attention,
            "use_rslora": True,
            "rank_pattern": {"o_proj": 6},
            "alpha_pattern": {"o_proj": 2},
        },
        "weight-decomposed": {"target_modules": linears(family), "use_dora": True},
        "weight-decomposed, rank-stabilised, in one layer": {
            "target_modules": linears(family),
            "use_dora": True,
            "use_rslora": True,
            "layers_to_transform": [1],
            "rank_pattern": {"o_proj": 5},
        },
        "gaussian": {"target_modules": attention, "init_lora_weights": "gaussian"},
    }


@pytest.mark.parametrize("name", list(FAMILIES))
@pytest.mark.parametrize("variant", list(variants(QWEN2)))
def test_options_of_lora(name: str, variant: str, tmp_path: Path) -> None:
    twins = Twins(name)
    model = twins.wrap(LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=10, **variants(twins.family)[variant]))
    same_as_peft(twins, model, tmp_path / "theirs")
    # and what came in goes out again
    save_adapter(tmp_path / "ours", twins.decoder, "policy", AdapterConfig(kind="lora", rank=3, alpha=10), twins.base)
    close(twins.logits("policy", FIRST), ask(twins.reload(tmp_path / "ours"), FIRST))


def test_prefix_tuning_of_peft(twins: Twins, tmp_path: Path) -> None:
    config = same_as_peft(twins, twins.wrap(PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)), tmp_path)
    assert config.kind == "ptuning" and config.tokens == 4


def test_a_projected_prefix_of_peft(twins: Twins, tmp_path: Path) -> None:
    projected = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=9)
    same_as_peft(twins, twins.wrap(projected), tmp_path)


# ------------------------------------------------------------------------------------------------------------------- ours to theirs


@pytest.mark.parametrize("targets", [EVERY, ("q", "v"), ("gate",), ("up", "down"), ("up", "gate")])
@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"dora": True}, {"rslora": True, "dora": True}], ids=str)
def test_our_lora_in_peft_and_back(twins: Twins, targets: Any, options: dict[str, bool], tmp_path: Path) -> None:
    config = AdapterConfig(kind="lora", rank=3, alpha=10, dropout=0.1, targets=targets, **options)
    trained(twins, config)
    save_adapter(tmp_path / "adapter", twins.decoder, "policy", config, twins.base)
    close(twins.logits("policy", FIRST), ask(twins.reload(tmp_path / "adapter"), FIRST))

    again = load_adapter(tmp_path / "adapter", twins.decoder, "again", twins.base)
    assert again.model_copy(update={"targets": targets}) == config and set(again.targets) == set(targets)
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (written["use_rslora"], written["use_dora"]) == (config.rslora, config.dora)
    before, after = (adapter_parameters(twins.decoder, role) for role in ("policy", "again"))
    assert [n.replace("policy", "again") for n in sorted(before)] == sorted(after)
    assert all(torch.equal(p, after[n.replace("policy", "again")]) for n, p in before.items())
    assert torch.equal(twins.logits("policy", FIRST), twins.logits("again", FIRST))


@pytest.mark.parity("adapters", "glm")
def test_glms_gate_and_up_share_one_module_of_theirs(tmp_path: Path) -> None:
    twins = Twins("glm")
    config = AdapterConfig(kind="lora", rank=3, alpha=10, targets=("q", "gate", "up"))
    trained(twins, config)
    save_adapter(tmp_path, twins.decoder, "policy", config, twins.base)
    options = json.loads((tmp_path / "adapter_config.json").read_text())
    assert options["target_modules"] == ["gate_up_proj", "q_proj"] and options["r"] == 3
    assert options["rank_pattern"] == {"gate_up_proj": 6} and options["alpha_pattern"] == {"gate_up_proj": 20}


@pytest.mark.parity("adapters", "glm")
def test_a_fused_adapter_of_peft_goes_through_unchanged(tmp_path: Path) -> None:
    twins = Twins("glm")
    model = twins.wrap(LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=10, target_modules=["gate_up_proj"]))
    config = same_as_peft(twins, model, tmp_path / "theirs")
    save_adapter(tmp_path / "ours", twins.decoder, "policy", config, twins.base)
    options = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert options["r"] == 4 and options["rank_pattern"] == {}
    close(ask(model, FIRST), ask(twins.reload(tmp_path / "ours"), FIRST))
    load_adapter(tmp_path / "ours", twins.decoder, "again", twins.base)
    assert torch.equal(twins.logits("policy", FIRST), twins.logits("again", FIRST))


@pytest.mark.parity("adapters", "glm")
def test_a_fused_adapter_trained_on_with_peft_loses_nothing(tmp_path: Path) -> None:
    """The notes in trueline.json no longer hold when PEFT filled the empty blocks and saved over our folder."""
    twins = Twins("glm")
    config = AdapterConfig(kind="lora", rank=2, alpha=4, targets=("gate", "up"))
    trained(twins, config)
    save_adapter(tmp_path, twins.decoder, "policy", config, twins.base)
    model = twins.reload(tmp_path)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.add_(0.1)
    remove_adapter(twins.decoder, "policy")
    same_as_peft(twins, model, tmp_path)


def test_our_prefix_in_peft_and_back(twins: Twins, tmp_path: Path) -> None:
    config = AdapterConfig(kind="ptuning", tokens=4)
    trained(twins, config)
    save_adapter(tmp_path, twins.decoder, "policy", config, twins.base)
    packed = twins.logits("policy", FIRST, SECOND)
    model = twins.reload(tmp_path)
    close(packed[: len(FIRST)], ask(model, FIRST))
    close(packed[len(FIRST) :], ask(model, SECOND))
    assert load_adapter(tmp_path, twins.decoder, "again", twins.base).tokens == 4
    assert torch.equal(twins.logits("again", FIRST, SECOND), packed)


@pytest.mark.parametrize("config", [AdapterConfig(kind="lora", rank=3, targets=EVERY), AdapterConfig(kind="ptuning", tokens=4)])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_reward_models_adapter(name: str, config: AdapterConfig, tmp_path: Path) -> None:
    twins = Twins(name, scorer=True)
    trained(twins, config)
    score = torch.randn(1, 24).double()
    save_adapter(tmp_path, twins.decoder, "policy", config, twins.base, score=score)
    ours = twins.logits("policy", FIRST)[-1] @ score[0]
    close(ours[None], ask(twins.reload(tmp_path), FIRST))
    assert torch.equal(adapter_score(tmp_path, 24), score)
    load_adapter(tmp_path, twins.decoder, "again", twins.base)
    assert torch.equal(twins.logits("again", FIRST), twins.logits("policy", FIRST))


@pytest.mark.parity("adapters", "qwen2")
@pytest.mark.parametrize("kind", ["lora", "ptuning"])
def test_a_reward_models_adapter_of_peft(kind: str, tmp_path: Path) -> None:
    twins = Twins("qwen2", scorer=True)
    lora = LoraConfig(task_type="SEQ_CLS", r=3, target_modules=["q_proj"])
    model = twins.wrap(lora if kind == "lora" else PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4))
    model.save_pretrained(tmp_path)
    load_adapter(tmp_path, twins.decoder, "policy", twins.base)
    score = adapter_score(tmp_path, 24)
    close((twins.logits("policy", FIRST)[-1] @ score[0])[None], ask(model, FIRST))


@pytest.mark.parity("adapters", "llama")
def test_gradients_of_dora_are_pefts(tmp_path: Path) -> None:
    """In float64, PEFT's constant norm included: a gradient through the norm differs from the first step on."""
    twins = Twins("llama")
    model = twins.wrap(LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=10, target_modules=linears(LLAMA), use_dora=True))
    same_as_peft(twins, model, tmp_path)
    ask_with_gradient = model(input_ids=torch.tensor([FIRST])).logits[0]
    (ask_with_gradient.log_softmax(-1)[:, 7] * torch.arange(7)).mean().backward()
    hidden = twins.decoder(torch.tensor(FIRST), Packed.of([len(FIRST)]), "policy")
    logits = twins.decoder.head(hidden)  # type: ignore[misc]
    (logits.log_softmax(-1)[:, 7] * torch.arange(7)).mean().backward()
    theirs = {name: p.grad for name, p in model.named_parameters() if "lora_" in name}
    assert len(theirs) == 3 * 3 * 7
    for layer in range(3):
        for name in EVERY:
            half = twins.decoder.layers[layer].attention if name in "qkvo" else twins.decoder.layers[layer].mlp
            adapter = half.adapters["policy"][name]
            part = "self_attn" if name in "qkvo" else "mlp"
            path = f"base_model.model.model.layers.{layer}.{part}.{name}_proj.lora_"
            for kind, ours in (("A", adapter.down.weight), ("B", adapter.up.weight), ("magnitude_vector", adapter.magnitude)):
                torch.testing.assert_close(ours.grad, theirs[f"{path}{kind}.default.weight"], rtol=0, atol=1e-6)
                assert ours.grad.abs().max() > 1e-3


@pytest.mark.parity("adapters", "llama")
def test_dora_drops_inputs_as_peft_does(tmp_path: Path) -> None:
    """Dropout acts on the input of the base's part too. All masks are alike here: one linear, the same random state."""
    twins = Twins("llama")
    wanted = {"r": 3, "lora_alpha": 10, "lora_dropout": 0.5, "target_modules": ["model.layers.2.mlp.down_proj"], "use_dora": True}
    model = twins.wrap(LoraConfig(task_type="CAUSAL_LM", **wanted))
    same_as_peft(twins, model, tmp_path)
    linear, adapter = twins.decoder.layers[2].mlp.down, twins.decoder.layers[2].mlp.adapters["policy"]["down"]
    x = torch.randn(5, 20, dtype=torch.float64)
    model.train(), adapter.train()
    torch.manual_seed(1)
    theirs = model.base_model.model.model.layers[2].mlp.down_proj(x)
    torch.manual_seed(1)
    torch.testing.assert_close(adapter(x, linear(x), linear), theirs, rtol=0, atol=1e-9)


# ------------------------------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("dora", [False, True])
def test_merged_is_unmerged(twins: Twins, dora: bool, tmp_path: Path) -> None:
    model = twins.wrap(LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=10, target_modules=linears(twins.family), use_dora=dora))
    same_as_peft(twins, model, tmp_path)
    before = twins.logits("policy", FIRST, SECOND)
    merge_adapter(twins.decoder, "policy")
    torch.testing.assert_close(twins.logits(None, FIRST, SECOND), before, rtol=0, atol=1e-12)
    close(twins.logits(None, FIRST), ask(model.merge_and_unload(), FIRST))


@pytest.mark.parity("adapters", "llama")
def test_a_copied_prefix_saves_the_same(tmp_path: Path) -> None:
    twins = Twins("llama")
    config = AdapterConfig(kind="ptuning", tokens=3)
    trained(twins, config)
    copy_adapter(twins.decoder, "policy", "reference")
    for role in ("policy", "reference"):
        save_adapter(tmp_path / role, twins.decoder, role, config, twins.base)
    one, two = ((tmp_path / role / "adapter_model.safetensors").read_bytes() for role in ("policy", "reference"))
    assert one == two
