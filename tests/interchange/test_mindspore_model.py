"""MindFormers models both ways, through the command line: names, shards, replicas, what is left out and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import trueline as api
from tests.recipes.commands import Commands
from tests.recipes.toys import Toys
from trueline.interchange.mindspore_checkpoint import read_checkpoint, write_checkpoint, write_tensor

FAMILIES = ("qwen2", "glm", "llama", "chatglm2", "chatglm3")
PROBE = [[5, 6, 7, 250, 9], [1, 2, 3]]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)


def ckpt(path: Path) -> dict[str, torch.Tensor]:
    return {name: stored.read() for name, stored in read_checkpoint(path).items()}


@pytest.fixture
def model(toys: Toys, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return shutil.copytree(toys.model(request.param), tmp_path / "hf")


@pytest.mark.parametrize("model", FAMILIES, indirect=True)
def test_there_and_back(model: Path, trueline: Commands, tmp_path: Path) -> None:
    trueline("convert", model, tmp_path / "one.ckpt").ok()
    said = trueline("convert", tmp_path / "one.ckpt", tmp_path / "back", "--model", model).ok()
    assert "float32" in said.out
    assert same(weights(model), weights(tmp_path / "back"))
    before, after = (api.load(str(path)).logprobs(PROBE) for path in (model, tmp_path / "back"))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert api.load(str(tmp_path / "back")).render([{"role": "user", "content": "red"}])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("model", ["qwen2"], indirect=True)
def test_dtypes_stay(model: Path, dtype: torch.dtype, trueline: Commands, tmp_path: Path) -> None:
    save_file({name: tensor.to(dtype) for name, tensor in weights(model).items()}, model / "model.safetensors")
    trueline("convert", model, tmp_path / "one.ckpt").ok()
    trueline("convert", tmp_path / "one.ckpt", tmp_path / "back", "--model", model).ok()
    assert same(weights(model), weights(tmp_path / "back"))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == str(dtype)[6:]


@pytest.mark.parametrize(
    ("tensor", "data"), [(1, 1), (4, 1), (2, 2), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((2, 1), (1, 3)))]
)
@pytest.mark.parametrize("model", ["qwen2", "glm"], indirect=True)
def test_shards_and_copies(model: Path, tensor: int, data: int, trueline: Commands, tmp_path: Path) -> None:
    trueline("convert", model, tmp_path / "ranks", "--tensor-parallel", tensor, "--data-parallel", data).ok()
    files = [tmp_path / "ranks" / f"rank_{rank}" / f"checkpoint_{rank}.ckpt" for rank in range(tensor * data)]
    assert sorted(path for path in (tmp_path / "ranks").rglob("*.ckpt")) == sorted(files)
    for rank in range(tensor, tensor * data):
        assert files[rank].read_bytes() == files[rank % tensor].read_bytes()
    trueline("convert", tmp_path / "ranks", tmp_path / "back", "--model", model).ok()
    assert same(weights(model), weights(tmp_path / "back"))


@pytest.mark.parametrize("model", ["qwen2"], indirect=True)
def test_names_and_cuts_are_mindformers(model: Path, trueline: Commands, tmp_path: Path) -> None:
    """Rank 1 of 2, by hand: rows of what opens a block, columns of what closes it, norms whole."""
    trueline("convert", model, tmp_path / "ranks", "--tensor-parallel", 2).ok()
    theirs, ours = ckpt(tmp_path / "ranks" / "rank_1" / "checkpoint_1.ckpt"), weights(model)
    before = "model.layers.1"
    assert torch.equal(theirs["model.tok_embeddings.embedding_weight"], ours["model.embed_tokens.weight"][160:])
    assert torch.equal(theirs[f"{before}.attention.wq.weight"], ours[f"{before}.self_attn.q_proj.weight"][16:])
    assert torch.equal(theirs[f"{before}.attention.wk.bias"], ours[f"{before}.self_attn.k_proj.bias"][8:])
    assert torch.equal(theirs[f"{before}.attention.wo.weight"], ours[f"{before}.self_attn.o_proj.weight"][:, 16:])
    assert torch.equal(theirs[f"{before}.feed_forward.w1.weight"], ours[f"{before}.mlp.gate_proj.weight"][24:])
    assert torch.equal(theirs[f"{before}.feed_forward.w3.weight"], ours[f"{before}.mlp.up_proj.weight"][24:])
    assert torch.equal(theirs[f"{before}.feed_forward.w2.weight"], ours[f"{before}.mlp.down_proj.weight"][:, 24:])
    assert torch.equal(theirs[f"{before}.ffn_norm.weight"], ours[f"{before}.post_attention_layernorm.weight"])
    assert torch.equal(theirs["model.norm_out.weight"], ours["model.norm.weight"])
    assert torch.equal(theirs["lm_head.weight"], ours["lm_head.weight"][160:])


@pytest.mark.parametrize("model", ["glm"], indirect=True)
def test_glm_is_fused(model: Path, trueline: Commands, tmp_path: Path) -> None:
    trueline("convert", model, tmp_path / "one.ckpt").ok()
    theirs, ours = ckpt(tmp_path / "one.ckpt"), weights(model)
    parts = [ours[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(theirs["transformer.encoder.layers.0.self_attention.query_key_value.weight"], torch.cat(parts))
    gate_up = ours["model.layers.0.mlp.gate_up_proj.weight"]
    assert torch.equal(theirs["transformer.encoder.layers.0.mlp.dense_h_to_4h.weight"], gate_up)


def original(toys: Toys, folder: Path) -> Path:
    """GLM-4 as its authors publish it, with the buffer that their folders hold."""
    shutil.copytree(toys.model("chatglm4"), folder)
    held = weights(folder) | {"transformer.rotary_pos_emb.inv_freq": torch.ones(2)}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_original_glm4_there_and_back(toys: Toys, trueline: Commands, tmp_path: Path) -> None:
    """Names, by hand: MindFormers' differ in the embedding's only. Split, merged, and with their other form of the matrices."""
    model = original(toys, tmp_path / "hf")
    held = weights(toys.model("chatglm4"))
    trueline("convert", model, tmp_path / "one.ckpt").ok()
    found = ckpt(tmp_path / "one.ckpt")
    named = {name.replace("embedding.word_embeddings.", "embedding.embedding_"): tensor for name, tensor in held.items()}
    assert same(found, named) and "transformer.embedding.embedding_weight" in found
    trueline("convert", model, tmp_path / "ranks", "--tensor-parallel", 2, "--data-parallel", 2).ok()
    fused = "transformer.encoder.layers.1.self_attention.query_key_value.weight"
    assert torch.equal(ckpt(tmp_path / "ranks" / "rank_3" / "checkpoint_3.ckpt")[fused], held[fused][32:])
    for name in [name for name in found if "query_key_value" in name or "dense_h_to_4h" in name]:
        parts = ("wq", "wk", "wv") if "query" in name else ("dense_left", "dense_right")
        whole, sizes = found.pop(name), [32, 16, 16] if "query" in name else [48, 48]
        old = "query_key_value" if "query" in name else "dense_h_to_4h"
        found |= {name.replace(old, part): rows for part, rows in zip(parts, whole.split(sizes), strict=True)}
    write_checkpoint(tmp_path / "apart.ckpt", (found | {"transformer.rotary_pos_emb.inv_freq": torch.ones(2)}).items())
    for source in ("one.ckpt", "ranks", "apart.ckpt"):
        trueline("convert", tmp_path / source, tmp_path / f"{source}-back", "--model", model).ok()
        assert same(weights(tmp_path / f"{source}-back"), held), source
    before, after = (api.load(str(path)).logprobs(PROBE) for path in (model, tmp_path / "ranks-back"))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.slow
def test_both_namings_of_glm4_are_one_checkpoint(toys: Toys, trueline: Commands, tmp_path: Path) -> None:
    """The same weights under the names of transformers and of the authors give the same file, and either folder is made of it."""
    glm = toys.model("glm")
    trueline("convert", glm, tmp_path / "one.ckpt").ok()
    trueline("convert", tmp_path / "one.ckpt", tmp_path / "hf", "--model", original(toys, tmp_path / "sizes")).ok()
    assert "transformer.encoder.layers.0.mlp.dense_h_to_4h.weight" in weights(tmp_path / "hf")
    trueline("convert", tmp_path / "hf", tmp_path / "again.ckpt").ok()
    assert same(ckpt(tmp_path / "one.ckpt"), ckpt(tmp_path / "again.ckpt"))
    trueline("convert", tmp_path / "again.ckpt", tmp_path / "glm", "--model", glm).ok()
    assert same(weights(glm), weights(tmp_path / "glm"))
    config = json.loads((tmp_path / "sizes" / "config.json").read_text())
    (tmp_path / "sizes" / "config.json").write_text(json.dumps(config | {"multi_query_attention": False}))
    assert "multi_query_attention" in trueline("convert", tmp_path / "sizes", tmp_path / "no.ckpt").refused()


SPLIT = {"query_key_value": ("wq", "wk", "wv"), "dense_h_to_4h": ("dense_left", "dense_right")}
FUSE = {
    "attention.w_qkv": ("attention.wq", "attention.wk", "attention.wv"),
    "feed_forward.w_gate_hidden": ("feed_forward.w1", "feed_forward.w3"),
}


@pytest.mark.parametrize("model", ["qwen2", "glm"], indirect=True)
def test_other_forms_are_read(model: Path, trueline: Commands, tmp_path: Path) -> None:
    """qkv_concat and mlp_concat the other way, an older name of the embedding, a wrapper's prefix, and everything that is left out."""
    trueline("convert", model, tmp_path / "one.ckpt").ok()
    found = ckpt(tmp_path / "one.ckpt")
    for fused, parts in (FUSE if "model.norm_out.weight" in found else SPLIT).items():
        for name in [name for name in found if f"{fused}." in name]:
            whole = found.pop(name)
            sizes = [32, 16, 16] if len(parts) == 3 else [48, 48]
            found |= {name.replace(fused, part): rows for part, rows in zip(parts, whole.split(sizes), strict=True)}
        for name in [name for name in found if f"{parts[0]}." in name and fused in FUSE]:
            found[name.replace(parts[0], fused)] = torch.cat([found.pop(name.replace(parts[0], part)) for part in parts])
    found = {name.replace("embedding_weight", "embedding_table"): tensor for name, tensor in found.items()}
    extra = {f"adam_m.policy_model.{name}": tensor for name, tensor in found.items()}
    extra |= {"global_step": torch.tensor(7), "policy_model.v_head0.weight": torch.ones(2, 2)}
    write_checkpoint(tmp_path / "other.ckpt", ({f"policy_model.{name}": tensor for name, tensor in found.items()} | extra).items())
    said = trueline("convert", tmp_path / "other.ckpt", tmp_path / "back", "--model", model).ok().out
    assert f"left out: 1 counter, {len(found)} optimizer states, 1 value head" in said
    assert same(weights(model), weights(tmp_path / "back"))


@pytest.mark.parametrize("model", ["qwen2", pytest.param("chatglm4", marks=pytest.mark.slow)], indirect=True)
def test_one_layout_of_ranks_to_another(model: Path, trueline: Commands, tmp_path: Path) -> None:
    """Whatever way a layout is reached, its files are the same, and all that MindSpore keeps beside the weights comes along."""
    trueline("convert", model, tmp_path / "plain.ckpt").ok()
    found = {f"policy_model.{name}": tensor for name, tensor in ckpt(tmp_path / "plain.ckpt").items()}
    states = {f"adam_{kind}.{name}": tensor + 1 for name, tensor in found.items() for kind in "mv"}
    beside = {"global_step": torch.tensor(7, dtype=torch.int32), "policy_model.v_head0.weight": torch.ones(64, 32)}
    everything = found | states | beside | {"scale_sense": torch.ones(1)}
    write_checkpoint(tmp_path / "one.ckpt", everything.items())

    def go(source: str, target: str, *options: object) -> Path:
        said = trueline("convert", tmp_path / source, tmp_path / target, "--model", model, *options).ok().out
        assert f"{len(everything)} tensors" in said
        return tmp_path / target

    go("one.ckpt", "four", "--tensor-parallel", 4)
    go("four", "two-by-two", "--tensor-parallel", 2, "--data-parallel", 2)
    go("one.ckpt", "two-by-two-at-once", "--tensor-parallel", 2, "--data-parallel", 2)
    go("two-by-two", "copies", "--data-parallel", 3)
    for rank in range(4):
        name = f"rank_{rank}/checkpoint_{rank}.ckpt"
        assert same(ckpt(tmp_path / "two-by-two" / name), ckpt(tmp_path / "two-by-two-at-once" / name))
    piece = ckpt(tmp_path / "two-by-two" / "rank_3" / "checkpoint_3.ckpt")
    for name in found:
        assert piece[name].shape == piece[f"adam_m.{name}"].shape and torch.equal(piece[f"adam_m.{name}"], piece[name] + 1)
    assert sum(piece[name].shape != tensor.shape for name, tensor in found.items()) > 5
    for source in ("two-by-two", "copies", "four"):
        assert same(ckpt(go(source, f"{source}.ckpt")), everything), source
    trueline("convert", tmp_path / "four", tmp_path / "folder", "--model", model).ok()
    assert same(weights(tmp_path / "folder"), weights(model))
    both = trueline("convert", tmp_path / "four", tmp_path / "x.ckpt", "--model", model, "--data-parallel", 2).refused()
    assert "name one file (OUT.ckpt), or a folder" in both and not (tmp_path / "x.ckpt").exists()


def test_the_newest_of_several_checkpoints(toys: Toys, trueline: Commands, tmp_path: Path) -> None:
    """The newest epoch and step that every rank has; a pattern chooses another; two names are refused with both and the option."""
    model = toys.model()
    trueline("convert", model, tmp_path / "ranks", "--tensor-parallel", 2).ok()
    for rank in range(2):
        place = tmp_path / "ranks" / f"rank_{rank}"
        made = place / f"checkpoint_{rank}.ckpt"
        wrong = {name: tensor * 0 for name, tensor in ckpt(made).items()}
        for moment in ("1_900", "2_30", *(["10_5"] if rank == 0 else [])):  # rank 1 was killed before 10_5
            write_checkpoint(place / f"glm4_rank_{rank}-{moment}.ckpt", wrong.items())
        made.rename(place / f"glm4_rank_{rank}-2_100.ckpt")
    said = trueline("convert", tmp_path / "ranks", tmp_path / "back", "--model", model).ok().out
    assert "from rank_0/glm4_rank_0-2_100.ckpt and its like on 2 ranks" in said and same(weights(tmp_path / "back"), weights(model))
    chosen = ("--model", model, "--checkpoint", "*-1_900.ckpt")
    assert "glm4_rank_0-1_900.ckpt" in trueline("convert", tmp_path / "ranks", tmp_path / "old", *chosen).ok().out
    assert not any(tensor.any() for tensor in weights(tmp_path / "old").values())
    shutil.copy(tmp_path / "ranks/rank_0/glm4_rank_0-2_100.ckpt", tmp_path / "ranks/rank_0/critic-2_100.ckpt")
    refused = trueline("convert", tmp_path / "ranks", tmp_path / "no", "--model", model).refused()
    assert "rank_0: 5 .ckpt files (critic-2_100.ckpt, glm4_rank_0-10_5.ckpt, " in refused and "--checkpoint '*-2_500.ckpt'" in refused
    trueline("convert", tmp_path / "ranks", tmp_path / "again.ckpt", "--model", model, "--checkpoint", "glm4*").ok()
    none = trueline("convert", tmp_path / "ranks", tmp_path / "no", "--model", model, "--checkpoint", "x*").refused()
    assert "none that fits x*" in none
    unused = trueline("convert", model, tmp_path / "x.ckpt", "--checkpoint", "x*").refused()
    assert "--checkpoint is for a folder of rank_N as SRC" in unused


def test_sizes_from_yaml(toys: Toys, trueline: Commands, tmp_path: Path) -> None:
    """Next to the checkpoint, in MindFormers' words, for both of its configuration classes; the model is the same."""
    llama = {
        "type": "LlamaConfig", "hidden_size": 32, "num_layers": 2, "num_heads": 4, "n_kv_heads": 2, "vocab_size": 320,
        "intermediate_size": 48, "qkv_has_bias": True, "rms_norm_eps": 1e-6, "theta": 10000.0, "seq_length": 512,
    }  # fmt: skip
    glm = {
        "type": "ChatGLM2Config", "hidden_size": 32, "num_layers": 2, "num_attention_heads": 4,
        "multi_query_group_num": 2, "padded_vocab_size": 320,
        "kv_channels": 8, "ffn_hidden_size": 48, "add_qkv_bias": True, "layernorm_epsilon": 1.5625e-7,
        "rope_ratio": 1, "seq_length": 512, "multi_query_attention": True,
    }  # fmt: skip
    for family, settings in (("qwen2", llama), ("glm", glm)):
        place = tmp_path / family
        place.mkdir()
        trueline("convert", toys.model(family), place / "one.ckpt").ok()
        (place / "finetune.yaml").write_text(yaml.safe_dump({"model": {"model_config": settings, "arch": {"type": "x"}}}))
        trueline("convert", place / "one.ckpt", place / "back").ok()
        before, after = (api.load(str(path)).logprobs(PROBE) for path in (toys.model(family), place / "back"))
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), family


def test_rearranged_heads(toys: Toys, trueline: Commands, tmp_path: Path) -> None:
    """`use_rearrange_rope`: in each head of queries and keys the even rows stand before the odd ones."""
    trueline("convert", toys.model("glm"), tmp_path / "plain.ckpt").ok()
    found = ckpt(tmp_path / "plain.ckpt")
    order = [8 * head + row for head in range(6) for row in (0, 2, 4, 6, 1, 3, 5, 7)] + list(range(48, 64))
    for name in found:
        if "query_key_value" in name:
            found[name] = found[name][order]
    write_checkpoint(tmp_path / "turned.ckpt", found.items())
    settings = {
        "type": "ChatGLM2Config", "hidden_size": 32, "num_layers": 2, "num_attention_heads": 4,
        "multi_query_group_num": 2, "padded_vocab_size": 320,
        "kv_channels": 8, "ffn_hidden_size": 48, "add_qkv_bias": True, "layernorm_epsilon": 1.5625e-7, "use_rearrange_rope": True,
    }  # fmt: skip
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({"model": {"model_config": settings}}))
    trueline("convert", tmp_path / "turned.ckpt", tmp_path / "back").ok()
    assert same(weights(toys.model("glm")), weights(tmp_path / "back"))
    trueline("convert", tmp_path / "back", tmp_path / "again.ckpt", "--model", tmp_path / "model.yaml").ok()
    assert same(found, ckpt(tmp_path / "again.ckpt"))


def test_pipeline_stages(toys: Toys, trueline: Commands, tmp_path: Path) -> None:
    """Ranks 0 and 1 hold the first layer, 2 and 3 the rest."""
    trueline("convert", toys.model(), tmp_path / "ranks", "--tensor-parallel", 2, "--data-parallel", 2).ok()
    for rank in range(4):
        path = tmp_path / "ranks" / f"rank_{rank}" / f"checkpoint_{rank}.ckpt"
        early = ("model.tok_embeddings", "model.layers.0.")
        write_checkpoint(path, [(name, tensor) for name, tensor in ckpt(path).items() if name.startswith(early) == (rank < 2)])
    trueline("convert", tmp_path / "ranks", tmp_path / "back", "--model", toys.model()).ok()
    assert same(weights(toys.model()), weights(tmp_path / "back"))


def strategy(path: Path, rows: dict[str, tuple[list[int], list[int], int, int]]) -> None:
    """A strategy file: name -> grid of devices, axes, step and size of the optimizer's own cut."""

    def message(number: int, inner: bytes) -> bytes:
        assert len(inner) < 128
        return bytes([number << 3 | 2, len(inner)]) + inner

    def integers(values: list[int]) -> bytes:
        return b"".join(b"\x08" + (bytes([value]) if value >= 0 else b"\xff" * 9 + b"\x01") for value in values)

    items = [
        message(
            3,
            message(1, name.encode())
            + message(2, message(1, integers(grid)) + message(2, integers(axes)) + bytes([0x30, step, 0x38, size])),
        )
        for name, (grid, axes, step, size) in rows.items()
    ]
    path.write_bytes(b"".join(items))


def test_strategy_files_place_what_shapes_cannot(toys: Toys, trueline: Commands, tmp_path: Path) -> None:
    """With a sharded optimizer rank 2 d + m holds part d of its copy's rows; by shape alone that is refused."""
    trueline("convert", toys.model(), tmp_path / "one.ckpt").ok()
    found = ckpt(tmp_path / "one.ckpt")
    columns = (".wo.", ".w2.")
    rows = {
        name: (
            [2, 2],
            [-1, 0] if any(c in name for c in columns) else [0, -1] if tensor.dim() == 2 else [0] if "bias" in name else [-1],
            2,
            2,
        )
        for name, tensor in found.items()
    }
    strategy(tmp_path / "strategy_0.ckpt", rows)
    for rank in range(4):
        place = tmp_path / "ranks" / f"rank_{rank}"
        place.mkdir(parents=True)
        with (place / f"model_{rank}.ckpt").open("wb") as file:
            for name, tensor in found.items():
                data, model = rank // 2, rank % 2
                axis = rows[name][1].index(0) if 0 in rows[name][1] else None
                part = tensor if axis is None else tensor.chunk(2, axis)[model]
                write_tensor(file, name, part.chunk(2)[data])
    refused = trueline("convert", tmp_path / "ranks", tmp_path / "no", "--model", toys.model()).refused()
    assert "--strategy" in refused and not (tmp_path / "no").exists()
    given = ("--model", toys.model(), "--strategy", tmp_path / "strategy_0.ckpt")
    trueline("convert", tmp_path / "ranks", tmp_path / "back", *given).ok()
    assert same(weights(toys.model()), weights(tmp_path / "back"))
    both = ("--strategy", tmp_path / "strategy_0.ckpt", "--out-strategy", tmp_path / "strategy_0.ckpt", "--data-parallel", 4)
    trueline("convert", tmp_path / "ranks", tmp_path / "same", "--model", toys.model(), *both).ok()
    for rank in range(4):
        place = f"rank_{rank}"
        assert same(ckpt(tmp_path / "ranks" / place / f"model_{rank}.ckpt"), ckpt(tmp_path / "same" / place / f"checkpoint_{rank}.ckpt"))
    trueline("convert", toys.model(), tmp_path / "again", "--strategy", tmp_path / "strategy_0.ckpt", "--tensor-parallel", 4).ok()
    for rank in range(4):
        place = f"rank_{rank}"
        assert same(ckpt(tmp_path / "ranks" / place / f"model_{rank}.ckpt"), ckpt(tmp_path / "again" / place / f"checkpoint_{rank}.ckpt"))


def test_what_does_not_fit_is_refused(toys: Toys, trueline: Commands, tmp_path: Path) -> None:
    model = toys.model()
    trueline("convert", model, tmp_path / "one.ckpt").ok()
    found = ckpt(tmp_path / "one.ckpt")
    cases = {
        "missing": ({k: v for k, v in found.items() if "layers.1.attention.wo" not in k}, "model.layers.1.attention.wo.weight: missing"),
        "stranger": (found | {"model.layers.0.extra": torch.ones(1)}, "model.layers.0.extra: not a tensor of this model"),
        "shape": (found | {"model.norm_out.weight": torch.ones(5)}, "is [5], expected [32]"),
        "whole": (found | {"model.norm_out.weight": torch.ones(32, dtype=torch.int8)}, "not floating point"),
        "other": ({"transformer.x": torch.ones(1)}, "no tensors called ...model.norm_out.weight"),
    }
    for name, (tensors, why) in cases.items():
        write_checkpoint(tmp_path / f"{name}.ckpt", tensors.items())
        assert why in trueline("convert", tmp_path / f"{name}.ckpt", tmp_path / f"{name}-hf", "--model", model).refused()
        assert not (tmp_path / f"{name}-hf").exists() and not list(tmp_path.glob(".*"))
    assert "--model" in trueline("convert", tmp_path / "one.ckpt", tmp_path / "x").refused()
    assert "already there" in trueline("convert", model, tmp_path / "one.ckpt").refused()
    assert "OUT.ckpt" in trueline("convert", model, tmp_path / "x").refused()
    assert "equal parts" in trueline("convert", model, tmp_path / "x", "--tensor-parallel", 7).refused()
    assert "no such file" in trueline("convert", tmp_path / "nothing", tmp_path / "x").refused()


def test_ranks_that_do_not_belong_together(toys: Toys, trueline: Commands, tmp_path: Path) -> None:
    trueline("convert", toys.model(), tmp_path / "ranks", "--tensor-parallel", 2, "--data-parallel", 2).ok()
    path = tmp_path / "ranks" / "rank_3" / "checkpoint_3.ckpt"
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    assert "differs on rank 3" in trueline("convert", tmp_path / "ranks", tmp_path / "back", "--model", toys.model()).refused()
    shutil.copy(path, path.with_name("other.ckpt"))
    assert "checkpoint_3.ckpt, other.ckpt" in trueline("convert", tmp_path / "ranks", tmp_path / "back", "--model", toys.model()).refused()
    shutil.rmtree(path.parent.with_name("rank_1"))
    assert "without a gap" in trueline("convert", tmp_path / "ranks", tmp_path / "back", "--model", toys.model()).refused()
