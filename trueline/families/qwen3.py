"""Qwen3: Qwen2.5's ChatML without a default system message, and thoughts between `<think>` and `</think>` before the last answer."""

from typing import Any

from trueline.data.conversation import Conversation, Message
from trueline.data.sample import Sample
from trueline.families.family import Encoder, Family, Weight
from trueline.families.qwen2 import QWEN2, calls, read_sizes, write_chatml
from trueline.families.settings import Settings
from trueline.families.transcript import Tag, Transcript, marked
from trueline.model.decoder import DecoderConfig

THINK, THINK_END = Tag("<think>"), Tag("</think>")
NO_THOUGHT = (THINK, "\n\n", THINK_END, "\n\n")


def read_config(config: dict[str, Any]) -> DecoderConfig:
    """transformers' Qwen3Config."""
    return read_sizes(Settings(config, "qwen3"), head_dim=128)


def render(
    conversation: Conversation, tokenizer: Encoder, open: bool = False, last_only: bool = False, thinking: bool = True
) -> Sample:
    """The published template, less the newline after the last `<|im_end|>`.

    Thoughts are kept behind the user's last message only, and the last answer always has its block, empty if it has no thoughts: that is
    what the model is trained to write. `open` ends with the assistant's header; without `thinking` the empty block is part of the prompt
    (their enable_thinking=False), and thoughts in the data are left out.
    """
    out = Transcript(tokenizer)
    messages = [m for m in conversation.messages if m.role != "system"]
    system = conversation.messages[0].content if len(messages) < len(conversation.messages) else None
    begun = write_chatml(out, system, conversation.tools)
    found = list(marked(messages, open, last_only))
    asked = max((i for i, (turn, _) in enumerate(found) if turn[0].role == "user"), default=-1)
    for i, (turn, trained) in enumerate(found):
        out.text("\n" if begun else "")
        begun = True
        out.control("<|im_start|>")
        if turn[0].role == "assistant":
            thought, said = _said(turn, i == len(found) - 1)
            out.text("assistant\n")
            if i > asked and thinking and (i == len(found) - 1 or thought):
                said = [THINK, f"\n{thought}\n", THINK_END, "\n\n", *said]
            elif i == len(found) - 1:
                out.text(*NO_THOUGHT)
            out.text(*said, trained=trained)
        elif turn[0].role == "observation":
            out.text("user", *(part for m in turn for part in ("\n", Tag("<tool_response>"), f"\n{m.content}\n", Tag("</tool_response>"))))
        else:
            out.text(f"{turn[0].role}\n{turn[0].content}")
        out.control("<|im_end|>", trained)
    if open:
        out.text("\n" if begun else "")
        out.control("<|im_start|>")
        out.text("assistant\n", *(() if thinking else NO_THOUGHT))
    return out.sample()


def render_no_thinking(conversation: Conversation, tokenizer: Encoder, open: bool = False, last_only: bool = False) -> Sample:
    """`render` with enable_thinking=False."""
    return render(conversation, tokenizer, open, last_only, thinking=False)


def _said(turn: tuple[Message, ...], last: bool) -> tuple[str, list[str | Tag]]:
    """An answer's thoughts, "" without any, and the rest of it."""
    if turn[0].tool:
        return "", calls(turn)
    before, mark, after = turn[0].content.rpartition("</think>")
    if not mark:
        return "", [after.lstrip("\n") if last else after]
    return before.split("</think>")[0].rstrip("\n").split("<think>")[-1].strip("\n"), [after.lstrip("\n")]


QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    scorer_architecture="Qwen3ForSequenceClassification",
    read_config=read_config,
    weights=(
        *QWEN2.weights[:-2],
        *(Weight(f"model.layers.{{}}.self_attn.{n}_norm.weight", (f"layers.{{}}.attention.{n}_norm.weight",)) for n in "qk"),
        *QWEN2.weights[-2:],
    ),
    render=render,
    stop=QWEN2.stop,
    targets=QWEN2.targets,
)
