"""PEFT's folders on every layout, by arithmetic: merged, each of their matrices is W + scale B A, with DoRA each row at its length."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.recipes.toys import FAMILIES, Toys
from trueline.config.schema import AdapterConfig
from trueline.families.export import export_tensors
from trueline.families.folder import load_decoder, open_folder
from trueline.families.peft import Base, load_adapter, save_adapter
from trueline.families.places import places
from trueline.model.adapters import copy_adapter, merge_adapter


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_is_the_fused_sum(toys: Toys, tmp_path: Path, family: str, options: dict[str, bool]) -> None:
    folder = open_folder(toys.model(family))
    decoder = load_decoder(folder, torch.float64)
    before = dict(export_tensors(decoder, folder.family))
    before = {name: tensor.clone() for name, tensor in before.items()}
    generator = torch.Generator().manual_seed(3)
    tensors, expected = {}, {}
    for path in places(folder.family, folder.decoder_config):
        weight = before[f"{path}.weight"]
        a, b = torch.randn(3, weight.shape[1], generator=generator), torch.randn(weight.shape[0], 3, generator=generator)
        tensors |= {f"base_model.model.{path}.lora_A.weight": a, f"base_model.model.{path}.lora_B.weight": b}
        total = weight + 6 / (3**0.5 if "use_rslora" in options else 3) * b.double() @ a.double()
        if "use_dora" in options:
            length = torch.rand(weight.shape[0], generator=generator) + 0.5
            tensors[f"base_model.model.{path}.lora_magnitude_vector"] = length
            total = length.double()[:, None] * total / total.norm(dim=1, keepdim=True)
        expected[f"{path}.weight"] = total
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    targets = sorted({path.rpartition(".")[2] for path in places(folder.family, folder.decoder_config)})
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": targets, "base_model_name_or_path": "x", **options}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    base = Base(folder.family, "x")
    found = load_adapter(tmp_path, decoder, "policy", base)
    assert (found.rslora, found.dora) == ("use_rslora" in options, "use_dora" in options)
    copy_adapter(decoder, "policy", "again")
    merge_adapter(decoder, "policy")
    after = {name: tensor.clone() for name, tensor in export_tensors_without(decoder, folder.family)}
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, expected.get(name, before[name]), rtol=0, atol=1e-12)

    # written again, it is the adapter that came in, tensor by tensor where nothing was fused and as a product where it was
    same = AdapterConfig(kind="lora", rank=3, alpha=6, rslora=found.rslora, dora=found.dora)
    save_adapter(tmp_path / "out", decoder, "again", same, base)
    fresh = load_decoder(folder, torch.float64)
    load_adapter(tmp_path / "out", fresh, "policy", base)
    merge_adapter(fresh, "policy")
    for name, tensor in export_tensors(fresh, folder.family):
        torch.testing.assert_close(tensor, expected.get(name, before[name]), rtol=0, atol=1e-12)


def export_tensors_without(decoder, family):  # type: ignore[no-untyped-def]
    """The base's tensors although a role still has an adapter."""
    for half in (half for block in decoder.layers for half in (block.attention, block.mlp)):
        half.kept, half.adapters = half.adapters, torch.nn.ModuleDict()
    found = [(name, tensor.clone()) for name, tensor in export_tensors(decoder, family)]
    for half in (half for block in decoder.layers for half in (block.attention, block.mlp)):
        half.adapters = half.kept
        del half.kept
    return found


def test_the_demos_prefix_of_glm4(tmp_path: Path, toys: Toys) -> None:
    """GLM-4's P-tuning demo: num_attention_heads is the number of key/value heads, token_dim their width."""
    folder = open_folder(toys.model("chatglm4"))
    sizes = folder.decoder_config
    width = sizes.num_kv_heads * sizes.head_dim
    table = torch.randn(5, sizes.num_layers * 2 * width, generator=torch.Generator().manual_seed(1))
    save_file({"prompt_embeddings": table}, tmp_path / "adapter_model.safetensors")
    config = {
        "peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "base_model_name_or_path": "THUDM/glm-4-9b-chat", "inference_mode": True,
        "num_virtual_tokens": 5, "num_attention_heads": sizes.num_kv_heads, "token_dim": width, "num_layers": sizes.num_layers,
        "encoder_hidden_size": width, "prefix_projection": False, "num_transformer_submodules": 1, "revision": None,
    }  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    decoder = load_decoder(folder, torch.float32)
    found = load_adapter(tmp_path, decoder, "policy", Base(folder.family, "THUDM/glm-4-9b-chat"))
    assert found.tokens == 5
    keys = table.view(5, sizes.num_layers, 2, sizes.num_kv_heads, sizes.head_dim)[:, :, 0]
    assert torch.equal(decoder.prefixes["policy"].keys, keys.transpose(0, 1))
