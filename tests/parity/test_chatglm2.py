"""GLM-4, ChatGLM2 and ChatGLM3 in their original layout: against what the authors' code returned, a second implementation, and PEFT."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import trueline as api
from tests.parity.cases import ORIGINAL, Made, our_logits
from tests.reference_chatglm2 import Weights, logits_of, loss_of
from trueline.config.schema import AdapterConfig
from trueline.data.sample import Sample
from trueline.families.folder import load_decoder, open_folder
from trueline.families.peft import Base, load_adapter, save_adapter
from trueline.model.adapters import add_adapter, low_ranks, merge_adapter
from trueline.model.batch import pack
from trueline.model.decoder import Decoder

CASES = {"chatglm2": ("chatglm2-6b", ("plain",)), "chatglm4": ("glm-4-9b-chat", ("plain", "leftpad"))}
FUSED = {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}


def golden(shared: Path, folder: Path, name: str) -> dict[str, Tensor]:
    """A folder with the model, its weights named as they were; returns the recorded tensors."""
    with safe_open(shared / "golden" / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    save_file({n.removeprefix("weight::"): t for n, t in tensors.items() if n.startswith("weight::")}, folder / "model.safetensors")
    config = json.loads((shared / "golden" / f"{name}.json").read_text())["config"]
    (folder / "config.json").write_text(json.dumps({"model_type": "chatglm", "_name_or_path": name} | config))
    return {n: t for n, t in tensors.items() if not n.startswith("weight::")}


def oracle(folder: Path) -> tuple[Weights, dict[str, Any]]:
    """A folder as the second implementation takes it."""
    weights = {name: tensor.double().numpy() for name, tensor in load_file(folder / "model.safetensors").items()}
    return weights, json.loads((folder / "config.json").read_text())


def wanted(folder: Path, row: list[int], prefix: Tensor | None = None) -> Tensor:
    return torch.from_numpy(logits_of(*oracle(folder), row, None if prefix is None else prefix.double().numpy()))


@pytest.mark.parity("logits")
@pytest.mark.parametrize("family", CASES)
def test_logits_and_loss_are_the_authors(shared: Path, tmp_path: Path, family: str) -> None:
    """Ours, and the second implementation's, on which the other tests lean."""
    name, cases = CASES[family]
    theirs = golden(shared, tmp_path, name)
    opened = open_folder(tmp_path)
    assert opened.family.name == family
    decoder = load_decoder(opened, torch.float32)
    for case in cases:
        ids, logits = theirs[f"{case}::input_ids"], theirs[f"{case}::logits"]
        kept = theirs.get(f"{case}::attention_mask", torch.ones_like(ids)).bool()
        rows = [row[mask].tolist() for row, mask in zip(ids, kept, strict=True)]
        for row, packed, mask, expected in zip(rows, our_logits(decoder, rows), kept, logits, strict=True):
            for found in (packed, our_logits(decoder, [row])[0], wanted(tmp_path, row).float()):
                torch.testing.assert_close(found, expected[mask], rtol=0, atol=1e-5)
    labels, rows = theirs["plain::labels"], theirs["plain::input_ids"].tolist()
    logprobs = torch.stack(api.load(str(tmp_path), dtype="float32").logprobs(rows))
    trained = (labels >= 0) & (torch.arange(labels.shape[1]) > 0)
    loss = theirs["plain::loss"].flatten()[0]
    torch.testing.assert_close(-logprobs[trained].mean(), loss, rtol=0, atol=1e-5)
    assert loss_of(*oracle(tmp_path), rows, labels.tolist()) == pytest.approx(float(loss), abs=1e-5)


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """What the authors' configuration can say, in small."""
    groups = draw(st.integers(1, 3))
    heads = groups * draw(st.integers(1, 3))
    several = {"multi_query_attention": True, "multi_query_group_num": groups}
    queries = draw(st.sampled_from([{}, {"multi_query_attention": False}, several]))
    name = draw(st.sampled_from(["THUDM/chatglm2-6b", "THUDM/chatglm3-6b", "THUDM/glm-4-9b-chat"]))
    ratio = {} if "chatglm2" in name else draw(st.sampled_from([{}, {"rope_ratio": 1}, {"rope_ratio": 2.5}, {"rope_ratio": 500}]))
    return queries | ratio | {
        "model_type": "chatglm", "_name_or_path": name, "num_layers": draw(st.integers(1, 3)), "num_attention_heads": heads,
        "padded_vocab_size": draw(st.integers(20, 60)), "hidden_size": draw(st.sampled_from([12, 24, 40])),
        "ffn_hidden_size": draw(st.integers(3, 40)), "kv_channels": draw(st.sampled_from([4, 8, 12])),
        "layernorm_epsilon": draw(st.sampled_from([1.5625e-7, 1e-5, 1e-2])), "add_qkv_bias": draw(st.booleans()),
        "add_bias_linear": draw(st.booleans()), "original_rope": True,
    }  # fmt: skip


def random_folder(folder: Path, config: dict[str, Any], seed: int) -> None:
    """Weights in the authors' names and shapes, made from the configuration alone."""
    (folder / "config.json").write_text(json.dumps(config))
    heads, size, hidden = config["num_attention_heads"], config["kv_channels"], config["hidden_size"]
    groups = config.get("multi_query_group_num", heads)
    bias = config["add_bias_linear"]
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.embedding.word_embeddings.weight": (config["padded_vocab_size"], hidden),
        "transformer.encoder.final_layernorm.weight": (hidden,),
        "transformer.output_layer.weight": (config["padded_vocab_size"], hidden),
    }
    for i in range(config["num_layers"]):
        linears = {
            "self_attention.query_key_value": ((heads + 2 * groups) * size, hidden, bias or config["add_qkv_bias"]),
            "self_attention.dense": (hidden, heads * size, bias),
            "mlp.dense_h_to_4h": (2 * config["ffn_hidden_size"], hidden, bias),
            "mlp.dense_4h_to_h": (hidden, config["ffn_hidden_size"], bias),
        }
        for name, (rows, columns, biased) in linears.items():
            shapes[f"transformer.encoder.layers.{i}.{name}.weight"] = (rows, columns)
            if biased:
                shapes[f"transformer.encoder.layers.{i}.{name}.bias"] = (rows,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"transformer.encoder.layers.{i}.{name}.weight"] = (hidden,)
    draw = np.random.default_rng(seed)
    tensors = {name: torch.from_numpy(draw.normal(len(shape) == 1 and "norm" in name, 0.15, shape)) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")


@given(config=configurations(), lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4), seed=st.integers(0, 999))
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parity("logits", "chatglm4")
def test_any_configuration_is_the_second_implementation(tmp_path: Path, config: dict[str, Any], lengths: list[int], seed: int) -> None:
    """Other sizes, biases, ratios and query groups than those recorded: rows packed in one batch, and the loss of labels anywhere."""
    random_folder(tmp_path, config, seed)
    draw = np.random.default_rng(seed)
    rows = [draw.integers(0, config["padded_vocab_size"], n).tolist() for n in lengths]
    decoder = load_decoder(open_folder(tmp_path), torch.float64)
    for row, found in zip(rows, our_logits(decoder, rows), strict=True):
        torch.testing.assert_close(found, wanted(tmp_path, row), rtol=0, atol=1e-6)
    labels = [[token if draw.random() < 0.5 else -100 for token in row] for row in rows]
    logprobs = [logprob for row in api.load(str(tmp_path), dtype="float64").logprobs(rows) for logprob in row.tolist()]
    counted = [token >= 0 and t > 0 for row in labels for t, token in enumerate(row)]
    if any(counted):
        ours = -np.mean([logprob for logprob, counts in zip(logprobs, counted, strict=True) if counts])
        assert ours == pytest.approx(loss_of(*oracle(tmp_path), rows, labels), abs=1e-6, rel=1e-6)


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


def trained(case: Made, config: AdapterConfig) -> tuple[Decoder, Base]:
    """The case's decoder with an adapter of random numbers."""
    folder = open_folder(case.folder)
    decoder = load_decoder(folder, torch.float64)
    add_adapter(decoder, "policy", config, 1)
    draw = torch.Generator().manual_seed(6)
    for name, p in decoder.named_parameters():
        if "adapters" in name or "prefix" in name:
            p.data.copy_(torch.randn(p.shape, generator=draw) * 0.1)
    return decoder, Base(folder.family, str(case.folder), "0" * 64)


@torch.no_grad()
def adapted(decoder: Decoder, row: list[int]) -> Tensor:
    batch = pack([Sample(row, [True] * len(row))])
    assert decoder.head is not None
    return decoder.head(decoder(batch.tokens, batch.layout, "policy"))


@pytest.mark.parity("adapters")
@pytest.mark.parametrize("targets", [("q", "k", "v", "o", "gate", "up", "down"), ("q", "v", "up")])
@pytest.mark.parametrize("name", ORIGINAL)
def test_loras_name_the_fused_modules_and_peft_loads_them(made: Callable[[str], Made], tmp_path: Path, name: str, targets: Any) -> None:
    """Merged by PEFT in its own modules, the second implementation has our logits."""
    case, config = made(name), AdapterConfig(kind="lora", rank=3, alpha=6.0, targets=targets)
    decoder, base = trained(case, config)
    save_adapter(tmp_path, decoder, "policy", config, base)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(written["target_modules"]) == (FUSED if "o" in targets else {"query_key_value", "dense_h_to_4h"})
    plain = {n.removeprefix("base_model.model."): t for n, t in load_file(tmp_path / "adapter_model.safetensors").items()}
    weights, sizes = oracle(case.folder)
    skeleton = Skeleton(load_file(case.folder / "model.safetensors"))
    skeleton = inject_adapter_in_model(LoraConfig.from_pretrained(tmp_path), skeleton)
    assert not set_peft_model_state_dict(skeleton, plain).unexpected_keys
    assert get_peft_model_state_dict(skeleton).keys() == plain.keys()
    skeleton.double()
    for path, module in skeleton.named_modules():
        if hasattr(module, "get_delta_weight"):
            weights[f"{path}.weight"] = (module.base_layer.weight + module.get_delta_weight("default")).detach().numpy()
    row = case.rows()[2]
    ours = adapted(decoder, row)
    torch.testing.assert_close(ours, torch.from_numpy(logits_of(weights, sizes, row)), rtol=0, atol=1e-6)
    assert (ours - our_logits(decoder, [row])[0]).abs().max() > 1e-3
    again = load_decoder(open_folder(case.folder), torch.float64)
    load_adapter(tmp_path, again, "policy", base)
    assert low_ranks(again.layers[0].attention, "policy").keys() >= set(targets) & set("qkv")
    torch.testing.assert_close(adapted(again, row), ours, rtol=0, atol=1e-6)
    merge_adapter(again, "policy")
    torch.testing.assert_close(our_logits(again, [row])[0], ours, rtol=0, atol=1e-6)


@pytest.mark.parity("adapters")
@pytest.mark.parametrize("name", ORIGINAL)
def test_prefixes_are_the_second_implementation_s(made: Callable[[str], Made], tmp_path: Path, name: str) -> None:
    """PEFT's prompt_embeddings as past keys and values, as the authors' demo has them: the tokens' positions stay."""
    case, config = made(name), AdapterConfig(kind="ptuning", tokens=4)
    decoder, base = trained(case, config)
    save_adapter(tmp_path, decoder, "policy", config, base)
    table = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]
    row = case.rows()[2]
    torch.testing.assert_close(adapted(decoder, row), wanted(case.folder, row, table), rtol=0, atol=1e-6)
    again = load_decoder(open_folder(case.folder), torch.float64)
    load_adapter(tmp_path, again, "policy", base)
    assert torch.equal(adapted(again, row), adapted(decoder, row))
