"""The families this program knows, which one a config.json means, and the templates by name."""

from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from trueline.errors import UserError
from trueline.families.chatglm import CHATGLM
from trueline.families.chatglm2 import BY_HEAD, CHATGLM2, CHATGLM3, GLM4_ORIGINAL
from trueline.families.family import Family
from trueline.families.glm4 import GLM4, GLM4_0414
from trueline.families.llama import LLAMA, render_plain
from trueline.families.mistral import MISTRAL
from trueline.families.qwen2 import QWEN2, render_chatml
from trueline.families.qwen3 import QWEN3, render_no_thinking

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (QWEN2, QWEN3, GLM4, GLM4_0414, LLAMA, MISTRAL, CHATGLM, CHATGLM2, CHATGLM3, GLM4_ORIGINAL)
}
CHATGLMS = {"chatglm2": CHATGLM2, "chatglm3": CHATGLM3, "chatglm4": GLM4_ORIGINAL, "glm-4": GLM4_ORIGINAL, "glm4": GLM4_ORIGINAL}
TEMPLATES = {
    "chatml": replace(QWEN2, render=render_chatml),
    "plain": replace(LLAMA, render=render_plain),
    "llama3": LLAMA,
    "qwen3_no_thinking": replace(QWEN3, render=render_no_thinking),
    **{name: family for name, family in FAMILIES.items() if name not in ("llama", "chatglm4", "chatglm")},
}
"""Whose renderer and stop tokens each `model.template` is. ChatGLM-6B's needs its own network."""


def family_of(config: dict[str, Any]) -> Family:
    """The family of a config.json; an unknown one is refused with the known and the nearest."""
    kind = config.get("model_type")
    known = ", ".join(sorted({*FAMILIES} - {"chatglm2", "chatglm3", "chatglm4"}))  # these three have chatglm's model_type
    if not isinstance(kind, str):
        raise UserError(f"config.json: model_type is missing, expected one of {known}")
    if kind == "chatglm":
        return _chatglm(config)
    if kind in FAMILIES and kind in known.split(", "):
        return FAMILIES[kind]
    near = get_close_matches(kind, known.split(", "), n=1, cutoff=0.5)
    raise UserError(f"config.json: model_type {kind!r} is not supported, only {known}" + (f"; nearest is {near[0]!r}" if near else ""))


def with_template(family: Family, name: str) -> Family:
    """`family` with another's way to write conversations down; "auto" is its own."""
    if name == "auto":
        return family
    if name not in TEMPLATES:
        raise UserError(f"model.template: {name!r} is not known, expected auto or one of {', '.join(sorted(TEMPLATES))}")
    other = TEMPLATES[name]
    return replace(family, render=other.render, stop=other.stop, answers_apart=other.answers_apart, template=name)


def _chatglm(config: dict[str, Any]) -> Family:
    """Four generations share a model_type. The name says which; without it, the keys that only one of them has.

    ChatGLM2 and 3 cannot be told apart without a name: then it is the newer.
    """
    if "position_encoding_2d" in config or "inner_hidden_size" in config:
        return CHATGLM
    name = str(config.get("_name_or_path", "")).lower()
    named = [family for part, family in CHATGLMS.items() if part in name]
    if named:
        family = named[0]
    else:
        vocabulary = config.get("padded_vocab_size")
        large = isinstance(vocabulary, int) and vocabulary > 100_000
        family = GLM4_ORIGINAL if large or (vocabulary != 65024 and "rope_ratio" in config) else CHATGLM3
    return family if config.get("multi_query_attention") else replace(family, weights=BY_HEAD)
