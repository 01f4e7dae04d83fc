"""The corrections that `repair` makes in one record: in its text, so that it can be read, and in its value, so that it is understood."""

import json
import re
from collections import Counter
from typing import Any

from trueline.data.messages import ROLE_NAMES, parsed
from trueline.data.schemas import COLUMNS

_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|,(?=\s*(?:[}\]]|$))|-?\b(?:NaN|Infinity|None|True|False)\b', re.DOTALL)
_CONTROL = re.compile(r"[\x01-\x1f]")
_CONSTANTS = {"None": "null", "True": "true", "False": "false"}
TEXTS = {name for pair in COLUMNS for name in pair} | {"instruction", "output", "chosen", "rejected", "pos_resp", "neg_resp", "system"}
LISTS = ("messages", "conversations", "prompt", "chosen", "rejected")
NAMES = TEXTS | set(LISTS) | {"history", "tools", "label"}
ALIASES = {"bot": "assistant", "model": "assistant", "ai": "assistant", "chatgpt": "assistant", "prompter": "user", "question": "user"}


class _Contradiction(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for name, item in pairs:
        if name in value and value[name] != item:
            raise _Contradiction(name)
        value[name] = item
    return value


def mended(text: str, fixes: Counter[str]) -> list[Any]:
    """The values of text that is no JSON because of trailing commas, Python's constants, NaN, line breaks in texts, a key twice with one
    value, or several records on one line; nothing when there is more wrong with it."""
    found: Counter[str] = Counter()

    def replace(match: re.Match[str]) -> str:
        token = match.group()
        if token[0] == '"':
            found["control character in a text"] += len(_CONTROL.findall(token))
            return _CONTROL.sub(lambda c: json.dumps(c.group())[1:-1], token)
        if token == ",":
            found["trailing comma"] += 1
            return ""
        found["Python constant" if token in _CONSTANTS else "NaN or Infinity"] += 1
        return _CONSTANTS.get(token, "null")

    clean, decoder = _TOKENS.sub(replace, text).strip(), json.JSONDecoder(object_pairs_hook=_object)
    values: list[Any] = []
    at = 0
    while at < len(clean):
        try:
            value, at = decoder.raw_decode(clean, at)
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except (ValueError, RecursionError):  # surrogates that are halves raise a ValueError too
            return []
        values.append(value)
        at += len(clean[at:]) - len(clean[at:].lstrip(" \t\r\n,"))
    if len(values) > 1:
        found["several records on one line"] += 1
    fixes.update(+found if +found else Counter({"key twice with one value": 1}))
    return values


def fixed_value(value: Any, fixes: Counter[str]) -> Any:
    """The record with names, roles, types and blanks put right."""
    if isinstance(value, str) and isinstance(parsed(value), dict):
        fixes["record inside a text"] += 1
        value = parsed(value)
    if not isinstance(value, dict):
        return value
    record: dict[str, Any] = {}
    for name, item in value.items():
        right = name.strip().strip("\ufeff").lower()
        if name not in NAMES and right in NAMES and right not in value and right not in record:
            fixes["field name"] += 1
            name = right
        if item is None:
            fixes["null field"] += 1
        else:
            record[name] = item
    for name, item in record.items():
        if name in ("tools", "messages", "conversations") and isinstance(item, str) and isinstance(parsed(item), list):
            fixes[f"{'tools' if name == 'tools' else 'messages'} as text"] += 1
            record[name] = item = parsed(item)
        if name in LISTS and isinstance(item, list):
            record[name] = _fixed_messages(item, fixes)
        elif name in LISTS and isinstance(item, dict):
            record[name] = _fixed_message(item, fixes)
        elif name in TEXTS:
            record[name] = _fixed_text(item, fixes)
    return record


def _fixed_messages(items: list[Any], fixes: Counter[str]) -> list[Any]:
    kept = []
    for item in items:
        fixed = _fixed_message(item, fixes) if isinstance(item, dict) else item
        if isinstance(fixed, dict) and fixed.get("role", fixed.get("from")) == "system" and not fixed.get("tools"):
            if fixed.get("content", fixed.get("value")) in ("", None):
                fixes["empty system message"] += 1
                continue
        kept.append(fixed)
    return kept


def _fixed_message(item: dict[str, Any], fixes: Counter[str]) -> dict[str, Any]:
    fixed = dict(item)
    role = "from" if "from" in item and "role" not in item else "role"
    name = fixed.get(role)
    if isinstance(name, str) and name not in ROLE_NAMES:
        plain = name.strip().lower()
        right = plain if plain in ROLE_NAMES else ALIASES.get(plain)
        if right is not None:
            fixes["role name"] += 1
            fixed[role] = right
    for key in ("content", "value"):
        if key in fixed:
            fixed[key] = _fixed_text(fixed[key], fixes)
    return fixed


def _fixed_text(value: Any, fixes: Counter[str]) -> Any:
    """Numbers as text, and texts without blanks at their end or empty lines before them; the indent of a first line may be code's."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        fixes["number instead of text"] += 1
        return json.dumps(value)
    if not isinstance(value, str):
        return value
    fixed = re.sub(r"\A(?:[ \t]*[\r\n]+|\ufeff)+", "", value).rstrip()
    if fixed != value and not value.startswith("\n\nHuman:"):
        fixes["blanks around a text"] += 1
        return fixed
    return value
