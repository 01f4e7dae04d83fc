import json
import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file

from trueline.config.schema import AdapterConfig
from trueline.errors import RunError, UserError
from trueline.families.export import export_tensors, save_folder
from trueline.families.folder import load_decoder, open_folder, random_decoder
from trueline.families.table import CHATGLMS, FAMILIES
from trueline.model.adapters import add_adapter

CONTROL = ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")


@pytest.fixture
def made(model_folder):
    def make(kind="glm", **sizes):
        folder = open_folder(model_folder(kind, **sizes))
        return folder, random_decoder(folder, torch.float32, seed=1)

    return make


@pytest.fixture
def tokenizer(letters, tmp_path):
    """With two files to copy."""

    def make(*specials, **config):
        place = tmp_path / "tokenizer"
        place.mkdir(exist_ok=True)
        (place / "tokenizer.json").write_text("{}")
        (place / "tokenizer_config.json").write_text(json.dumps(config))
        return letters(*specials, files={path.name: path for path in place.iterdir()}, config=config)

    return make


def test_fused_weights_are_joined_and_a_tied_head_left_out(made):
    folder, decoder = made(tie_word_embeddings=True)
    found = dict(export_tensors(decoder, folder.family))
    mlp = decoder.layers[1].mlp
    assert torch.equal(found["model.layers.1.mlp.gate_up_proj.weight"], torch.cat((mlp.gate.weight, mlp.up.weight)))
    assert "lm_head.weight" not in found
    assert sum(t.numel() for t in found.values()) == sum(p.numel() for p in decoder.parameters())
    assert list(found)[0] == "model.embed_tokens.weight" and list(found)[-1] == "model.norm.weight"


def test_a_classifier_has_a_score_and_no_head(made):
    folder, decoder = made()
    names = [name for name, _ in export_tensors(decoder, folder.family, torch.ones(1, 16))]
    assert "score.weight" in names and "lm_head.weight" not in names


@pytest.mark.parametrize("kind", ["lora", "ptuning"])
def test_adapters_are_not_left_out_without_a_word(made, kind):
    folder, decoder = made()
    add_adapter(decoder, "policy", AdapterConfig(kind=kind, tokens=2), seed=0)
    with pytest.raises(ValueError, match="merge or remove"):
        list(export_tensors(decoder, folder.family))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_not_saved(made, tmp_path, value):
    folder, decoder = made()
    with torch.no_grad():
        decoder.layers[0].mlp.up.weight[0, 0] = value
    with pytest.raises(RunError, match=r"model.layers.0.mlp.gate_up_proj.weight"):
        save_folder(tmp_path / "out", decoder, folder)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_config_and_generation_config(made, tokenizer, tmp_path):
    folder, decoder = made(torch_dtype="bfloat16", auto_map={"AutoModel": "x.Y"}, _name_or_path="secret", kept=7)
    save_folder(tmp_path / "out", decoder.double(), folder, tokenizer(*CONTROL))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["GlmForCausalLM"] and config["torch_dtype"] == "float64" and config["kept"] == 7
    assert not {"auto_map", "_name_or_path", "pad_token_id"} & set(config)
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [2_000_000, 2_000_004, 2_000_006]}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_a_newer_configs_dtype_key_is_kept(made, tmp_path):
    folder, decoder = made(dtype="bfloat16")
    save_folder(tmp_path / "out", decoder, folder)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "float32" and "torch_dtype" not in config


def test_a_reward_models_config(made, tokenizer, tmp_path):
    folder, decoder = made(pad_token_id=2_000_000)
    save_folder(tmp_path / "out", decoder, folder, tokenizer(*CONTROL, pad_token="<|endoftext|>"), score=torch.ones(1, 16))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["GlmForSequenceClassification"]
    assert config["id2label"] == {"0": "LABEL_0"} and config["pad_token_id"] == 2_000_000
    assert not (tmp_path / "out" / "generation_config.json").exists()


def test_a_reward_model_is_not_padded_with_the_token_that_ends_an_answer(made, tokenizer, tmp_path):
    """transformers scores the last token that is no pad: with </s> as both, the score would be that of the token before."""
    folder, decoder = made("llama", pad_token_id=2_000_001)
    save_folder(tmp_path / "out", decoder, folder, tokenizer("<s>", "</s>", pad_token="</s>", other=1), score=torch.ones(1, 16))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] == 2_000_000
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == {"pad_token": "<s>", "other": 1}


def test_shards(made, tmp_path):
    folder, decoder = made()
    save_folder(tmp_path / "out", decoder, folder, shard_bytes=3000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in decoder.parameters())
    assert len(set(index["weight_map"].values())) > 2
    back = load_decoder(open_folder(tmp_path / "out"), torch.float32)
    assert all(torch.equal(p, decoder.get_parameter(name)) for name, p in back.named_parameters())


def test_a_folder_that_is_there_is_only_replaced_on_request(made, tmp_path):
    folder, decoder = made()
    out = tmp_path / "out"
    out.mkdir()
    save_folder(out, decoder, folder)  # an empty one is as good as none
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="already there"):
        save_folder(out, decoder, folder)
    assert (out / "notes.txt").read_text() == "mine"
    save_folder(out, decoder, folder, replace=True)
    assert not (out / "notes.txt").exists() and open_folder(out)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]


def test_a_folder_may_replace_the_one_it_was_read_from(made, tokenizer, tmp_path):
    folder, decoder = made()
    save_folder(tmp_path / "out", decoder, folder, tokenizer(*CONTROL))
    again = open_folder(tmp_path / "out")
    save_folder(tmp_path / "out", load_decoder(again, torch.float32), again, replace=True)
    assert open_folder(tmp_path / "out").generation == again.generation


def test_a_disk_that_cannot_be_written_leaves_nothing(made, tokenizer, tmp_path):
    folder, decoder = made()
    broken = tokenizer(*CONTROL)
    shutil.rmtree(tmp_path / "tokenizer")
    with pytest.raises(RunError, match="could not be written .*nothing was left there"):
        save_folder(tmp_path / "out", decoder, folder, broken)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="could not be written"):
        save_folder(tmp_path / "file" / "out", decoder, folder)


def test_a_full_disk_leaves_what_was_there(made, tmp_path):
    """A limit on the size of files stands for the disk: the weights do not fit, config.json does."""
    folder, decoder = made()
    save_folder(tmp_path / "out", decoder, folder)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(RunError, match="could not be written"):
            save_folder(tmp_path / "out", decoder, folder, replace=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out"]


def test_a_trunk_alone_is_not_a_language_model(made, tmp_path):
    folder, _ = made()
    trunk = random_decoder(folder, torch.float32, 1, with_head=False)
    with pytest.raises(ValueError, match="score head"):
        save_folder(tmp_path / "out", trunk, folder)


@pytest.mark.parametrize("kind", [name for name in FAMILIES if name not in CHATGLMS])
def test_every_tensor_is_written_once_whatever_the_family(made, tmp_path, kind):
    folder, decoder = made(kind)
    save_folder(tmp_path / "out", decoder, folder)
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(t.numel() for t in held.values()) == sum(p.numel() for p in decoder.parameters())
