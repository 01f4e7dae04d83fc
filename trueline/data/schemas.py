"""The layouts of records that people publish: how each is recognised, what it can be used for, and how it is read.

One rule: what is missing or of the wrong type is noted at its field; nothing is guessed.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from trueline.data.conversation import Message
from trueline.data.messages import Note, Turns, parsed, read_tools, read_turns
from trueline.data.record import kind

Use = Literal["answer", "pair", "prompt"]
"""What a file is read for: conversations with their answers, pairs of answers, or prompts alone."""



@dataclass(frozen=True)
class Example:
    """A record understood: its turns, and ranked answers to the last of them, best first (none when the answer is among the turns)."""

    turns: Turns
    answers: tuple[Message, ...] = ()


@dataclass(frozen=True)
class Schema:
    """One layout of records: how it is recognised, what it can be used for, and how it is read."""

    fields: str
    recognises: Callable[[dict[str, Any]], bool]
    uses: tuple[Use, ...]
    read: Callable[[dict[str, Any], Use, Note], Example]


def _text(record: dict[str, Any], name: str, note: Note, optional: bool = False) -> str:
    value = record.get(name)
    if isinstance(value, str):
        if not optional and not value.strip():
            note(name, "empty, expected text")
        return value
    if not (optional and value is None):
        note(name, f"{kind(value) if name in record else 'missing'}, expected text")
    return ""


def _with_tools(turns: Turns, record: dict[str, Any], note: Note) -> Turns:
    """The record's own `system` and `tools`, where its messages bring none."""
    tools = turns.tools or read_tools(record.get("tools"), "tools", note)
    system = _text(record, "system", note, optional=True) if "system" in record else ""
    if not system.strip() or (turns.messages and turns.messages[0].role == "system"):
        return Turns(turns.messages, turns.fields, tools)
    return Turns((Message("system", system), *turns.messages), ("system", *turns.fields), tools)


def _single(record: dict[str, Any], query: str, field: str, note: Note) -> Turns:
    """A query after the `history` of [user, assistant] pairs, if there is one."""
    turns = Turns()
    history = parsed(record.get("history"))
    if history is not None and not isinstance(history, list):
        note("history", f"{kind(history)}, expected a list of [user, assistant] pairs")
        history = None
    for i, pair in enumerate(history or []):
        if not isinstance(pair, list) or len(pair) != 2:
            found = f"a list of {len(pair)}" if isinstance(pair, list) else kind(pair)
            note(f"history[{i}]", f"{found}, expected [user, assistant]")
            continue
        for j, text in enumerate(pair):
            if not isinstance(text, str) or not text.strip():
                note(f"history[{i}][{j}]", f"{'empty' if isinstance(text, str) else kind(text)}, expected text")
            else:
                turns = turns.then(Message("assistant" if j else "user", text), f"history[{i}][{j}]")
    return _with_tools(turns.then(Message("user", query), field), record, note)


def _instruction(record: dict[str, Any], note: Note) -> Turns:
    """The query is the instruction; where there is an input too, a line break and the input follow, as in other programs of the field."""
    instruction, extra = _text(record, "instruction", note), _text(record, "input", note, optional=True)
    return _single(record, "\n".join(part for part in (instruction, extra) if part.strip()), "instruction", note)


def _answers(record: dict[str, Any], use: Use, note: Note, *names: str) -> tuple[Message, ...]:
    return () if use == "prompt" else tuple(Message("assistant", _text(record, name, note)) for name in names)


def _read_alpaca(record: dict[str, Any], use: Use, note: Note) -> Example:
    return Example(_instruction(record, note), _answers(record, use, note, "output"))


def _read_ranked(record: dict[str, Any], use: Use, note: Note) -> Example:
    turns = _instruction(record, note)
    if use == "prompt":
        return Example(turns)
    output = record.get("output")
    if not isinstance(output, list):
        note("output", f"{kind(output) if 'output' in record else 'missing'}, expected a list of answers, best first")
        return Example(turns)
    least = 2 if use == "pair" else 1
    if len(output) < least:
        note("output", f"{len(output)} answers, expected at least {least}, best first")
    for i, answer in enumerate(output):
        if not isinstance(answer, str) or not answer.strip():
            note(f"output[{i}]", f"{'empty' if isinstance(answer, str) else kind(answer)}, expected text")
    return Example(turns, tuple(Message("assistant", answer) for answer in output if isinstance(answer, str)))


def _read_cvalues(record: dict[str, Any], use: Use, note: Note) -> Example:
    turns = _single(record, _text(record, "prompt", note), "prompt", note)
    return Example(turns, _answers(record, use, note, "pos_resp", "neg_resp"))


def _read_list(record: dict[str, Any], use: Use, note: Note, name: str) -> Example:
    if name not in record:
        note(name, "missing, expected a list of messages")
        return Example(Turns())
    if use == "answer" and record.get("label") is False:
        note("label", "false, so an answer not to learn from, expected only good ones; leave the record out")
    return Example(_with_tools(read_turns(record[name], name, note), record, note))


def _read_columns(record: dict[str, Any], use: Use, note: Note) -> Example:
    """The pair of names that fits best; a query without its answer says more than an answer without its query."""
    query, answer = next((names for names in COLUMNS if names[0] in record and names[1] in record), COLUMNS[0])
    if query not in record or answer not in record:
        query, answer = max(COLUMNS, key=lambda names: 3 * (names[0] in record) + 2 * (names[1] in record))
    if query in record and (answer in record or use == "prompt"):
        return Example(_single(record, _text(record, query, note), query, note), _answers(record, use, note, answer))
    if query not in record:
        note(" or ".join(sorted({q for q, a in COLUMNS if a == answer})), "missing, expected text")
    if answer not in record and use != "prompt":
        note(" or ".join(sorted({a for q, a in COLUMNS if q == query})), "missing, expected text")
    return Example(Turns())


def _read_prompt(record: dict[str, Any], use: Use, note: Note) -> Example:
    if isinstance(record.get("prompt"), list):
        return _read_list(record, use, note, "prompt")
    return Example(_single(record, _text(record, "prompt", note), "prompt", note))


def _read_preference(record: dict[str, Any], use: Use, note: Note) -> Example:
    """The prompt in `conversations`, `messages`, `prompt`, `question` or `instruction` (+ `input`), or at the head of both answers."""
    broken: list[str] = []

    def side_note(field: str, what: str) -> None:
        broken.append(field)
        note(field, what)

    sides = [] if use == "prompt" and _has_prompt(record) else [_side(record, name, side_note) for name in ("chosen", "rejected")]
    answers = tuple(side.messages[-1] for side in sides if side.messages)
    heads = [side.before(len(side.messages) - 1) for side in sides]
    if any(head.messages for head in heads):
        if not broken and heads[0].messages != heads[1].messages:
            note("rejected", "other turns before its answer than chosen, expected the same prompt")
        return Example(_with_tools(heads[0], record, note), answers)
    if not _has_prompt(record):
        note("prompt", "missing, expected text or messages (or one of conversations, messages, question, instruction)")
        return Example(Turns(), answers)
    for name in ("conversations", "messages"):
        if name in record:
            return Example(_read_list(record, use, note, name).turns, answers)
    if "prompt" in record:
        return Example(_read_prompt(record, use, note).turns, answers)
    if "question" in record:
        return Example(_single(record, _text(record, "question", note), "question", note), answers)
    return Example(_instruction(record, note), answers)


def _has_prompt(record: dict[str, Any]) -> bool:
    return any(name in record for name in ("conversations", "messages", "prompt", "question", "instruction"))


def _side(record: dict[str, Any], name: str, note: Note) -> Turns:
    """Text, a message, a list of messages that ends with the answer, or a `\\n\\nHuman: ...\\n\\nAssistant: ...` transcript."""
    value = record.get(name)
    if isinstance(value, str) and not _has_prompt(record):
        parts = re.split(r"\n\n(Human|Assistant):", value)
        roles = {"Human": "user", "Assistant": "assistant"}
        value = [{"role": roles[role], "content": text.strip()} for role, text in zip(parts[1::2], parts[2::2], strict=True)] or value
    if not isinstance(value, (dict, list)):
        return Turns((Message("assistant", _text(record, name, note)),), (name,))
    turns = read_turns(value if isinstance(value, list) else [value], name, note)
    if turns.messages and turns.messages[-1].role != "assistant":
        note(turns.fields[-1], f"role {turns.messages[-1].role}, expected the assistant's answer")
    elif not value:
        note(name, "empty, expected the assistant's answer")
    return turns


COLUMNS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("content", "summary"),
    ("query", "response"),
    ("input", "golden"),
    ("original_text", "ans"),
)
FOREIGN = {
    "text": "plain text has no questions and answers to learn from",
    "Golden_Answers": "ToolAlpaca's tests hold instructions and expected calls, no conversations",
    "tokens": "these are token numbers, expected text",
}
"""What to say about records of which no schema can be made, by the field that tells."""
_BOTH: tuple[Use, ...] = ("answer", "prompt")
_ALL: tuple[Use, ...] = ("pair", "answer", "prompt")


def _any_of(*names: str) -> Callable[[dict[str, Any]], bool]:
    return lambda record: any(name in record for name in names)


# the first that recognises a record wins: the particular before the general
SCHEMAS: dict[str, Schema] = {
    "cvalues": Schema("prompt, pos_resp, neg_resp", _any_of("pos_resp", "neg_resp"), _ALL, _read_cvalues),
    "preference": Schema(
        "prompt (or conversations, messages, question, instruction), chosen, rejected",
        _any_of("chosen", "rejected"),
        _ALL,
        _read_preference,
    ),
    "sharegpt": Schema("conversations", _any_of("conversations"), _BOTH, partial(_read_list, name="conversations")),
    "messages": Schema("messages", _any_of("messages"), _BOTH, partial(_read_list, name="messages")),
    "ranked": Schema("instruction, input, output (a list)", lambda r: isinstance(r.get("output"), list), _ALL, _read_ranked),
    "alpaca": Schema("instruction, input, output", _any_of("instruction", "output"), _BOTH, _read_alpaca),
    "columns": Schema(
        " or ".join(", ".join(names) for names in COLUMNS),
        _any_of("response", "completion", "question", "answer", "content", "summary", "query", "golden", "original_text"),
        _BOTH,
        _read_columns,
    ),
    "prompt": Schema("prompt", _any_of("prompt"), ("prompt",), _read_prompt),
}
