"""Lists of messages in the dialects people publish, read into our own. One rule: a turn is understood or reported, never guessed."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from trueline.data.conversation import Message, Role, role_problems
from trueline.data.record import kind

Note = Callable[[str, str], None]
"""Takes a problem: the field ("messages[2].content"), and what was found and expected."""

ROLE_NAMES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "observation",
    "tool": "observation",
    "function": "observation",
}


@dataclass(frozen=True)
class Turns:
    """Messages, the field each was read from, and the tools the assistant may call."""

    messages: tuple[Message, ...] = ()
    fields: tuple[str, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()

    def then(self, message: Message, field: str) -> "Turns":
        """One more turn at the end."""
        return Turns((*self.messages, message), (*self.fields, field), self.tools)

    def before(self, count: int) -> "Turns":
        """The first `count` turns."""
        return Turns(self.messages[:count], self.fields[:count], self.tools)


def read_turns(value: Any, field: str, note: Note) -> Turns:
    """A list of `{role, content}` or `{from, value}` (or its JSON text); names of roles as in ROLE_NAMES.

    A tool call is any of: role function_call with `{"name", "arguments"}` as text, OpenAI's `tool_calls`, GLM's `metadata` with the name,
    or an assistant's content that is exactly such an object and is followed by an observation. An empty system message is left out;
    `tools` are taken from it. `"weight": 0` or `"train": false` beside the content: not trained.
    """
    items = parsed(value)
    if not isinstance(items, list):
        note(field, f"{kind(value)}, expected a list of messages")
        return Turns()
    messages: list[Message] = []
    fields: list[str] = []
    tools: tuple[dict[str, Any], ...] = ()
    for i, item in enumerate(items):
        place = f"{field}[{i}]"
        if not isinstance(item, dict):
            note(place, f"{kind(item)}, expected an object with role and content")
            continue
        found = _read_message(item, place, note)
        if not _trained(item, place, note):
            found = [replace(message, trained=False) for message in found]
        messages += found
        fields += [place] * len(found)
        if item.get("role", item.get("from")) == "system" and not tools:
            tools = read_tools(item.get("tools"), f"{place}.tools", note)
    followers = [*messages[1:], None]
    called = [_called(message, follower) for message, follower in zip(messages, followers, strict=False)]
    return Turns(tuple(called), tuple(fields), tools)


def _trained(item: dict[str, Any], place: str, note: Note) -> bool:
    """False where the turn says it is not to be trained: weight 0 (OpenAI's fine-tuning files), or train false."""
    for key in ("weight", "train"):
        value = item.get(key)
        if value is not None and value not in (0, 1):
            expected = "0 or 1" if key == "weight" else "true or false"
            note(f"{place}.{key}", f"{json.dumps(value)}, expected {expected}")
        elif value is not None and not value:
            return False
    return True


def check_roles(turns: Turns, waiting: bool, note: Note) -> None:
    """Notes every breach of the role rules at the field of its turn."""
    for i, sentence in role_problems(turns.messages, waiting):
        note(turns.fields[i] if i < len(turns.fields) else "messages", sentence)


def _read_message(item: dict[str, Any], place: str, note: Note) -> list[Message]:
    """One turn; none when it is broken (noted) or an empty system message, several when it holds several calls."""
    role_key, content_key = ("from", "value") if "from" in item and "role" not in item else ("role", "content")
    name = item.get(role_key)
    role = ROLE_NAMES.get(name) if isinstance(name, str) else None
    if role is None:
        found = "missing" if role_key not in item else f'"{name}"' if isinstance(name, str) else kind(name)
        note(f"{place}.{role_key}", f"{found}, expected system, user, assistant or observation")
    if item.get("tool_calls"):
        if item.get(content_key):
            note(f"{place}.{content_key}", "text beside tool_calls, expected one of the two")
        return _openai_calls(item["tool_calls"], f"{place}.tool_calls", note)
    if content_key not in item:
        note(f"{place}.{content_key}", "missing, expected text")
        return []
    calls = _call_blocks(item[content_key], f"{place}.{content_key}", note) if role == "assistant" else []
    if calls:
        return calls
    content = _content(item[content_key], f"{place}.{content_key}", note)
    if content is None or role is None:
        return []
    if name == "function_call":
        return _calls(content, f"{place}.{content_key}", note)
    if not content.strip() and role in ("user", "assistant"):
        note(f"{place}.{content_key}", "empty, expected text")
        return []
    if not content.strip() and role == "system":
        return []
    metadata = item.get("metadata")
    return [Message(role, content, metadata if role == "assistant" and isinstance(metadata, str) and metadata else None)]


def _content(value: Any, field: str, note: Note) -> str | None:
    """Text, or the texts of a list of `{"type": "text"}` blocks one after the other.

    Blocks of type reasoning are left out: the templates we render have no place for them.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        note(field, f"{kind(value)}, expected text")
        return None
    texts: list[str] = []
    for i, block in enumerate(value):
        if isinstance(block, dict) and block.get("type") == "reasoning":
            continue
        found = block.get("text", block.get("value")) if isinstance(block, dict) and block.get("type") == "text" else None
        if not isinstance(found, str):
            what = f"block of type {block.get('type')}" if isinstance(block, dict) else kind(block)
            note(f"{field}[{i}]", f'{what}, expected {{"type": "text", "text": ...}}; other blocks are not supported')
            return None
        texts.append(found)
    return "".join(texts)


def _call_blocks(value: Any, field: str, note: Note) -> list[Message]:
    """The calls of a list of `{"type": "tool_call", "value": ...}` blocks; text beside them is refused."""
    blocks = value if isinstance(value, list) else []
    calls = [(i, b) for i, b in enumerate(blocks) if isinstance(b, dict) and b.get("type") == "tool_call"]
    if calls and any(isinstance(b, dict) and b.get("type") == "text" for b in blocks):
        note(field, "text beside tool calls, expected one of the two")
    found: list[Message] = []
    for i, block in calls:
        text = block.get("value", block.get("text"))
        found += _calls(text if isinstance(text, str) else json.dumps(text), f"{field}[{i}]", note)
    return found


def _called(message: Message, follower: Message | None) -> Message:
    """The GLM-4 fine-tuning page writes calls as content; only an observation behind it tells that it was one."""
    if message.role != "assistant" or message.tool or follower is None or follower.role != "observation":
        return message
    call = _call(parsed(message.content))
    return replace(call, trained=message.trained) if call else message


def _call(value: Any) -> Message | None:
    """`{"name": ..., "arguments": {...}}` as the assistant's call; arguments may be JSON text."""
    if not isinstance(value, dict) or set(value) != {"name", "arguments"} or not isinstance(value["name"], str) or not value["name"]:
        return None
    arguments = parsed(value["arguments"])
    return Message("assistant", json.dumps(arguments, ensure_ascii=False), value["name"]) if isinstance(arguments, dict) else None


def _calls(content: str, field: str, note: Note) -> list[Message]:
    """A call, or a list of calls, as JSON text."""
    value = parsed(content)
    found = [_call(item) for item in (value if isinstance(value, list) and value else [value])]
    if None in found:
        note(field, 'not a tool call, expected JSON {"name": ..., "arguments": {...}}')
    return [message for message in found if message]


def _openai_calls(value: Any, field: str, note: Note) -> list[Message]:
    found: list[Message] = []
    for i, item in enumerate(value if isinstance(value, list) else [value]):
        function = item.get("function") if isinstance(item, dict) else None
        message = _call({key: function.get(key) for key in ("name", "arguments")}) if isinstance(function, dict) else None
        if message is None:
            note(f"{field}[{i}]", 'not a tool call, expected {"function": {"name": ..., "arguments": {...}}}')
        else:
            found.append(message)
    return found


def read_tools(value: Any, field: str, note: Note) -> tuple[dict[str, Any], ...]:
    """Tools as a list or as its JSON text; a bare `{"name", ...}` is wrapped as `{"type": "function", "function": ...}`."""
    tools = parsed(value)
    if tools is None or tools == "":
        return ()
    if not isinstance(tools, list):
        note(field, f"{kind(value)}, expected a list of tools or its JSON text")
        return ()
    found: list[dict[str, Any]] = []
    for i, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if isinstance(function, dict) and isinstance(function.get("name"), str) and function["name"]:
            found.append({"type": "function", "function": _without_null_properties(function)})
        else:
            note(f"{field}[{i}]", 'not a tool, expected {"type": "function", "function": {"name": ..., "parameters": {...}}}')
    return tuple(found)


def _without_null_properties(schema: Any) -> Any:
    """Tables give every tool the parameters of all tools, empty ones as null; a parameter that is null does not exist."""
    if isinstance(schema, list):
        return [_without_null_properties(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: _without_null_properties(item) for key, item in schema.items()}
    if isinstance(kept.get("properties"), dict):
        kept["properties"] = {key: item for key, item in kept["properties"].items() if item is not None}
    return kept


def parsed(value: Any) -> Any:
    """JSON text as its value; anything else, and text that is no JSON, as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
