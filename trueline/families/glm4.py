"""GLM-4 (GLM-4-9B-chat-hf) and GLM-4-0414. A turn has no end mark: the next role's marker ends it, and is trained as a stop."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trueline.data.conversation import Conversation, Message
from trueline.data.sample import Sample
from trueline.errors import UserError
from trueline.families.family import Encoder, Family, Weight
from trueline.families.llama import ATTENTION, EMBEDDING, ENDING, TARGETS
from trueline.families.settings import Settings
from trueline.families.transcript import Transcript, marked
from trueline.model.decoder import DecoderConfig

# facts of the published template, needed token for token
IDENTITY = (
    "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。"
)
TOOLS_HEADING = "\n\n# 可用工具"
CALL_REQUEST = "\n在调用上述函数时，请使用 Json 格式表示调用的参数。"


def split_gate_up(weight: Tensor, config: DecoderConfig) -> list[Tensor]:
    """`[2 M, D]` -> gate and up `[M, D]`, views."""
    return list(weight.chunk(2))


def join_gate_up(parts: list[Tensor], config: DecoderConfig) -> Tensor:
    return torch.cat(parts)


def read_config(config: dict[str, Any]) -> DecoderConfig:
    """transformers' GlmConfig."""
    return _read_config(Settings(config, "glm"), post_norms=False)


def _read_config(keys: Settings, post_norms: bool) -> DecoderConfig:
    """GLM-4's, or GLM-4-0414's (which also norms what each half adds)."""
    hidden = keys.size("hidden_size", 4096)
    heads, kv_heads, head_dim = keys.heads(32, 2, hidden, 128)
    theta, share, scaling = keys.rope(0.5)
    rope_dim = int(head_dim * share)
    if rope_dim % 2 or not 0 < rope_dim <= head_dim:
        keys.refuse(f"partial_rotary_factor: {share} of head_dim {head_dim} is {rope_dim}, expected an even number of channels of the head")
    decoder = DecoderConfig(
        vocab_size=keys.size("vocab_size", 151552),
        hidden_size=hidden,
        num_layers=keys.size("num_hidden_layers", 40),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_size=keys.size("intermediate_size", 13696),
        norm_eps=keys.number("rms_norm_eps", 1.5625e-7),
        qkv_bias=keys.flag("attention_bias", True),
        rope="interleaved",
        rope_theta=theta,
        rope_scaling=scaling,
        post_norms=post_norms,
        rope_dim=rope_dim,
        tied_embeddings=keys.flag("tie_word_embeddings", False),
        init_std=keys.number("initializer_range", 0.02),
    )
    keys.check()
    return decoder


def render(conversation: Conversation, tokenizer: Encoder, open: bool = False, last_only: bool = False) -> Sample:
    """`[gMASK]<sop>`, then each message as `<|role|>`, the called tool's name, a newline and the content.

    Trained: all of an assistant's message after its marker, and the marker that ends it; after the last message that is `<|observation|>`
    for a tool call, else `<|user|>` (`last_only`: the last turn alone). `open` ends with `<|assistant|>`, and trains nothing.
    """
    turns = [m for m in conversation.messages if m.role != "system"]
    return write_roles(Transcript(tokenizer), "<sop>", list(_system(conversation, IDENTITY + TOOLS_HEADING)), turns, open, last_only)


def render_0414(conversation: Conversation, tokenizer: Encoder, open: bool = False, last_only: bool = False) -> Sample:
    """GLM-4-0414: the same, but the tools' message introduces nobody, and an empty system message is written."""
    turns = [m for m in conversation.messages if m.role != "system"]
    system = list(_system(conversation, TOOLS_HEADING.strip() + "\n", empty=True))
    return write_roles(Transcript(tokenizer), "<sop>", system, turns, open, last_only)


def write_roles(out: Transcript, start: str, system: list[str], messages: Sequence[Message], open: bool, last_only: bool) -> Sample:
    """What `render` says, after `[gMASK]` and `start`; `system` are the system messages, `messages` the others."""
    out.control("[gMASK]")
    out.control(start)
    ends = False  # the marker written next ends a trained message
    for text in system:
        out.control("<|system|>")
        out.text("\n")
        out.text(text)
    for turn, trained in marked(messages, open, last_only):
        for message in turn:
            out.control(f"<|{message.role}|>", trained=ends)
            # apart: the official tokenizer, too, encodes the first line and the content each on its own
            out.text(f"{message.tool or ''}\n", trained=trained)
            out.text(message.content, trained=trained)
            ends = trained
    if open:
        out.control("<|assistant|>")
    elif messages and messages[-1].role == "assistant":
        out.control("<|observation|>" if messages[-1].tool else "<|user|>", trained=ends)
    return out.sample()


def _system(conversation: Conversation, heading: str, empty: bool = False) -> Iterator[str]:
    """The system messages: the tools' own, then what the conversation says itself, if anything."""
    if conversation.tools:
        yield heading + "".join(_tool(tool) for tool in conversation.tools)
    first = conversation.messages[0] if conversation.messages else None
    if first and first.role == "system" and (first.content or empty):
        yield first.content


def _tool(tool: dict[str, Any]) -> str:
    function = tool.get("function")
    if tool.get("type", "function") != "function" or not isinstance(function, dict) or "name" not in function:
        raise UserError(f'GLM-4 tools must be {{"type": "function", "function": {{"name": ...}}}}, found {json.dumps(tool)[:80]}')
    # one line break: the template has two, of which transformers and the servers that use its engine drop the first (trim_blocks)
    return f"\n## {function['name']}\n\n{json.dumps(function, ensure_ascii=False, indent=4)}{CALL_REQUEST}"


GLM4 = Family(
    name="glm",
    architecture="GlmForCausalLM",
    scorer_architecture="GlmForSequenceClassification",
    read_config=read_config,
    weights=(
        *EMBEDDING,
        *ATTENTION,
        Weight(
            "model.layers.{}.mlp.gate_up_proj.weight",
            ("layers.{}.mlp.gate.weight", "layers.{}.mlp.up.weight"),
            split_gate_up,
            join_gate_up,
        ),
        Weight("model.layers.{}.mlp.down_proj.weight", ("layers.{}.mlp.down.weight",)),
        *ENDING,
    ),
    render=render,
    stop=("<|endoftext|>", "<|user|>", "<|observation|>"),
    # one module makes gate and up: an adapter for either is theirs for both halves
    targets={**TARGETS, "gate": "gate_up_proj", "up": "gate_up_proj"},
)


POST_NORMS = tuple(
    Weight(f"model.layers.{{}}.{theirs}.weight", (f"layers.{{}}.{ours}.weight",))
    for theirs, ours in (("post_self_attn_layernorm", "attention_post_norm"), ("post_mlp_layernorm", "mlp_post_norm"))
)


def read_config_0414(config: dict[str, Any]) -> DecoderConfig:
    """transformers' Glm4Config."""
    return _read_config(Settings(config, "glm4"), post_norms=True)


GLM4_0414 = replace(
    GLM4,
    name="glm4",
    architecture="Glm4ForCausalLM",
    scorer_architecture="Glm4ForSequenceClassification",
    read_config=read_config_0414,
    weights=(*EMBEDDING, *GLM4.weights[len(EMBEDDING) : -len(ENDING)], *POST_NORMS, *ENDING),
    render=render_0414,
)
