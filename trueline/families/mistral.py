"""Mistral: Llama's weights, a sliding window, and questions between `[INST]` and `[/INST]`."""

from typing import Any

from trueline.data.conversation import Conversation
from trueline.data.sample import Sample
from trueline.errors import UserError
from trueline.families.family import Encoder, Family
from trueline.families.llama import LLAMA, read_sizes
from trueline.families.settings import Settings
from trueline.families.transcript import Transcript, marked
from trueline.model.decoder import DecoderConfig


def read_config(config: dict[str, Any]) -> DecoderConfig:
    """transformers' MistralConfig: every layer has the window, null is none."""
    keys = Settings(config, "mistral")
    return read_sizes(keys, 8, 14336, None if config.get("sliding_window", 4096) is None else keys.size("sliding_window", 4096))


def render(conversation: Conversation, tokenizer: Encoder, open: bool = False, last_only: bool = False) -> Sample:
    """`<s>`, then each question in its brackets and each answer with `</s>`; every piece is encoded apart, as Mistral's own tokenizer does.

    Brackets are control tokens from version 0.3 on, text before. The system message stands before the first question, two newlines between.
    """
    if conversation.tools or any(message.tool or message.role == "observation" for message in conversation.messages):
        raise UserError("tools are not supported for mistral; leave tools, calls and observations out, or use a qwen2 or glm model")
    out = Transcript(tokenizer)
    out.control("<s>")
    before = ""
    for (message, *_), trained in marked(conversation.messages, open, last_only):
        if message.role == "assistant":
            out.text(message.content, trained=trained)
            out.control("</s>", trained)
        elif message.role == "system":
            before = message.content + "\n\n" if message.content else ""
        elif "[INST]" in tokenizer.specials:
            out.control("[INST]")
            out.text(before + message.content)
            out.control("[/INST]")
            before = ""
        else:
            out.text(f"[INST] {before}{message.content} [/INST]")
            before = ""
    return out.sample()


MISTRAL = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    scorer_architecture="MistralForSequenceClassification",
    read_config=read_config,
    weights=LLAMA.weights,
    render=render,
    stop=("</s>",),
    targets=LLAMA.targets,
)
