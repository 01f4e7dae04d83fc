"""MindFormers' names for the weights of a model, and its YAML sizes as a config.json. Tables; nothing here reads a tensor's file.

A group of Hugging Face tensors and a group of MindFormers tensors hold the same rows, one after the other.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from trueline.errors import UserError


@dataclass(frozen=True)
class Group:
    """Tensors that are the same rows on both sides; `{}` stands for the layer. `axis` is split over ranks, None is repeated on each."""

    theirs: tuple[str, ...]
    forms: tuple[tuple[str, ...], ...]
    """The ways MindFormers has them; the first is written."""
    axis: int | None
    turned: bool = False
    """Rows of queries and keys, which `use_rearrange_rope` reorders."""


def _projections(before: str, theirs: str, names: str, fused: str, kind: str, fused_first: bool = False) -> Group:
    separate, one = tuple(f"{before}.{name}.{kind}" for name in names.split()), (f"{before}.{fused}.{kind}",)
    hf = tuple(f"model.layers.{{}}.{name}.{kind}" for name in theirs.split())
    return Group(hf, (one, separate) if fused_first else (separate, one), 0, theirs.startswith("self_attn"))


_QKV = "self_attn.q_proj self_attn.k_proj self_attn.v_proj"
_LAYER, _GLM_LAYER = "model.layers.{}", "transformer.encoder.layers.{}"
LLAMA = (
    Group(("model.embed_tokens.weight",), (("model.tok_embeddings.embedding_weight",), ("model.tok_embeddings.embedding_table",)), 0),
    Group((f"{_LAYER}.input_layernorm.weight",), ((f"{_LAYER}.attention_norm.weight",),), None),
    *(_projections(f"{_LAYER}.attention", _QKV, "wq wk wv", "w_qkv", kind) for kind in ("weight", "bias")),
    Group((f"{_LAYER}.self_attn.o_proj.weight",), ((f"{_LAYER}.attention.wo.weight",),), 1),
    Group((f"{_LAYER}.post_attention_layernorm.weight",), ((f"{_LAYER}.ffn_norm.weight",),), None),
    _projections(f"{_LAYER}.feed_forward", "mlp.gate_proj mlp.up_proj", "w1 w3", "w_gate_hidden", "weight"),
    Group((f"{_LAYER}.mlp.down_proj.weight",), ((f"{_LAYER}.feed_forward.w2.weight",),), 1),
    Group(("model.norm.weight",), (("model.norm_out.weight",),), None),
    Group(("lm_head.weight",), (("lm_head.weight",),), 0),
)
GLM = (
    Group(
        ("model.embed_tokens.weight",),
        tuple((f"transformer.embedding.{name}",) for name in ("embedding_weight", "embedding_table", "word_embeddings.weight")),
        0,
    ),
    Group((f"{_LAYER}.input_layernorm.weight",), ((f"{_GLM_LAYER}.input_layernorm.weight",),), None),
    *(_projections(f"{_GLM_LAYER}.self_attention", _QKV, "wq wk wv", "query_key_value", kind, True) for kind in ("weight", "bias")),
    Group((f"{_LAYER}.self_attn.o_proj.weight",), ((f"{_GLM_LAYER}.self_attention.dense.weight",),), 1),
    Group((f"{_LAYER}.post_attention_layernorm.weight",), ((f"{_GLM_LAYER}.post_attention_layernorm.weight",),), None),
    _projections(f"{_GLM_LAYER}.mlp", "mlp.gate_up_proj", "dense_left dense_right", "dense_h_to_4h", "weight", True),
    Group((f"{_LAYER}.mlp.down_proj.weight",), ((f"{_GLM_LAYER}.mlp.dense_4h_to_h.weight",),), 1),
    Group(("model.norm.weight",), (("transformer.encoder.final_layernorm.weight",),), None),
    Group(("lm_head.weight",), (("transformer.output_layer.weight",),), 0),
)
# ChatGLM2, 3 and GLM-4 as their authors publish them have MindFormers' fused names, all but the embedding's
_ORIGINAL = {"model.embed_tokens.weight": ("transformer.embedding.word_embeddings.weight",)}
GLM_ORIGINAL = tuple(replace(group, theirs=_ORIGINAL.get(group.theirs[0], group.forms[0])) for group in GLM)
GROUPS = {"qwen2": LLAMA, "llama": LLAMA, "glm": GLM, **dict.fromkeys(("chatglm2", "chatglm3", "chatglm4"), GLM_ORIGINAL)}
FINAL_NORMS = ("model.norm_out.weight", "transformer.encoder.final_layernorm.weight")
"""In every checkpoint, once; what stands before it there stands before every weight's name."""
# what MindSpore and MindRLHF keep beside the weights
STATES = ("adam_m.", "adam_v.", "moments.", "moment1.", "moment2.", "accu_grads.", "fp32_params.", "master_param.")
COUNTERS = {
    "global_step", "epoch_num", "step_num", "scale_sense", "loss_scale", "current_iterator_step", "last_overflow_iterator_step",
    "learning_rate", "beta1_power", "beta2_power", "weight_decay", "batch_size", "global_batch_size", "best_val", "data_epoch",
}  # fmt: skip
BUFFERS = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")
VALUE_HEADS = ("v_head0.", "v_head1.", "v_head2.", "vHead.", "value_head.")


def groups_of(family: str, layers: int) -> Iterator[Group]:
    """The family's groups with every layer's number filled in, in the model's order."""
    if family not in GROUPS:
        raise UserError(f"no MindFormers names are known for {family}; expected one of {', '.join(GROUPS)}")
    for per_layer, rows in groupby(GROUPS[family], lambda group: "{}" in group.theirs[0]):
        block = list(rows)
        for layer in range(layers) if per_layer else (0,):
            for group in block:
                theirs, *forms = (tuple(name.format(layer) for name in names) for names in (group.theirs, *group.forms))
                yield replace(group, theirs=theirs, forms=tuple(forms))


def weight_of(name: str) -> str:
    """The weight's name that an optimizer state's name holds; another name as it is."""
    return next((name.replace(state, "", 1) for state in STATES if name.startswith(state) or f".{state}" in name), name)


def beside_weights(name: str) -> str | None:
    """What a tensor that is no weight of the network is: "optimizer state", "counter", "value head" or "buffer"; None: not known."""
    if weight_of(name) != name:
        return "optimizer state"
    if any(head in name for head in VALUE_HEADS):
        return "value head"
    if name.endswith(BUFFERS):
        return "buffer"
    return "counter" if name.rpartition(".")[2] in COUNTERS else None


def turn(rows: Tensor, head_dim: int, back: bool = False) -> Tensor:
    """`[heads * head_dim, ...]` with each head's even rows before its odd ones, as `use_rearrange_rope` wants them; `back` undoes it."""
    inner = (2, head_dim // 2) if back else (head_dim // 2, 2)
    return rows.reshape(-1, *inner, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


# MindFormers' YAML: their key -> ours, for each of its two configuration classes
_LLAMA_KEYS = {
    "hidden_size": "hidden_size", "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads", "vocab_size": "vocab_size",
    "n_kv_heads": "num_key_value_heads", "intermediate_size": "intermediate_size", "rms_norm_eps": "rms_norm_eps", "theta": "rope_theta",
    "tie_word_embeddings": "tie_word_embeddings", "seq_length": "max_position_embeddings",
}  # fmt: skip
_GLM_KEYS = {
    "hidden_size": "hidden_size", "num_layers": "num_hidden_layers", "num_attention_heads": "num_attention_heads",
    "padded_vocab_size": "vocab_size", "multi_query_group_num": "num_key_value_heads", "ffn_hidden_size": "intermediate_size",
    "kv_channels": "head_dim", "layernorm_epsilon": "rms_norm_eps", "add_qkv_bias": "attention_bias",
    "seq_length": "max_position_embeddings",
}  # fmt: skip
_NEEDED = {"hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size"}


def read_yaml(path: Path) -> dict[str, Any] | None:
    """`model.model_config` of a MindFormers file; None when the file has none."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as problem:
        raise UserError(f"{path}: cannot be read as YAML ({str(problem).splitlines()[0]})") from None
    for key in ("model", "model_config"):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else None


def config_from_yaml(settings: dict[str, Any], where: str) -> dict[str, Any]:
    """A MindFormers `model_config` as config.json: LlamaConfig with biases is Qwen2's, without them Llama's, ChatGLM2Config is GLM-4's."""
    kind = settings.get("type")
    readers: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"LlamaConfig": _llama, "ChatGLM2Config": _glm}
    if kind not in readers:
        raise UserError(f"{where}: model_config.type {kind!r}, expected {' or '.join(readers)}; name a Hugging Face folder with --model")
    config = {key: value for key, value in readers[kind](settings).items() if value is not None}
    if missing := _NEEDED - config.keys():
        table = _LLAMA_KEYS if kind == "LlamaConfig" else _GLM_KEYS
        names = ", ".join(theirs for theirs, ours in table.items() if ours in missing)
        raise UserError(f"{where}: model_config lacks {names}; add the keys, or name a Hugging Face folder with --model")
    return config


def _llama(settings: dict[str, Any]) -> dict[str, Any]:
    if settings.get("extend_method") not in (None, "None", "none"):
        raise UserError(f"model_config.extend_method {settings['extend_method']!r}: scaled rotary embeddings are not supported")
    config = {ours: settings.get(theirs) for theirs, ours in _LLAMA_KEYS.items()}
    qwen2 = bool(settings.get("qkv_has_bias"))
    # the defaults of LlamaConfig there, where config.json has others
    defaults = {"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False}
    config = {key: defaults.get(key) if value is None else value for key, value in config.items()}
    config["num_key_value_heads"] = config["num_key_value_heads"] or config["num_attention_heads"]
    name = "Qwen2" if qwen2 else "Llama"
    return {"architectures": [f"{name}ForCausalLM"], "model_type": name.lower(), "hidden_act": "silu", **config}


def _glm(settings: dict[str, Any]) -> dict[str, Any]:
    config = {ours: settings.get(theirs) for theirs, ours in _GLM_KEYS.items()}
    if not settings.get("multi_query_attention", True):
        config["num_key_value_heads"] = config["num_attention_heads"]
    ratio = settings.get("rope_ratio", 1)
    theta = 10000.0 * (1 if ratio in (None, "None") else ratio)
    fixed = {"architectures": ["GlmForCausalLM"], "model_type": "glm", "hidden_act": "silu", "tie_word_embeddings": False}
    return {**fixed, **config, "rope_theta": theta, "partial_rotary_factor": 0.5}


def join(parts: list[Tensor]) -> Tensor:
    """Tensors of one group, one after the other."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
