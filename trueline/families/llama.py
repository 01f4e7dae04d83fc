"""Llama: the weight names Qwen2 and GLM share, the Llama 3 header format, and plain text for models without any."""

from typing import Any

from trueline.data.conversation import Conversation
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
PLAIN_STARTS = ("<s>", "<|begin_of_text|>")
PLAIN_ENDS = ("</s>", "<|end_of_text|>", "<|endoftext|>")


def read_config(config: dict[str, Any]) -> DecoderConfig:
    """transformers' LlamaConfig."""
    keys = Settings(config, "llama")
    hidden = keys.size("hidden_size", 4096)
    heads, kv_heads, head_dim = keys.heads(32, None, hidden)
    theta, share, scaling = keys.rope(1.0)
    if share != 1.0:
        keys.refuse("partial_rotary_factor: a llama model turns whole heads")
    bias = keys.flag("attention_bias", False)
    decoder = DecoderConfig(
        vocab_size=keys.size("vocab_size", 32000),
        hidden_size=hidden,
        num_layers=keys.size("num_hidden_layers", 32),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_size=keys.size("intermediate_size", 11008),
        norm_eps=keys.number("rms_norm_eps", 1e-6),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=keys.flag("mlp_bias", False),
        rope_theta=theta,
        rope_scaling=scaling,
        tied_embeddings=keys.flag("tie_word_embeddings", False),
        init_std=keys.number("initializer_range", 0.02),
    )
    keys.check()
    return decoder


def render(conversation: Conversation, tokenizer: Encoder, open: bool = False, last_only: bool = False) -> Sample:
    """Llama 3's headers where the tokenizer has them, plain text elsewhere.

    Trained: what the assistant says and the token that ends its turn (`last_only`: of its last turn). `open` ends with the assistant's
    header, and trains nothing. Neither form knows tools.
    """
    if conversation.tools or any(message.tool or message.role == "observation" for message in conversation.messages):
        raise UserError("this llama model has no format for tools; leave tools, calls and observations out, or use a qwen2 or glm model")
    return (_headers if HEADER in tokenizer.specials else _plain)(conversation, tokenizer, open, last_only)


def _headers(conversation: Conversation, tokenizer: Encoder, open: bool, last_only: bool) -> Sample:
    """Llama 3: `<|start_header_id|>role<|end_header_id|>`, two newlines, the content without outer blanks, `<|eot_id|>`."""
    out = Transcript(tokenizer)

    def header(role: str) -> None:
        out.control(HEADER)
        out.text(role)
        out.control("<|end_header_id|>")
        out.text("\n\n")

    out.control("<|begin_of_text|>")
    for (message, *_), trained in marked(conversation.messages, open, last_only):
        header(message.role)
        out.text(message.content.strip(), trained=trained)
        out.control("<|eot_id|>", trained)
    if open:
        header("assistant")
    return out.sample()


def _plain(conversation: Conversation, tokenizer: Encoder, open: bool, last_only: bool) -> Sample:
    """A model that was never taught turns: the start token where there is one, then the contents as they are, each answer ended.

    Every content is encoded on its own, so that an answer has the tokens it would be generated with.
    """
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
    stop=("<|eot_id|>", "<|end_of_text|>", "</s>", "<s>"),
    targets=TARGETS,
)
