"""Qwen2 and Qwen2.5: ChatML. Trained is what the assistant says and its `<|im_end|>`, never the newline after it."""

import json
from collections.abc import Sequence
from typing import Any

from trueline.data.conversation import Conversation, Message
from trueline.data.sample import Sample
from trueline.families.family import Encoder, Family
from trueline.families.llama import ATTENTION, EMBEDDING, ENDING, MLP, TARGETS
from trueline.families.settings import Settings
from trueline.families.transcript import Tag, Transcript, marked
from trueline.model.decoder import DecoderConfig

# facts of the published templates, needed token for token
SYSTEM = "You are a helpful assistant."
SYSTEM_2_5 = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
CALL, CALL_END = Tag("<tool_call>"), Tag("</tool_call>")
ANSWER, ANSWER_END = Tag("<tool_response>"), Tag("</tool_response>")
TOOLS, TOOLS_END = Tag("<tools>"), Tag("</tools>")
TOOLS_BEFORE: tuple[str | Tag, ...] = (
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function signatures within ",
    TOOLS,
    TOOLS_END,
    " XML tags:\n",
    TOOLS,
)
TOOLS_AFTER: tuple[str | Tag, ...] = (
    "\n",
    TOOLS_END,
    "\n\nFor each function call, return a json object with function name and arguments within ",
    CALL,
    CALL_END,
    " XML tags:\n",
    CALL,
    '\n{"name": <function-name>, "arguments": <args-json-object>}\n',
    CALL_END,
)


def read_config(config: dict[str, Any]) -> DecoderConfig:
    """transformers' Qwen2Config."""
    return read_sizes(Settings(config, "qwen2"), None)


def read_sizes(keys: Settings, head_dim: int | None) -> DecoderConfig:
    """Qwen2's, or Qwen3's (where heads have a size of their own): q and k normalised, biases on request."""
    qwen3 = head_dim is not None
    hidden, layers = keys.size("hidden_size", 4096), keys.size("num_hidden_layers", 32)
    heads, kv_heads, head_dim = keys.heads(32, 32, hidden, head_dim)
    theta, share, scaling = keys.rope(1.0)
    if share != 1.0:
        keys.refuse(f"partial_rotary_factor: a {keys.family} model turns whole heads")
    slides = keys.flag("use_sliding_window", False) and keys.config.get("sliding_window", 4096) is not None
    bias = keys.flag("attention_bias", False) if qwen3 else False
    decoder = DecoderConfig(
        vocab_size=keys.size("vocab_size", 151936),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_size=keys.size("intermediate_size", 22016),
        norm_eps=keys.number("rms_norm_eps", 1e-6),
        qkv_bias=bias or not qwen3,
        o_bias=bias,
        qk_norm=qwen3,
        rope_theta=theta,
        rope_scaling=scaling,
        windows=keys.windows(keys.size("sliding_window", 4096) if slides else None, keys.size("max_window_layers", 28, least=0), layers),
        tied_embeddings=keys.flag("tie_word_embeddings", False),
        init_std=keys.number("initializer_range", 0.02),
    )
    keys.check()
    return decoder


def render(conversation: Conversation, tokenizer: Encoder, open: bool = False, last_only: bool = False) -> Sample:
    """ChatML as published, less the newline after the last `<|im_end|>` (nothing follows it).

    Qwen2 has no tool template of its own: tools, calls and results have Qwen2.5's form. Trained: see the module (`last_only`: the last
    turn alone). `open` ends with the assistant's header, and trains nothing.
    """
    messages = conversation.messages
    system = messages[0].content if messages and messages[0].role == "system" else _default_system(tokenizer)
    return _render(system, conversation, tokenizer, open, last_only)


def render_chatml(conversation: Conversation, tokenizer: Encoder, open: bool = False, last_only: bool = False) -> Sample:
    """The same without a default system message."""
    messages = conversation.messages
    system = messages[0].content if messages and messages[0].role == "system" else None
    return _render(system, conversation, tokenizer, open, last_only)


def write_chatml(out: Transcript, system: str | None, tools: Sequence[dict[str, Any]]) -> bool:
    """The system message with the tools, if there is either; returns whether there was."""
    listed: list[str | Tag] = [part for tool in tools for part in ("\n", json.dumps(tool, ensure_ascii=False))]
    if listed:
        before = TOOLS_BEFORE if system is not None else (str(TOOLS_BEFORE[0]).lstrip("\n"), *TOOLS_BEFORE[1:])
        listed = [*before, *listed, *TOOLS_AFTER]
    if system is None and not listed:
        return False
    out.control("<|im_start|>")
    out.text("system\n", system or "", *listed)
    out.control("<|im_end|>")
    return True


def _render(system: str | None, conversation: Conversation, tokenizer: Encoder, open: bool, last_only: bool) -> Sample:
    out = Transcript(tokenizer)
    begun = write_chatml(out, system, conversation.tools)
    for turn, trained in marked([m for m in conversation.messages if m.role != "system"], open, last_only):
        out.text("\n" if begun else "")
        begun = True
        out.control("<|im_start|>")
        if turn[0].role == "assistant":
            # apart from what follows: in generation, too, the answer begins after this newline
            out.text("assistant\n")
            out.text(*calls(turn) if turn[0].tool else (turn[0].content,), trained=trained)
        elif turn[0].role == "observation":
            out.text("user", *(part for m in turn for part in ("\n", ANSWER, f"\n{m.content}\n", ANSWER_END)))
        else:
            out.text(f"{turn[0].role}\n{turn[0].content}")
        out.control("<|im_end|>", trained)
    if open:
        out.text("\n" if begun else "")
        out.control("<|im_start|>")
        out.text("assistant\n")
    return out.sample()


def _default_system(tokenizer: Encoder) -> str:
    """Qwen2.5 introduces itself; its tokenizer is the one that has the tool markup as tokens."""
    whole = CALL.text in tokenizer.specials or len(tokenizer.encode(CALL.text)) == 1
    return SYSTEM_2_5 if whole else SYSTEM


def calls(turn: tuple[Message, ...]) -> list[str | Tag]:
    """Calls in a row, one block each; the arguments stay the JSON text they are."""
    parts: list[str | Tag] = []
    for message in turn:
        body = f'\n{{"name": {json.dumps(message.tool, ensure_ascii=False)}, "arguments": {message.content}}}\n'
        parts += [*(["\n"] if parts else []), CALL, body, CALL_END]
    return parts


QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    scorer_architecture="Qwen2ForSequenceClassification",
    read_config=read_config,
    weights=(*EMBEDDING, *ATTENTION, *MLP, *ENDING),
    render=render,
    stop=("<|im_end|>", "<|endoftext|>"),
    targets=TARGETS,
)
