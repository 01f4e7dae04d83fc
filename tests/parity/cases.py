"""The tiny random models whose logits, losses and answers are held to other people's code: one list, for every test of this folder.

One rule: a case is named after its family, alone or with `_` and what is particular. transformers has a class for most; GLM-4 in the
original layout, ChatGLM2 and 3 are its GLM under the published names; ChatGLM-6B is the network in tests/reference_chatglm.py.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    Glm4Config,
    Glm4ForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.reference_chatglm import Reference
from trueline.data.sample import Sample, sample_of
from trueline.model.batch import pack
from trueline.model.decoder import Decoder

VOCABULARY, LAYERS = 96, 3
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": None,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
WINDOWS = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
WHOLE_HEAD = {"head_dim": 8, "partial_rotary_factor": 1.0, "attention_bias": False}
MODELS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2_tied": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen2_yarn": (Qwen2Config, Qwen2ForCausalLM, {"rope_parameters": YARN}),
    "qwen2_yarn_all": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"rope_parameters": YARN | {"attention_factor": 1.3, "beta_fast": 4, "beta_slow": 2, "truncate": False}},
    ),
    "qwen2_windows": (Qwen2Config, Qwen2ForCausalLM, WINDOWS),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "qwen3_tied": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8, "tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen3_biased": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16, "attention_bias": True}),
    "qwen3_windows": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16} | WINDOWS | MIXED),
    "glm": (GlmConfig, GlmForCausalLM, {"head_dim": 16}),
    "glm_whole": (GlmConfig, GlmForCausalLM, WHOLE_HEAD),
    "glm4": (Glm4Config, Glm4ForCausalLM, {"head_dim": 16}),
    "glm4_unbiased": (Glm4Config, Glm4ForCausalLM, {"head_dim": 8, "attention_bias": False}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 6}),
    "mistral_whole": (MistralConfig, MistralForCausalLM, {"sliding_window": None, "head_dim": 16, "tie_word_embeddings": True}),
    "llama": (LlamaConfig, LlamaForCausalLM, {"head_dim": 16}),
    "llama_tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama_biased": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "rms_norm_eps": 1e-3}),
    "llama_all_biased": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "llama_linear": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
    "llama_3_1": (LlamaConfig, LlamaForCausalLM, {"head_dim": 16, "rope_parameters": LLAMA3 | {"original_max_position_embeddings": 64}}),
}
"""transformers' class, and what is particular about its configuration."""
ORIGINAL: dict[str, tuple[int, int, float, bool]] = {
    "chatglm2": (4, 2, 1, False),
    "chatglm3": (4, 2, 1, False),
    "chatglm3_by_head": (4, 4, 2.5, True),
    "chatglm4": (4, 2, 500, False),
    "chatglm4_one_group": (4, 1, 500, False),
    "chatglm4_own_keys": (4, 4, 50, False),
}
"""Query heads, key/value heads, rope_ratio, and whether the rows of q, k and v alternate by head."""
CHATGLM = {
    "model_type": "chatglm", "vocab_size": VOCABULARY, "hidden_size": 48, "inner_hidden_size": 80, "num_layers": LAYERS,
    "num_attention_heads": 4, "bos_token_id": 7, "gmask_token_id": 5, "mask_token_id": 6, "position_encoding_2d": True,
}  # fmt: skip
CASES = [*MODELS, *ORIGINAL, "chatglm"]
OWN_CLASS = ["qwen2", "qwen2_tied", "qwen3", "qwen3_tied", "qwen3_windows", "glm", "glm4", "mistral", "llama", "llama_3_1"]
"""Cases that transformers itself reads and writes, one or two of each family; EACH has the other families' too."""
EACH = [*OWN_CLASS, *ORIGINAL, "chatglm"]

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Made:
    """Another implementation's model in float64, and a folder with its weights."""

    theirs: Any
    folder: Path
    logits: Callable[[list[int]], Tensor]  # one sequence [T] -> [T, V], with a gradient
    last_hidden: Callable[[list[int]], Tensor]  # what a score head sees of the last token, [D]
    published: Callable[[Tensors], Tensors]  # tensors (weights or gradients) under their parameters' names -> under the folder's

    def rows(self, lengths: tuple[int, ...] = (9, 1, 17, 4, 4)) -> list[list[int]]:
        """Sequences of random tokens; for ChatGLM-6B, where there is room, with a context and an answer."""
        draw = torch.Generator().manual_seed(5)
        found = [torch.randint(8, VOCABULARY, (n,), generator=draw).tolist() for n in lengths]
        if isinstance(self.theirs, Reference):
            for row in found:
                row[max(len(row) - 4, 1) : max(len(row) - 2, 1)] = [5, 7] if len(row) > 2 else []
        return found


def make(name: str, folder: Path) -> Made:
    """The case's model, every weight random, biases and norms too."""
    if name == "chatglm":
        theirs: Any = randomised(Reference(CHATGLM), name)
        save_file(theirs.state_dict(), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(CHATGLM))
        return Made(theirs, folder, theirs, lambda row: theirs.states(row)[-1], dict)
    published: Callable[[Tensors], Tensors] = dict
    if name in ORIGINAL:
        heads, groups, ratio, by_head = ORIGINAL[name]
        rope = {"rope_type": "default", "rope_theta": 1e4 * ratio, "partial_rotary_factor": 0.5}
        changes = {"num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": 12, "rms_norm_eps": 1e-4}
        theirs = randomised(GlmForCausalLM(GlmConfig(**SIZES | changes | {"attention_bias": True, "rope_parameters": rope})), name)
        published = partial(original_names, heads=heads if by_head else 0)
        buffers = {"transformer.rotary_pos_emb.inv_freq": torch.ones(6)}  # the authors' files have it
        save_file(published(theirs.state_dict()) | buffers, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(original_config(name)))
    else:
        config, model, changes = MODELS[name]
        theirs = randomised(model(config(**SIZES | changes)), name)
        theirs.save_pretrained(folder)
    return Made(
        theirs,
        folder,
        lambda row: theirs(torch.tensor([row])).logits[0],
        lambda row: theirs.model(torch.tensor([row])).last_hidden_state[0, -1],
        published,
    )


@torch.no_grad()
def randomised(model: Any, name: str) -> Any:
    draw = torch.Generator().manual_seed(len(name))
    for key, p in model.double().eval().named_parameters():
        p.copy_(torch.randn(p.shape, generator=draw, dtype=torch.float64) * 0.1 + ("norm" in key and key.endswith("weight")))
    return model


def original_config(name: str) -> dict[str, Any]:
    """The authors' config.json. Of three families that differ in nothing else the name says which one it is."""
    heads, groups, ratio, by_head = ORIGINAL[name]
    family = {"chatglm2": "chatglm2-6b", "chatglm3": "chatglm3-6b", "chatglm4": "glm-4-9b"}[name.split("_")[0]]
    queries = {} if by_head else {"multi_query_attention": True, "multi_query_group_num": groups}
    return queries | {
        "model_type": "chatglm", "_name_or_path": f"THUDM/{family}", "num_layers": LAYERS, "padded_vocab_size": VOCABULARY,
        "hidden_size": 48, "ffn_hidden_size": 80, "kv_channels": 12, "num_attention_heads": heads, "layernorm_epsilon": 1e-4,
        "add_qkv_bias": True, "original_rope": True, "rope_ratio": ratio,
    }  # fmt: skip


def original_names(held: Tensors, heads: int = 0) -> Tensors:
    """A GLM's tensors as the authors name and join them; with `heads` the rows of q, k and v alternate by head."""
    found = {
        "transformer.embedding.word_embeddings.weight": held["model.embed_tokens.weight"],
        "transformer.encoder.final_layernorm.weight": held["model.norm.weight"],
        "transformer.output_layer.weight": held["lm_head.weight"],
    }
    same = {"self_attn.o_proj": "self_attention.dense", "mlp.gate_up_proj": "mlp.dense_h_to_4h", "mlp.down_proj": "mlp.dense_4h_to_h"}
    same |= {norm: norm for norm in ("input_layernorm", "post_attention_layernorm")}
    for i in range(LAYERS):
        layer, to = f"model.layers.{i}.", f"transformer.encoder.layers.{i}."
        found |= {f"{to}{ours}.weight": held[f"{layer}{theirs}.weight"].contiguous().clone() for theirs, ours in same.items()}
        for kind in ("weight", "bias"):
            parts = [held[f"{layer}self_attn.{name}_proj.{kind}"] for name in "qkv"]
            if heads:
                parts = [torch.stack([part.unflatten(0, (heads, -1)) for part in parts], 1).flatten(0, 2)]
            found[f"{to}self_attention.query_key_value.{kind}"] = torch.cat(parts)
    return found


def samples(decoder: Decoder, rows: list[list[int]], trained: list[list[bool]] | None = None) -> list[Sample]:
    flags = trained or [[True] * len(row) for row in rows]
    return [sample_of(row, flag, decoder.config.blocks) for row, flag in zip(rows, flags, strict=True)]


@torch.no_grad()
def our_logits(decoder: Decoder, rows: list[list[int]]) -> list[Tensor]:
    """Packed in this order."""
    batch = pack(samples(decoder, rows))
    assert decoder.head is not None
    return list(decoder.head(decoder(batch.tokens, batch.layout)).split([len(row) for row in rows]))


def has_class(made: Made) -> bool:
    return isinstance(made.theirs, PreTrainedModel)
