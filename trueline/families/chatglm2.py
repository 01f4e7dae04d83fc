"""ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B as their authors publish them: one network, one set of weight names, three ways to talk.

Weights keep their published names and their fused matrices. The published code is never run; `table.family_of` tells the three apart.
"""

import json
import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trueline.data.conversation import Conversation, Message
from trueline.data.sample import Sample
from trueline.errors import UserError
from trueline.families.chatglm import join_heads, split_heads
from trueline.families.family import Encoder, Family, Weight
from trueline.families.glm4 import GLM4, join_gate_up, split_gate_up, write_roles
from trueline.families.settings import Settings
from trueline.families.transcript import Transcript
from trueline.model.decoder import DecoderConfig

# facts of the published templates, needed token for token
ROUND = "[Round {}]\n\n问：{}\n\n答："
TOOLS_SYSTEM = "Answer the following questions as best as you can. You have access to the following tools:"
LAYER = "transformer.encoder.layers.{}."


def split_qkv(fused: Tensor, config: DecoderConfig) -> list[Tensor]:
    """`[(H + 2 G) d, ...]`, all rows of q, then of k, then of v."""
    return list(fused.split([heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]))


def join_qkv(parts: list[Tensor], config: DecoderConfig) -> Tensor:
    return torch.cat(parts)


def read_config(config: dict[str, Any]) -> DecoderConfig:
    """The authors' ChatGLMConfig, with its defaults. Half of each head is turned, in interleaved pairs, from base 10,000 `rope_ratio`.

    Their division of scores by the layer's number is undone before the softmax, so it is not here.
    """
    keys = Settings(config, "chatglm")
    heads = keys.size("num_attention_heads", 32)
    groups = keys.size("multi_query_group_num", 1) if keys.flag("multi_query_attention", False) else heads
    if heads % groups:
        keys.refuse(f"multi_query_group_num: {groups} does not divide num_attention_heads {heads}")
    head_dim = keys.size("kv_channels", 128)
    if head_dim % 4:
        keys.refuse(f"kv_channels: {head_dim}, expected a multiple of 4 (half of a head turns, in pairs)")
    for key, value in (("rmsnorm", True), ("post_layer_norm", True), ("apply_residual_connection_post_layernorm", False)):
        keys.only(key, value, value)
    keys.only("pre_seq_len", None, None)
    keys.only("quantization_bit", 0, 0)
    bias = keys.flag("add_bias_linear", False)
    decoder = DecoderConfig(
        vocab_size=keys.size("padded_vocab_size", 65024),
        hidden_size=keys.size("hidden_size", 4096),
        num_layers=keys.size("num_layers", 28),
        num_heads=heads,
        num_kv_heads=groups,
        head_dim=head_dim,
        mlp_size=keys.size("ffn_hidden_size", 13696),
        norm_eps=keys.number("layernorm_epsilon", 1e-5),
        qkv_bias=keys.flag("add_qkv_bias", False) or bias,
        o_bias=bias,
        mlp_bias=bias,
        rope="interleaved",
        rope_theta=1e4 * keys.number("rope_ratio", 1.0),
        rope_dim=head_dim // 2,
        prefix_shifts=False,
        tied_embeddings=keys.flag("tie_word_embeddings", False),
        init_std=keys.number("initializer_range", 0.02),
    )
    keys.check()
    return decoder


def read_chatglm2(config: dict[str, Any]) -> DecoderConfig:
    """The same, without `rope_ratio`: the long ChatGLM2 models mean another thing by it."""
    if config.get("rope_ratio") not in (None, 1):
        raise UserError(f"rope_ratio: {config['rope_ratio']!r} is not supported for chatglm2; use chatglm2-6b, or a ChatGLM3 model")
    return read_config(config)


def render_rounds(conversation: Conversation, tokenizer: Encoder, open: bool = False, last_only: bool = False) -> Sample:
    """ChatGLM2: `[gMASK]sop`, numbered rounds of question and answer as one text, then the last answer and `</s>`.

    Trained: the last answer and its end, as published; earlier answers have no end, and are cut into tokens with what is around them.
    The template knows no system message; it goes before the first round, as a paragraph of its own. `open` ends with the last round's
    `答：`, and trains nothing.
    """
    if conversation.tools or any(message.tool or message.role == "observation" for message in conversation.messages):
        raise UserError("ChatGLM2-6B has no format for tools; leave tools, calls and observations out, or use a ChatGLM3 or GLM-4 model")
    messages = list(conversation.messages)
    answer = messages.pop() if messages and messages[-1].role == "assistant" and not open else None
    prompt, number = "", 0
    for message in messages:
        if message.role == "user":
            number += 1
            prompt += ROUND.format(number, message.content)
        elif message.content:
            prompt += message.content + "\n\n"
    out = Transcript(tokenizer)
    out.control("[gMASK]")
    out.control("sop")
    out.text(prompt)
    if answer is not None:
        out.text(answer.content, trained=answer.trained)
        out.control("</s>", trained=answer.trained)
    return out.sample()


def render_chatglm3(conversation: Conversation, tokenizer: Encoder, open: bool = False, last_only: bool = False) -> Sample:
    """`[gMASK]sop`, then each message as in GLM-4 (`glm4.render` says what is trained).

    Tools stand in the system message as indented JSON, a call is the Python the published code reads: `tool_call(city='北京')`.
    """
    messages = conversation.messages
    system = messages[0].content if messages and messages[0].role == "system" else ""
    if conversation.tools:
        listed = [tool.get("function", tool) for tool in conversation.tools]
        system = f"{system or TOOLS_SYSTEM}\n{json.dumps(listed, indent=4, ensure_ascii=False)}"
    turns = [replace(m, content=_python_call(m)) if m.tool else m for m in messages if m.role != "system"]
    return write_roles(Transcript(tokenizer), "sop", [system] if system else [], turns, open, last_only)


def _python_call(message: Message) -> str:
    """A call's JSON arguments as the block of Python that ChatGLM3 writes."""
    try:
        arguments = json.loads(message.content)
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise UserError(f"the arguments of a call of {message.tool} are no JSON object: {message.content[:80]}")
    named = all(re.fullmatch(r"[^\W\d]\w*", name) for name in arguments)
    inside = ", ".join(f"{name}={value!r}" for name, value in arguments.items()) if named else f"**{arguments!r}"
    return f"```python\ntool_call({inside})\n```"


def _linear(theirs: str, *ours: str, split: Any = None, join: Any = None) -> tuple[Weight, ...]:
    return tuple(
        Weight(f"{LAYER}{theirs}.{kind}", tuple(f"layers.{{}}.{name}.{kind}" for name in ours), split, join) for kind in ("weight", "bias")
    )


def _weights(split: Any, join: Any) -> tuple[Weight, ...]:
    return (
        Weight("transformer.embedding.word_embeddings.weight", ("embed.weight",)),
        Weight(f"{LAYER}input_layernorm.weight", ("layers.{}.attention_norm.weight",)),
        *_linear("self_attention.query_key_value", "attention.q", "attention.k", "attention.v", split=split, join=join),
        *_linear("self_attention.dense", "attention.o"),
        Weight(f"{LAYER}post_attention_layernorm.weight", ("layers.{}.mlp_norm.weight",)),
        *_linear("mlp.dense_h_to_4h", "mlp.gate", "mlp.up", split=split_gate_up, join=join_gate_up),
        *_linear("mlp.dense_4h_to_h", "mlp.down"),
        Weight("transformer.encoder.final_layernorm.weight", ("norm.weight",)),
        Weight("transformer.output_layer.weight", ("head.weight",)),
    )


# without multi-query attention the rows of q, k and v alternate by head, as in ChatGLM-6B
BY_HEAD = _weights(split_heads, join_heads)

CHATGLM3 = Family(
    name="chatglm3",
    architecture="ChatGLMModel",
    scorer_architecture="ChatGLMForSequenceClassification",
    read_config=read_config,
    weights=_weights(split_qkv, join_qkv),
    render=render_chatglm3,
    stop=("</s>", "<|user|>", "<|observation|>"),
    targets={
        **dict.fromkeys("qkv", "query_key_value"),
        "o": "dense",
        **dict.fromkeys(("gate", "up"), "dense_h_to_4h"),
        "down": "dense_4h_to_h",
    },
)
CHATGLM2 = replace(CHATGLM3, name="chatglm2", read_config=read_chatglm2, render=render_rounds, stop=("</s>",), answers_apart=True)
GLM4_ORIGINAL = replace(CHATGLM3, name="chatglm4", render=GLM4.render, stop=GLM4.stop)
