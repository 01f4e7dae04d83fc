"""Qwen2 and Qwen2.5: ChatML. Trained is what the assistant says and its `<|im_end|>`, never the newline after it."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from trueline.data.conversation import Conversation, Message
from trueline.data.sample import Sample
from trueline.families.family import Encoder, Family
from trueline.families.llama import ATTENTION, EMBEDDING, ENDING, MLP, TARGETS
from trueline.families.settings import Settings
from trueline.families.transcript import Tag, Transcript, marked
from trueline.model.decoder import DecoderConfig

Turn = tuple[Message, ...]
Parts = Sequence[str | Tag]

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
    return write_chatml(conversation, tokenizer, open, last_only, _default_system(tokenizer))


def render_chatml(conversation: Conversation, tokenizer: Encoder, open: bool = False, last_only: bool = False) -> Sample:
    """The same without a default system message."""
    return write_chatml(conversation, tokenizer, open, last_only)


def answer(turns: Sequence[Turn], i: int) -> tuple[Parts, Parts]:
    """What stands behind the header of turn `i`, the assistant's: first what belongs to a prompt, then what is trained."""
    turn = turns[i]
    return (), calls(turn) if turn[0].tool else (turn[0].content,)


def write_chatml(
    conversation: Conversation,
    tokenizer: Encoder,
    open: bool,
    last_only: bool,
    default: str | None = None,
    answer: Callable[[Sequence[Turn], int], tuple[Parts, Parts]] = answer,
    opening: Parts = (),
) -> Sample:
    """ChatML with tools in the system message; `default` stands for a missing one, `opening` behind the header that ends a prompt."""
    out, begun = Transcript(tokenizer), False
    messages = [m for m in conversation.messages if m.role != "system"]
    system = conversation.messages[0].content if len(messages) < len(conversation.messages) else default
    tools: list[str | Tag] = [part for tool in conversation.tools for part in ("\n", json.dumps(tool, ensure_ascii=False))]
    if tools:
        before = TOOLS_BEFORE if system is not None else (str(TOOLS_BEFORE[0]).lstrip("\n"), *TOOLS_BEFORE[1:])
        tools = [*before, *tools, *TOOLS_AFTER]

    def header(*parts: str | Tag) -> None:
        nonlocal begun
        if begun:
            out.text("\n")
        out.control("<|im_start|>")
        out.text(*parts)
        begun = True

    if system is not None or tools:
        header("system\n", system or "", *tools)
        out.control("<|im_end|>")
    found = list(marked(messages, open, last_only))
    for i, (turn, trained) in enumerate(found):
        if turn[0].role == "assistant":
            given, said = answer([turn for turn, _ in found], i)
            # apart from what follows: in generation, too, the answer begins after this
            header("assistant\n", *given)
            out.text(*said, trained=trained)
        elif turn[0].role == "observation":
            header("user", *(part for m in turn for part in ("\n", ANSWER, f"\n{m.content}\n", ANSWER_END)))
        else:
            header(f"{turn[0].role}\n{turn[0].content}")
        out.control("<|im_end|>", trained)
    if open:
        header("assistant\n", *opening)
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
