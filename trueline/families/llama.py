"""Llama: the weight names Qwen2 and GLM share, the Llama 3 header format, and plain text for models without any."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from trueline.data.conversation import Conversation, Message
from trueline.data.sample import Sample
from trueline.errors import UserError
from trueline.families.family import Encoder, Family, Weight
from trueline.families.settings import Settings
from trueline.families.transcript import Transcript, marked
from trueline.model.decoder import DecoderConfig

EMBEDDING = (Weight("model.embed_tokens.weight", ("embed.weight",)),)
ATTENTION = (
    Weight("model.layers.{}.input_layernorm.weight", ("layers.{}.attention_norm.weight",)),
    *(
        Weight(f"model.layers.{{}}.self_attn.{name}_proj.{kind}", (f"layers.{{}}.attention.{name}.{kind}",))
        for name in "qkvo"
        for kind in ("weight", "bias")
    ),
    Weight("model.layers.{}.post_attention_layernorm.weight", ("layers.{}.mlp_norm.weight",)),
)
MLP = tuple(
    Weight(f"model.layers.{{}}.mlp.{name}_proj.{kind}", (f"layers.{{}}.mlp.{name}.{kind}",))
    for name in ("gate", "up", "down")
    for kind in ("weight", "bias")
)
ENDING = (Weight("model.norm.weight", ("norm.weight",)), Weight("lm_head.weight", ("head.weight",)))
TARGETS = {name: f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}

HEADER = "<|start_header_id|>"
EOM = "<|eom_id|>"  # only Llama 3.1's tokenizer and later ones have it
# facts of the published 3.1 template, needed token for token
DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
TOOLS_BEFORE = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that best answers the given "
    'prompt.\n\nRespond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
    "Do not use variables.\n\n"
)
PLAIN_STARTS = ("<s>", "<|begin_of_text|>")
PLAIN_ENDS = ("</s>", "<|end_of_text|>", "<|endoftext|>")


def read_config(config: dict[str, Any]) -> DecoderConfig:
    """transformers' LlamaConfig."""
    return read_sizes(Settings(config, "llama"), None, 11008, window=None)


def read_sizes(keys: Settings, kv_heads: int | None, mlp_size: int, window: int | None) -> DecoderConfig:
    """Llama's, or Mistral's with other defaults and one `window` for every layer."""
    hidden = keys.size("hidden_size", 4096)
    heads, kv_heads, head_dim = keys.heads(32, kv_heads, hidden)
    theta, share, scaling = keys.rope(1.0)
    if share != 1.0:
        keys.refuse(f"partial_rotary_factor: a {keys.family} model turns whole heads")
    layers = keys.size("num_hidden_layers", 32)
    bias = keys.flag("attention_bias", False)
    decoder = DecoderConfig(
        vocab_size=keys.size("vocab_size", 32000),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_size=keys.size("intermediate_size", mlp_size),
        norm_eps=keys.number("rms_norm_eps", 1e-6),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=keys.flag("mlp_bias", False),
        rope_theta=theta,
        rope_scaling=scaling,
        windows=(window,) * layers if window else (),
        tied_embeddings=keys.flag("tie_word_embeddings", False),
        init_std=keys.number("initializer_range", 0.02),
    )
    keys.check()
    return decoder


def render(conversation: Conversation, tokenizer: Encoder, open: bool = False, last_only: bool = False) -> Sample:
    """Llama 3's headers where the tokenizer has them, plain text elsewhere.

    Trained: what the assistant says and the token that ends its turn (`last_only`: of its last turn). `open` ends with the assistant's
    header, and trains nothing. Tools are known from Llama 3.1 on.
    """
    if HEADER not in tokenizer.specials:
        return render_plain(conversation, tokenizer, open, last_only)
    if EOM in tokenizer.specials:
        return _headers_3_1(conversation, tokenizer, open, last_only)
    _refuse_tools(conversation)
    return _headers([replace(m, content=m.content.strip()) for m in conversation.messages], tokenizer, open, last_only)


def _refuse_tools(conversation: Conversation) -> None:
    if conversation.tools or any(message.tool or message.role == "observation" for message in conversation.messages):
        raise UserError("this llama model has no format for tools; leave tools, calls and observations out, or use a qwen2 or glm model")


def _headers_3_1(conversation: Conversation, tokenizer: Encoder, open: bool, last_only: bool) -> Sample:
    """Llama 3.1 and later: dates before the system message, tools before the first question, calls as JSON, results from `ipython`.

    Always with the date that 3.1's template has where the caller names none: a prompt must not change from one day to the next.
    """
    messages = list(conversation.messages)
    system = messages.pop(0).content if messages and messages[0].role == "system" else ""
    written = [Message("system", ("Environment: ipython\n" if conversation.tools else "") + DATES + system.strip())]
    tools = "".join(json.dumps(tool, ensure_ascii=False, indent=4) + "\n\n" for tool in conversation.tools)
    for i, (message, after) in enumerate(zip(messages, [*messages[1:], None], strict=True)):
        if message.tool and after is not None and after.tool:
            raise UserError("Llama 3.1 has no format for several tool calls in a row; write one call and its observation after the other")
        content = message.content.strip()
        if message.tool:
            content = f'{{"name": "{message.tool}", "parameters": {message.content}}}'
        elif message.role == "observation":
            content = json.dumps(message.content, ensure_ascii=False)
        elif i == 0 and tools:
            content = TOOLS_BEFORE + tools + content
        written.append(replace(message, content=content, tool=None))
    return _headers(written, tokenizer, open, last_only)


def _headers(messages: Sequence[Message], tokenizer: Encoder, open: bool, last_only: bool) -> Sample:
    """Llama 3: `<|start_header_id|>role<|end_header_id|>`, two newlines, the content without outer blanks, `<|eot_id|>`."""
    out = Transcript(tokenizer)

    def header(role: str) -> None:
        out.control(HEADER)
        out.text(role)
        out.control("<|end_header_id|>")
        out.text("\n\n")

    out.control("<|begin_of_text|>")
    for (message, *_), trained in marked(messages, open, last_only):
        header("ipython" if message.role == "observation" else message.role)
        out.text(message.content, trained=trained)
        out.control("<|eot_id|>", trained)
    if open:
        header("assistant")
    return out.sample()


def render_plain(conversation: Conversation, tokenizer: Encoder, open: bool = False, last_only: bool = False) -> Sample:
    """A model that was never taught turns: the start token where there is one, then the contents as they are, each answer ended.

    Every content is encoded on its own, so that an answer has the tokens it would be generated with.
    """
    _refuse_tools(conversation)
    out = Transcript(tokenizer)
    for start in PLAIN_STARTS:
        if start in tokenizer.specials:
            out.control(start)
            break
    end = next((name for name in PLAIN_ENDS if name in tokenizer.specials), PLAIN_ENDS[0])
    # SentencePiece tokenizers put a blank before every text: there, the blank a continuation begins with is not written twice
    blank = tokenizer.encode(" a")[1:] == tokenizer.encode("a")
    goes_on = False
    for (message, *_), trained in marked(conversation.messages, open, last_only):
        out.text(message.content.removeprefix(" ") if blank and goes_on else message.content, trained=trained)
        goes_on = message.role != "assistant"
        if not goes_on:
            out.control(end, trained)
    return out.sample()


LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    scorer_architecture="LlamaForSequenceClassification",
    read_config=read_config,
    weights=(*EMBEDDING, *ATTENTION, *MLP, *ENDING),
    render=render,
    stop=("<|eot_id|>", EOM, "<|end_of_text|>", "</s>", "<s>"),
    targets=TARGETS,
)
