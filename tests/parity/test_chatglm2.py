"""GLM-4, ChatGLM2 and ChatGLM3 in their original layout: against what the authors' code returned, and against transformers' GLM."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GlmConfig, GlmForCausalLM

import trueline as api
from trueline.config.schema import AdapterConfig
from trueline.data.sample import Sample
from trueline.families.export import save_folder
from trueline.families.folder import load_decoder, open_folder
from trueline.families.peft import Base, load_adapter, save_adapter
from trueline.model.adapters import add_adapter, low_ranks, merge_adapter
from trueline.model.batch import pack
from trueline.model.decoder import Decoder
from trueline.model.heads import LanguageModel
from trueline.rollout.engine import Engine
from trueline.rollout.packed import can_pack
from trueline.rollout.sampling import Sampling

CASES = {"glm-4-9b-chat": ("plain", "leftpad"), "chatglm2-6b": ("plain",)}


def golden(shared: Path, folder: Path, name: str) -> dict[str, Tensor]:
    """A folder with the model, its weights named as they were; returns the recorded tensors."""
    with safe_open(shared / "golden" / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    save_file({n.removeprefix("weight::"): t for n, t in tensors.items() if n.startswith("weight::")}, folder / "model.safetensors")
    config = json.loads((shared / "golden" / f"{name}.json").read_text())["config"]
    (folder / "config.json").write_text(json.dumps({"model_type": "chatglm", "_name_or_path": name} | config))
    return {n: t for n, t in tensors.items() if not n.startswith("weight::")}


def logits_of(decoder: Decoder, row: list[int]) -> Tensor:
    batch = pack([Sample(row, [True] * len(row))])
    with torch.no_grad():
        found: Tensor = decoder.head(decoder(batch.tokens, batch.layout))  # type: ignore[misc]
    return found


@pytest.mark.parametrize("name", CASES)
def test_logits_and_loss_are_the_authors(shared: Path, tmp_path: Path, name: str) -> None:
    theirs = golden(shared, tmp_path, name)
    opened = open_folder(tmp_path)
    assert opened.family.name == {"glm-4-9b-chat": "chatglm4", "chatglm2-6b": "chatglm2"}[name]
    decoder = load_decoder(opened, torch.float32)
    for case in CASES[name]:
        ids, wanted = theirs[f"{case}::input_ids"], theirs[f"{case}::logits"]
        kept = theirs.get(f"{case}::attention_mask", torch.ones_like(ids)).bool()
        for row, mask, expected in zip(ids, kept, wanted, strict=True):
            torch.testing.assert_close(logits_of(decoder, row[mask].tolist()), expected[mask], rtol=0, atol=1e-5)
    labels = theirs["plain::labels"]
    logprobs = torch.stack(api.load(str(tmp_path), dtype="float32").logprobs(theirs["plain::input_ids"].tolist()))
    trained = (labels >= 0) & (torch.arange(labels.shape[1]) > 0)
    torch.testing.assert_close(-logprobs[trained].mean(), theirs["plain::loss"].flatten()[0], rtol=0, atol=1e-5)
    save_folder(tmp_path / "out", decoder, opened)
    before, after = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    before = {key: tensor for key, tensor in before.items() if not key.endswith("inv_freq")}
    assert before.keys() == after.keys() and all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    again = open_folder(tmp_path / "out")
    assert again.family.name == opened.family.name and again.config["model_type"] == "chatglm"


def original(path: Path, heads: int, groups: int, ratio: float, by_head: bool = False) -> Any:
    """transformers' GLM with random weights, and the same weights in a folder of the original layout."""
    torch.manual_seed(heads)
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "vocab_size": 96, "head_dim": 12, "rms_norm_eps": 1e-4}
    rope = {"rope_type": "default", "rope_theta": 1e4 * ratio, "partial_rotary_factor": 0.5}
    config = GlmConfig(
        **sizes, num_attention_heads=heads, num_key_value_heads=groups, rope_parameters=rope, attention_bias=True, pad_token_id=0,
        eos_token_id=[95],
    )  # fmt: skip
    theirs = GlmForCausalLM(config).double().eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.copy_(torch.randn(p.shape, dtype=torch.float64) * 0.1 + ("norm" in name))
    held = theirs.state_dict()
    tensors = {
        "transformer.embedding.word_embeddings.weight": held["model.embed_tokens.weight"],
        "transformer.rotary_pos_emb.inv_freq": torch.ones(6),
        "transformer.encoder.final_layernorm.weight": held["model.norm.weight"],
        "transformer.output_layer.weight": held["lm_head.weight"],
    }
    for i in range(2):
        layer, to = f"model.layers.{i}.", f"transformer.encoder.layers.{i}."
        for kind in ("weight", "bias"):
            parts = [held[f"{layer}self_attn.{name}_proj.{kind}"] for name in "qkv"]
            if by_head:
                parts = [torch.stack([part.unflatten(0, (heads, 12)) for part in parts], 1).flatten(0, 2)]
            tensors[f"{to}self_attention.query_key_value.{kind}"] = torch.cat(parts)
        tensors[f"{to}self_attention.dense.weight"] = held[f"{layer}self_attn.o_proj.weight"]
        tensors[f"{to}mlp.dense_h_to_4h.weight"] = held[f"{layer}mlp.gate_up_proj.weight"]
        tensors[f"{to}mlp.dense_4h_to_h.weight"] = held[f"{layer}mlp.down_proj.weight"]
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{to}{name}.weight"] = held[f"{layer}{name}.weight"]
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path / "model.safetensors")
    queries = {} if by_head else {"multi_query_attention": True, "multi_query_group_num": groups}
    described = {
        "model_type": "chatglm", "_name_or_path": "glm-4", "num_layers": 2, "padded_vocab_size": 96, "hidden_size": 48,
        "ffn_hidden_size": 80, "kv_channels": 12, "num_attention_heads": heads, "layernorm_epsilon": 1e-4, "add_qkv_bias": True,
        "rope_ratio": ratio, "original_rope": True, "eos_token_id": [95], "pad_token_id": 0,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(described | queries))
    return theirs


SHAPES = {"one_group": (4, 1, 500), "two_groups": (4, 2, 1), "own_keys": (4, 4, 50), "by_head": (4, 4, 2.5, True)}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_original_layout_is_transformers_glm(tmp_path: Path, shape: str) -> None:
    theirs = original(tmp_path, *SHAPES[shape])
    folder = open_folder(tmp_path)
    decoder = load_decoder(folder, torch.float64)
    row = torch.randint(1, 96, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    out = theirs(torch.tensor([row]), labels=torch.tensor([row]))
    torch.testing.assert_close(logits_of(decoder, row), out.logits[0].detach(), rtol=0, atol=1e-6)
    out.loss.backward()
    batch = pack([Sample(row, [True] * len(row))])
    loss = -LanguageModel(decoder)(batch).sum() / batch.trained.sum()
    loss.backward()
    torch.testing.assert_close(loss, out.loss.detach().to(loss.dtype), rtol=0, atol=1e-6)
    for i, layer in enumerate(theirs.model.layers):
        for name in "qkvo":
            wanted = getattr(layer.self_attn, f"{name}_proj").weight.grad
            torch.testing.assert_close(getattr(decoder.layers[i].attention, name).weight.grad, wanted, rtol=0, atol=1e-6)
    single = load_decoder(folder, torch.float32)
    torch.testing.assert_close(logits_of(single, row), out.logits[0].detach().float(), rtol=0, atol=2e-5)
    assert can_pack(single)
    generated = theirs.generate(torch.tensor([row[:9]]), max_new_tokens=20, do_sample=False, eos_token_id=95)[0, 9:].tolist()
    for each in (decoder, single):
        engine = Engine(LanguageModel(each))
        with engine.hold():
            (answer,) = engine.generate([row[:9]], Sampling(20, temperature=0, stop=frozenset({95})), [0])
        assert answer.tokens == generated
    save_folder(tmp_path / "out", decoder, folder)
    before, after = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items() if not key.endswith("inv_freq"))
    assert open_folder(tmp_path / "out").decoder_config == folder.decoder_config


def test_a_reward_model_of_the_original_layout_scores_as_it_did(tmp_path: Path) -> None:
    original(tmp_path, 4, 2, 500)
    folder = open_folder(tmp_path)
    trunk = load_decoder(folder, torch.float64, with_head=False)
    score = torch.randn(1, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    save_folder(tmp_path / "out", trunk, folder, score=score)
    batch = pack([Sample([5, 6, 7], [False] * 3)])
    wanted = (trunk(batch.tokens, batch.layout) @ score.T)[-1].item()
    assert api.load(str(tmp_path / "out"), dtype="float64").score([[5, 6, 7]]) == [pytest.approx(wanted, abs=1e-9)]
    assert not any("output_layer" in key for key in load_file(tmp_path / "out" / "model.safetensors"))


class Skeleton(nn.Module):
    """Linears of a decoder under the published names: all that PEFT looks at."""

    def __init__(self, tensors: dict[str, Tensor]):
        super().__init__()
        for name, tensor in tensors.items():
            if not name.endswith(".weight") or "norm" in name or "embed" in name:
                continue
            *path, last = name.removesuffix(".weight").split(".")
            module: nn.Module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            linear = nn.Linear(tensor.shape[1], tensor.shape[0]).double()
            linear.weight.data.copy_(tensor)
            module.add_module(last, linear)


@pytest.mark.parametrize("targets", [("q", "k", "v", "o", "gate", "up", "down"), ("q", "v", "up")])
def test_adapters_name_the_fused_modules_and_peft_loads_them(tmp_path: Path, targets: Any) -> None:
    original(tmp_path, 4, 2, 500)
    folder = open_folder(tmp_path)
    decoder = load_decoder(folder, torch.float64)
    config = AdapterConfig(kind="lora", rank=3, alpha=6.0, targets=targets)
    add_adapter(decoder, "policy", config, 1)
    for name, p in decoder.named_parameters():
        if ".adapters." in name:
            p.data.copy_(torch.randn(p.shape).double() * 0.3)
    save_adapter(tmp_path / "adapter", decoder, "policy", config, Base(folder.family, str(tmp_path), "0" * 64))
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    fused = {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    assert set(settings["target_modules"]) == (fused if "o" in targets else {"query_key_value", "dense_h_to_4h"})
    plain = {n.removeprefix("base_model.model."): t for n, t in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items()}
    skeleton = Skeleton(load_file(tmp_path / "model.safetensors"))
    skeleton = inject_adapter_in_model(LoraConfig.from_pretrained(tmp_path / "adapter"), skeleton)
    assert not set_peft_model_state_dict(skeleton, plain).unexpected_keys
    assert get_peft_model_state_dict(skeleton).keys() == plain.keys()
    again = load_decoder(folder, torch.float64)
    load_adapter(tmp_path / "adapter", again, "found", Base(folder.family, str(tmp_path), "0" * 64))
    merge_adapter(decoder, "policy")
    for i in range(2):
        theirs = skeleton.get_submodule(f"transformer.encoder.layers.{i}.self_attention.query_key_value")
        wanted = theirs.base_layer.weight + theirs.get_delta_weight("default")
        ours = torch.cat([getattr(decoder.layers[i].attention, name).weight for name in "qkv"])
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-6)
        assert low_ranks(again.layers[i].attention, "found").keys() >= set(targets) & set("qkv")
    merge_adapter(again, "found")
    row = [5, 6, 7, 8]
    torch.testing.assert_close(logits_of(again, row), logits_of(decoder, row), rtol=0, atol=1e-6)
