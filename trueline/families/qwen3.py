"""Qwen3: Qwen2.5's ChatML without a default system message, and thoughts between `<think>` and `</think>` before the last answer."""

from collections.abc import Sequence
from typing import Any

from trueline.data.conversation import Conversation
from trueline.data.sample import Sample
from trueline.families.family import Encoder, Family, Weight
from trueline.families.qwen2 import QWEN2, Parts, Turn, calls, read_sizes, write_chatml
from trueline.families.settings import Settings
from trueline.families.transcript import Tag
from trueline.model.decoder import DecoderConfig

THINK, THINK_END = Tag("<think>"), Tag("</think>")
NO_THOUGHT = (THINK, "\n\n", THINK_END, "\n\n")


def read_config(config: dict[str, Any]) -> DecoderConfig:
    """transformers' Qwen3Config."""
    return read_sizes(Settings(config, "qwen3"), head_dim=128)


def render(conversation: Conversation, tokenizer: Encoder, open: bool = False, last_only: bool = False) -> Sample:
    """The published template, less the newline after the last `<|im_end|>`.

    Thoughts are kept behind the user's last message only, and the last answer always has its block, empty if it has no thoughts: that is
    what the model is trained to write. `open` ends with the assistant's header.
    """
    return write_chatml(conversation, tokenizer, open, last_only, answer=_thinking)


def render_no_thinking(conversation: Conversation, tokenizer: Encoder, open: bool = False, last_only: bool = False) -> Sample:
    """Their enable_thinking=False: the empty block is part of the prompt, and thoughts in the data are left out."""
    return write_chatml(conversation, tokenizer, open, last_only, answer=_not_thinking, opening=NO_THOUGHT)


def _thinking(turns: Sequence[Turn], i: int) -> tuple[Parts, Parts]:
    thought, said = _said(turns, i)
    asked = max(k for k, turn in enumerate(turns) if turn[0].role == "user")
    block = (THINK, f"\n{thought}\n", THINK_END, "\n\n") if i > asked and (i == len(turns) - 1 or thought) else ()
    return (), (*block, *said)


def _not_thinking(turns: Sequence[Turn], i: int) -> tuple[Parts, Parts]:
    return NO_THOUGHT if i == len(turns) - 1 else (), _said(turns, i)[1]


def _said(turns: Sequence[Turn], i: int) -> tuple[str, Parts]:
    """The thoughts of turn `i`, "" without any, and the rest of it."""
    turn, last = turns[i], i == len(turns) - 1
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
    answers_apart=True,
    stop=QWEN2.stop,
    targets=QWEN2.targets,
)
