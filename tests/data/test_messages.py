"""Message lists of every dialect read alike; what is not understood is named at its field."""

import json
from typing import Any

import pytest

from trueline.data.conversation import Message
from trueline.data.messages import Turns, read_tools, read_turns

CALL = {"name": "天气", "arguments": {"city": "北京", "days": 2}}
ARGUMENTS = '{"city": "北京", "days": 2}'


def read(value: Any) -> tuple[Turns, list[tuple[str, str]]]:
    problems: list[tuple[str, str]] = []
    return read_turns(value, "m", lambda field, what: problems.append((field, what))), problems


def chat(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def test_dialects_read_alike() -> None:
    expected = (Message("system", "s"), Message("user", "u"), Message("assistant", "a"))
    ours = chat(("system", "s"), ("user", "u"), ("assistant", "a"))
    theirs = [{"from": "system", "value": "s"}, {"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]
    blocks = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in ours]
    for value in (ours, theirs, blocks, json.dumps(ours)):
        assert read(value) == (Turns(expected, ("m[0]", "m[1]", "m[2]")), [])


@pytest.mark.parametrize(
    "call",
    [
        {"role": "assistant", "content": json.dumps(CALL)},
        {"role": "assistant", "content": json.dumps(CALL, ensure_ascii=False, indent=1)},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "function_call", "value": json.dumps([CALL])},
        {"role": "assistant", "metadata": "天气", "content": ARGUMENTS},
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "天气", "arguments": json.dumps(CALL["arguments"])}}]},
    ],
)
@pytest.mark.parametrize("observation", ["observation", "tool"])
def test_tool_calls_of_every_kind(call: dict[str, Any], observation: str) -> None:
    turns, problems = read([*chat(("user", "u")), call, *chat((observation, "晴"), ("assistant", "a"))])
    assert not problems
    assert turns.messages == (
        Message("user", "u"),
        Message("assistant", ARGUMENTS, "天气"),
        Message("observation", "晴"),
        Message("assistant", "a"),
    )


def test_several_calls_in_one_turn() -> None:
    for call in (
        {"from": "function_call", "value": json.dumps([CALL, CALL])},
        {"role": "assistant", "content": "", "tool_calls": [{"function": CALL}, {"function": CALL}]},
    ):
        turns, problems = read([call])
        assert turns == Turns((Message("assistant", ARGUMENTS, "天气"),) * 2, ("m[0]", "m[0]")) and not problems


@pytest.mark.parametrize(
    "content", [json.dumps(CALL), '{"name": "x"}', '{"name": "x", "arguments": {}, "id": 1}', '{"name": 1, "arguments": {}}', "[1]", "3"]
)
def test_json_stays_content_where_it_is_no_call(content: str) -> None:
    """No observation behind it, or another shape."""
    turns, problems = read(chat(("assistant", content)))
    assert turns.messages == (Message("assistant", content),) and not problems
    if content != json.dumps(CALL):
        assert read(chat(("assistant", content), ("observation", "o")))[0].messages[0].tool is None


def test_tools_come_from_the_system_message_which_may_be_empty() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "string"}, "b": None}}}}]
    turns, problems = read([{"role": "system", "content": "", "tools": tools}, {"role": "user", "content": "u"}])
    assert turns.messages == (Message("user", "u"),) and turns.fields == ("m[1]",) and not problems
    assert turns.tools == ({"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "string"}}}}},)


def test_tools_of_every_kind() -> None:
    wrapped = ({"type": "function", "function": {"name": "f", "description": "d"}},)
    bare = [{"name": "f", "description": "d"}]
    for value in (bare, json.dumps(bare), list(wrapped), json.dumps(wrapped)):
        assert read_tools(value, "tools", lambda field, what: pytest.fail(what)) == wrapped
    for empty in (None, "", [], "[]"):
        assert read_tools(empty, "tools", lambda field, what: pytest.fail(what)) == ()


@pytest.mark.parametrize(
    ("value", "field", "sentence"),
    [
        ("no json", "tools", "text, expected a list of tools or its JSON text"),
        ({"name": "f"}, "tools", "an object, expected a list of tools"),
        ([{"name": "f"}, {"description": "d"}], "tools[1]", "not a tool, expected"),
        ([{"type": "function", "function": {"name": ""}}], "tools[0]", "not a tool, expected"),
        (["f"], "tools[0]", "not a tool, expected"),
    ],
)
def test_broken_tools(value: Any, field: str, sentence: str) -> None:
    problems: list[tuple[str, str]] = []
    read_tools(value, "tools", lambda field, what: problems.append((field, what)))
    assert len(problems) == 1 and problems[0][0] == field and sentence in problems[0][1]


@pytest.mark.parametrize(
    ("value", "field", "sentence"),
    [
        ({"role": "user"}, "m", "an object, expected a list of messages"),
        ("hello", "m", "text, expected a list of messages"),
        (None, "m", "null, expected a list of messages"),
        (["hello"], "m[0]", "text, expected an object with role and content"),
        ([{"content": "x"}], "m[0].role", "missing, expected system, user, assistant or observation"),
        ([{"role": "boss", "content": "x"}], "m[0].role", '"boss", expected system, user, assistant or observation'),
        ([{"role": 3, "content": "x"}], "m[0].role", "a number, expected"),
        ([{"from": "bot", "value": "x"}], "m[0].from", '"bot", expected'),
        ([{"role": "user"}], "m[0].content", "missing, expected text"),
        ([{"from": "human"}], "m[0].value", "missing, expected text"),
        ([{"role": "user", "content": 5}], "m[0].content", "a number, expected text"),
        ([{"role": "user", "content": None}], "m[0].content", "null, expected text"),
        ([{"role": "user", "content": " \n"}], "m[0].content", "empty, expected text"),
        ([{"role": "assistant", "content": ""}], "m[0].content", "empty, expected text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "m[0].content[0]", "block of type image, expected"),
        ([{"role": "user", "content": ["x"]}], "m[0].content[0]", "text, expected"),
        ([{"from": "function_call", "value": "f(1)"}], "m[0].value", "not a tool call, expected JSON"),
        ([{"from": "function_call", "value": "[]"}], "m[0].value", "not a tool call, expected JSON"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "x"}}]}], "m[0].tool_calls[0]", "not a tool call"),
        ([{"role": "assistant", "tool_calls": "f"}], "m[0].tool_calls[0]", "not a tool call"),
        ([{"role": "assistant", "content": "ok", "tool_calls": [{"function": CALL}]}], "m[0].content", "text beside tool_calls"),
        ([{"role": "system", "content": "", "tools": "f"}], "m[0].tools", "text, expected a list of tools"),
    ],
)
def test_what_is_not_understood_is_named(value: Any, field: str, sentence: str) -> None:
    _, problems = read(value)
    assert len(problems) == 1 and problems[0][0] == field and problems[0][1].startswith(sentence)


def test_an_observation_may_be_empty() -> None:
    assert read(chat(("observation", "")))[1] == []


def test_a_message_may_say_that_it_is_not_trained():
    items = [{"role": "user", "content": "u"}]
    for more in ({"weight": 0}, {"weight": 1}, {"train": False}, {"train": True}, {"weight": None}, {}):
        items.append({"role": "assistant", "content": "a"} | more)
    turns, problems = read(items)
    assert [m.trained for m in turns.messages] == [True, False, True, False, True, True, True] and not problems
    call = {"role": "assistant", "content": '{"name": "f", "arguments": {}}', "weight": 0}
    turns, _ = read([call, {"role": "observation", "content": "o"}])
    assert turns.messages[0].tool == "f" and not turns.messages[0].trained
    _, problems = read([{"role": "assistant", "content": "a", "weight": 0.5}, {"role": "assistant", "content": "a", "train": "no"}])
    assert problems == [("m[0].weight", "0.5, expected 0 or 1"), ("m[1].train", '"no", expected true or false')]
