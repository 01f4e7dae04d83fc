"""The families this program knows, by `model_type` of config.json."""

from difflib import get_close_matches
from typing import Any

from trueline.errors import UserError
from trueline.families.chatglm import CHATGLM
from trueline.families.family import Family
from trueline.families.glm4 import GLM4
from trueline.families.llama import LLAMA
from trueline.families.qwen2 import QWEN2

FAMILIES: dict[str, Family] = {family.name: family for family in (QWEN2, GLM4, LLAMA, CHATGLM)}


def family_of(config: dict[str, Any]) -> Family:
    """The family of a config.json; an unknown one is refused with the known and the nearest."""
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in FAMILIES:
        return FAMILIES[kind]
    known = ", ".join(sorted(FAMILIES))
    if not isinstance(kind, str):
        raise UserError(f"config.json: model_type is missing, expected one of {known}")
    near = get_close_matches(kind, FAMILIES, n=1, cutoff=0.5)
    raise UserError(f"config.json: model_type {kind!r} is not supported, only {known}" + (f"; nearest is {near[0]!r}" if near else ""))
