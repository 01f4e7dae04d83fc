import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trueline.config.schema import AdapterConfig
from trueline.errors import RunError, UserError
from trueline.families.glm4 import GLM4
from trueline.families.peft import Base, adapter_base, adapter_score, is_adapter, load_adapter, save_adapter
from trueline.families.qwen2 import QWEN2
from trueline.model.adapters import adapter_parameters, add_adapter, has_adapter
from trueline.model.decoder import Decoder, DecoderConfig, init_weights

SIZES = DecoderConfig(vocab_size=11, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp_size=12)
LORA = AdapterConfig(kind="lora", rank=2, alpha=4.0, dropout=0.1, targets=("q", "v", "down"))
PTUNING = AdapterConfig(kind="ptuning", tokens=3)
BASE = Base(QWEN2, "models/base", "a" * 64)
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def make(sizes: DecoderConfig = SIZES, dtype: torch.dtype = torch.float32) -> Decoder:
    decoder = Decoder(sizes)
    init_weights(decoder, torch.Generator().manual_seed(0))
    return decoder.to(dtype)


def saved(folder: Path, config: AdapterConfig = LORA, base: Base = BASE, **options: Any) -> Path:
    decoder = make()
    add_adapter(decoder, "policy", config, 1)
    for parameter in adapter_parameters(decoder, "policy").values():
        parameter.data.add_(0.5)
    save_adapter(folder, decoder, "policy", config, base, **options)
    return folder


def change(folder: Path, **options: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))


def change_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def refused(folder: Path, *words: str, decoder: Decoder | None = None, base: Base = BASE) -> None:
    """One sentence with these words in it, and the decoder is as it was."""
    decoder = decoder or make()
    with pytest.raises(UserError) as caught:
        load_adapter(folder, decoder, "policy", base)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert str(folder) in message
    assert not has_adapter(decoder, "policy")


def test_the_files_and_what_they_say(tmp_path: Path) -> None:
    folder = saved(tmp_path / "out")
    assert sorted(f.name for f in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "trueline.json"]
    options = json.loads((folder / "adapter_config.json").read_text())
    assert options["peft_type"] == "LORA" and options["task_type"] == "CAUSAL_LM" and options["inference_mode"] is True
    assert options["r"] == 2 and options["lora_alpha"] == 4.0 and options["lora_dropout"] == 0.1 and options["bias"] == "none"
    assert options["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 12 and tensors[f"{Q0}.lora_A.weight"].shape == (2, 16) and tensors[f"{Q0}.lora_B.weight"].shape == (16, 2)
    base = {"path": "models/base", "relative": None, "fingerprint": "a" * 64, "template": "auto"}
    assert json.loads((folder / "trueline.json").read_text())["base"] == base
    assert is_adapter(folder) and not is_adapter(tmp_path)
    assert adapter_base(folder) == ("models/base", "a" * 64)
    assert adapter_score(folder, 16) is None
    assert list(tmp_path.iterdir()) == [folder]


def test_a_prefix_folder_names_key_value_heads(tmp_path: Path) -> None:
    folder = saved(tmp_path / "out", PTUNING)
    options = json.loads((folder / "adapter_config.json").read_text())
    wanted = {"num_virtual_tokens": 3, "num_layers": 2, "num_attention_heads": 2, "token_dim": 8, "num_transformer_submodules": 1}
    assert options.items() >= (wanted | {"peft_type": "PREFIX_TUNING", "prefix_projection": False}).items()
    assert load_file(folder / "adapter_model.safetensors")["prompt_embeddings"].shape == (3, 2 * 2 * 2 * 4)


@pytest.mark.parametrize("config", [LORA, PTUNING])
def test_a_bfloat16_adapter_comes_back_bit_for_bit(config: AdapterConfig, tmp_path: Path) -> None:
    decoder = make(dtype=torch.bfloat16)
    add_adapter(decoder, "policy", config, 1)
    save_adapter(tmp_path / "out", decoder, "policy", config, BASE)
    load_adapter(tmp_path / "out", decoder, "again", BASE)
    again = list(adapter_parameters(decoder, "again").values())
    for one, two in zip(adapter_parameters(decoder, "policy").values(), again, strict=True):
        assert one.dtype == two.dtype == torch.bfloat16 and torch.equal(one, two)


def test_the_score_head_travels_along(tmp_path: Path) -> None:
    for config in (LORA, PTUNING):
        score = torch.arange(16.0)[None]
        folder = saved(tmp_path / config.kind, config, score=score)
        options = json.loads((folder / "adapter_config.json").read_text())
        assert options["task_type"] == "SEQ_CLS" and options["modules_to_save"] == ["score"]
        assert torch.equal(adapter_score(folder, 16), score)  # type: ignore[arg-type]
        assert load_adapter(folder, make(), "policy", BASE).kind == config.kind
        with pytest.raises(UserError, match=r"score head has shape \[1, 16\], expected \[1, 20\]"):
            adapter_score(folder, 20)


def test_an_adapter_without_a_fingerprint_is_judged_by_its_shapes(tmp_path: Path) -> None:
    folder = saved(tmp_path / "out")
    (folder / "trueline.json").unlink()
    assert adapter_base(folder) == ("models/base", None)
    assert load_adapter(folder, make(), "policy", BASE).targets == ("q", "v", "down")


# ----------------------------------------------------------------------------------------------------------------- another base


def test_the_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "out")
    refused(folder, "models/base", "aaaaaaaaaaaa", "models/other", "bbbbbbbbbbbb", base=Base(QWEN2, "models/other", "b" * 64))


@pytest.mark.parametrize("config", [LORA, PTUNING])
def test_a_base_of_other_sizes_is_refused(config: AdapterConfig, tmp_path: Path) -> None:
    folder = saved(tmp_path / "out", config)
    bare = Base(QWEN2, "models/other")
    wider = DecoderConfig(vocab_size=11, hidden_size=20, num_layers=2, num_heads=5, num_kv_heads=5, head_dim=4, mlp_size=12)
    shorter = DecoderConfig(vocab_size=11, hidden_size=16, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=4, mlp_size=12)
    longer = DecoderConfig(vocab_size=11, hidden_size=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4, mlp_size=12)
    refused(folder, "does not fit models/other", decoder=make(wider), base=bare)
    refused(folder, "does not fit models/other", decoder=make(shorter), base=bare)
    word = "does not fit" if config.kind == "ptuning" else "model.layers.2.mlp.down_proj.lora_A.weight' is missing"
    refused(folder, word, decoder=make(longer), base=bare)


def test_a_base_of_another_family_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "out", LORA.model_copy(update={"targets": ("gate", "up")}))
    refused(folder, "another kind of model", '"gate_proj"', "models/glm (glm)", base=Base(GLM4, "models/glm"))


# ---------------------------------------------------------------------------------------------------------------- damaged files


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "out")
    change_tensors(folder, lambda t: t.pop(f"{Q0}.lora_B.weight"))
    refused(folder, f"{Q0}.lora_B.weight' is missing")


def test_an_extra_tensor_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "out")
    change_tensors(folder, lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.ones(2, 2)}))
    refused(folder, "base_model.model.model.embed_tokens.weight' has no place there")


def test_a_tensor_that_no_target_names_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "out")
    change(folder, target_modules=["q_proj", "v_proj"])
    refused(folder, "layers.0.mlp.down_proj.lora_A.weight' has no place there", "3 others")


def test_a_missing_layer_is_seen_even_with_a_pattern_for_targets(tmp_path: Path) -> None:
    folder = saved(tmp_path / "out")
    change(folder, target_modules=r".*\.(q_proj|v_proj|down_proj)")
    assert load_adapter(folder, make(), "policy", BASE).targets == ("q", "v", "down")
    change_tensors(folder, lambda t: [t.pop(f"{Q0}.lora_{half}.weight") for half in "AB"])
    refused(folder, f"{Q0}.lora_A.weight' is missing, and 1 more")


def test_a_wrong_prefix_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "out", PTUNING)
    change(folder, num_virtual_tokens=4)
    refused(folder, "prompt_embeddings has shape [3, 32]", "expected [4, 32]")
    change(folder, num_virtual_tokens=3, num_attention_heads=4)
    refused(folder, "4 key/value heads")
    change_tensors(folder, lambda t: t.update({"more": torch.ones(1)}))
    refused(folder, "expected the one tensor 'prompt_embeddings'", "more")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_file_cut_short_is_refused(keep: int, tmp_path: Path) -> None:
    folder = saved(tmp_path / "out")
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(folder, "damaged or cut short")
    with pytest.raises(UserError, match="damaged or cut short"):
        adapter_score(folder, 16)


def test_missing_and_pickled_files(tmp_path: Path) -> None:
    folder = saved(tmp_path / "out")
    (folder / "adapter_model.safetensors").unlink()
    refused(folder, "adapter_model.safetensors: not found")
    (folder / "adapter_model.bin").write_bytes(b"anything")
    refused(folder, "pickle, which is never read")
    (folder / "adapter_config.json").unlink()
    refused(folder, "adapter_config.json: not found")


def test_integer_tensors_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "out")
    change_tensors(folder, lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(2, 16, dtype=torch.int64)}))
    refused(folder, f"{Q0}.lora_A.weight' has dtype torch.int64")


@pytest.mark.parametrize("text", ["{", "[1]", "\x00"])
def test_unreadable_json_is_refused(text: str, tmp_path: Path) -> None:
    for name in ("adapter_config.json", "trueline.json"):
        folder = saved(tmp_path / name.partition(".")[0] / "out")
        (folder / name).write_text(text)
        refused(folder, name, "JSON")


def test_an_adapter_that_names_no_base_says_so(tmp_path: Path) -> None:
    folder = saved(tmp_path / "out")
    change(folder, base_model_name_or_path=None)
    with pytest.raises(UserError, match="base_model_name_or_path is empty"):
        adapter_base(folder)


# ---------------------------------------------------------------------------------------------------------------------- options

UNSUPPORTED: dict[str, Any] = {
    "lora_bias": True,
    "bias": "all",
    "modules_to_save": ["lm_head"],
    "init_lora_weights": "pissa_niter_4",
    "layer_replication": [[0, 2]],
    "trainable_token_indices": [3],
    "target_parameters": ["mlp.experts"],
    "fan_in_fan_out": True,
    "alora_invocation_tokens": [1, 2],
    "an_option_of_tomorrow": {"x": 1},
    "peft_type": "LOHA",
    "r": 2.5,
    "lora_alpha": "8",
    "lora_dropout": 1.0,
    "layers_to_transform": "all",
    "rank_pattern": [1],
    "alpha_pattern": {r".*q_proj": 3},
}


@pytest.mark.parametrize("key", list(UNSUPPORTED))
def test_an_option_that_would_change_the_result_is_named(key: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "out")
    change(folder, **{key: UNSUPPORTED[key]})
    refused(folder, "adapter_config.json", key)


def test_a_rank_that_is_not_the_tensors_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "out")
    change(folder, r=3)
    refused(folder, "lora_A [2, 16] and lora_B [16, 2], expected [3, 16] and [16, 3]")


def test_options_that_say_nothing_about_the_weights_are_ignored(tmp_path: Path) -> None:
    folder = saved(tmp_path / "out")
    change(
        folder, megatron_core="megatron.core", revision="main", peft_version="9.9", qalora_group_size=16, loftq_config={}, use_dora=False
    )
    assert load_adapter(folder, make(), "policy", BASE) == LORA


# ---------------------------------------------------------------------------------------------------------------------- writing


def test_saving_again_replaces_the_folder(tmp_path: Path) -> None:
    folder = saved(tmp_path / "out")
    (folder / "left-over").write_text("")
    saved(folder, PTUNING)
    assert load_adapter(folder, make(), "policy", BASE).kind == "ptuning"
    assert list(tmp_path.iterdir()) == [folder] and not (folder / "left-over").exists()


def test_other_files_go_along(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    folder = saved(tmp_path / "out", files={"tokenizer.json": tmp_path / "tokenizer.json"})
    assert (folder / "tokenizer.json").read_text() == "{}"


def test_somebody_elses_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("everything")
    with pytest.raises(UserError, match="holds no adapter"):
        saved(tmp_path / "out")
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_a_failed_write_leaves_the_old_adapter(tmp_path: Path) -> None:
    folder = saved(tmp_path / "out")
    before = (folder / "adapter_model.safetensors").read_bytes()
    with pytest.raises(RunError, match="could not be written"):
        saved(folder, PTUNING, files={"tokenizer.json": tmp_path / "not there"})
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    assert list(tmp_path.iterdir()) == [folder]


def test_values_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    decoder = make()
    add_adapter(decoder, "policy", LORA, 1)
    decoder.layers[1].mlp.adapters["policy"]["down"].up.weight.data[0, 0] = float("nan")
    with pytest.raises(RunError, match="layers.1.mlp.down_proj.lora_B.weight' holds values that are not finite"):
        save_adapter(tmp_path / "out", decoder, "policy", LORA, BASE)
    assert not list(tmp_path.iterdir())


def test_a_role_without_an_adapter_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'policy' has no adapter"):
        save_adapter(tmp_path / "out", make(), "policy", LORA, BASE)
