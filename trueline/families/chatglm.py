"""ChatGLM-6B: a prefix language model. The prompt is a context seen both ways, `<sop>` begins the answer and `<eop>` ends it.

So an answer can only be trained as the last one of its sample: earlier ones are part of the context. `<sop>` belongs to the prompt.
"""

from typing import Any

import torch
from torch import Tensor

from trueline.data.conversation import Conversation
from trueline.data.sample import Blocks, Sample
from trueline.errors import UserError
from trueline.families.family import Encoder, Family, Weight
from trueline.families.settings import Settings
from trueline.families.transcript import Transcript
from trueline.model.decoder import DecoderConfig

# facts of the published template, needed token for token
ROUND, QUESTION, ANSWER = "[Round {}]\n", "问：{}\n", "答："


def split_heads(fused: Tensor, config: DecoderConfig) -> list[Tensor]:
    """`[H 3 d, ...]`, whose rows are q, k and v of head 0, then of head 1, to q, k and v `[H d, ...]`."""
    return [part.flatten(0, 1) for part in fused.unflatten(0, (config.num_heads, 3, config.head_dim)).unbind(1)]


def join_heads(parts: list[Tensor], config: DecoderConfig) -> Tensor:
    return torch.stack([part.unflatten(0, (config.num_heads, config.head_dim)) for part in parts], dim=1).flatten(0, 2)


def read_config(config: dict[str, Any]) -> DecoderConfig:
    """The authors' ChatGLMConfig, with its defaults.

    Their scores are divided by layer + 1 and multiplied again before the softmax, against overflow in float16: nothing to do here.
    """
    keys = Settings(config, "chatglm")
    hidden = keys.size("hidden_size", 4096)
    heads, _, head_dim = keys.heads(32, None, hidden)
    if head_dim % 4:
        keys.refuse(f"num_attention_heads: a head has {head_dim} channels, expected a multiple of 4 (two positions turn a half each)")
    if "inner_hidden_size" not in config and "position_encoding_2d" not in config:
        keys.refuse("inner_hidden_size and position_encoding_2d are missing: this is no ChatGLM-6B, but a later model of the same type")
    keys.only("position_encoding_2d", True, True)
    keys.only("pre_seq_len", None, None)
    keys.only("quantization_bit", 0, 0)
    decoder = DecoderConfig(
        vocab_size=keys.size("vocab_size", 130528),
        hidden_size=hidden,
        num_layers=keys.size("num_layers", 28),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        mlp_size=keys.size("inner_hidden_size", 4 * hidden),
        norm_eps=keys.number("layernorm_epsilon", 1e-5),
        o_bias=True,
        mlp_bias=True,
        rope_rows=True,
        norm="layer",
        gated=False,
        # sqrt(2 * 28) whatever num_layers: the published code never hands its blocks another number
        residual_scale=56**0.5,
        blocks=Blocks(
            start=keys.size("bos_token_id", 130004, least=0),
            masks=(keys.size("gmask_token_id", 130001, least=0), keys.size("mask_token_id", 130000, least=0)),
        ),
        prefix_shifts=False,
        tied_embeddings=keys.flag("tie_word_embeddings", False),
        init_std=keys.number("initializer_range", 0.02),
    )
    keys.check()
    return decoder


def render(conversation: Conversation, tokenizer: Encoder, open: bool = False, last_only: bool = False) -> Sample:
    """One question as it is, several as numbered rounds; then `[gMASK]<sop>`, the last answer and `<eop>`.

    Trained: the last answer and its `<eop>`. The template knows no system message; it goes before everything, as a paragraph of its own.
    `open` ends with `<sop>`, and trains nothing. Tools are refused.
    """
    if conversation.tools or any(message.tool or message.role == "observation" for message in conversation.messages):
        raise UserError("ChatGLM-6B has no format for tools; leave tools, calls and observations out, or use a qwen2 or glm model")
    messages = list(conversation.messages)
    answer = messages.pop() if messages and messages[-1].role == "assistant" and not open else None
    system = "".join(f"{m.content}\n" for m in messages if m.role == "system" and m.content)
    said = [m for m in messages if m.role != "system"]
    if len(said) == 1:
        prompt = said[0].content
    else:
        prompt, number = "", 0
        for message in said:
            if message.role == "user":
                prompt += ROUND.format(number) + QUESTION.format(message.content) + ANSWER
                number += 1
            else:
                prompt += message.content + "\n"
    out = Transcript(tokenizer)
    out.text(system + prompt)
    anchor = len(out.tokens)
    out.control("[gMASK]")
    out.control("<sop>")
    if answer is not None:
        out.text(answer.content, trained=answer.trained)
        out.control("<eop>", trained=answer.trained)
    return Sample(out.tokens, out.trained, anchor + 1, anchor)


def _linear(theirs: str, ours: str) -> tuple[Weight, ...]:
    return tuple(Weight(f"transformer.layers.{{}}.{theirs}.{kind}", (f"layers.{{}}.{ours}.{kind}",)) for kind in ("weight", "bias"))


CHATGLM = Family(
    name="chatglm",
    architecture="ChatGLMForConditionalGeneration",
    scorer_architecture="ChatGLMForSequenceClassification",  # a name of ours: nobody published a class
    read_config=read_config,
    weights=(
        Weight("transformer.word_embeddings.weight", ("embed.weight",)),
        *_linear("input_layernorm", "attention_norm"),
        *(
            Weight(
                f"transformer.layers.{{}}.attention.query_key_value.{kind}",
                tuple(f"layers.{{}}.attention.{name}.{kind}" for name in "qkv"),
                split_heads,
                join_heads,
            )
            for kind in ("weight", "bias")
        ),
        *_linear("attention.dense", "attention.o"),
        *_linear("post_attention_layernorm", "mlp_norm"),
        *_linear("mlp.dense_h_to_4h", "mlp.up"),
        *_linear("mlp.dense_4h_to_h", "mlp.down"),
        *(Weight(f"transformer.final_layernorm.{kind}", (f"norm.{kind}",)) for kind in ("weight", "bias")),
        Weight("lm_head.weight", ("head.weight",)),
    ),
    render=render,
    stop=("<eop>",),
    targets={**dict.fromkeys("qkv", "query_key_value"), "o": "dense", "up": "dense_h_to_4h", "down": "dense_4h_to_h"},
    answers_apart=True,
    head_optional=True,
)
