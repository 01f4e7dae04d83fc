"""Data files in the schemas people have, read into conversations, preferences and prompts.

One rule: a bad record is never skipped in silence; all problems of all files are raised together.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Literal, TypeVar

from trueline.data.conversation import Conversation, Message, Preference, Prompt
from trueline.data.messages import Note, Turns, check_roles, read_tools, read_turns
from trueline.data.reader import Problems, Record, kind, read_records
from trueline.errors import UserError

T = TypeVar("T")
Use = Literal["answer", "pair", "prompt"]
"""What a file is read for: conversations with their answers, pairs of answers, or prompts alone."""


@dataclass(frozen=True)
class Located(Generic[T]):
    """A value and the record it came from, as "file:line"."""

    value: T
    where: str


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


def iter_conversations(paths: Sequence[str], format: str = "auto", problems: Problems | None = None) -> Iterator[Located[Conversation]]:
    """Whole conversations one by one, each ending with the assistant's answer; of ranked or paired answers the best.

    Problems go to `problems`; without one, a UserError with every problem of every file is raised after the last record. No record at all
    is a problem too. Memory stays flat; a caller that stops early has not seen the rest.
    """
    return _iterate(paths, format, "answer", _conversation, problems)


def iter_preferences(
    paths: Sequence[str], format: str = "auto", ranked: str = "all", problems: Problems | None = None, equal: list[str] | None = None
) -> Iterator[Located[Preference]]:
    """Pairs of answers to one prompt. Of n ranked answers: all n(n-1)/2 pairs, or with `ranked="best"` the best against each other one.

    Pairs of equal answers carry no preference and are left out; their places are added to `equal` (see `equal_note`). `problems` as in
    `iter_conversations`.
    """
    places = equal if equal is not None else []
    return _iterate(paths, format, "pair", partial(_preferences, best_only=ranked == "best", equal=places), problems)


def iter_prompts(paths: Sequence[str], format: str = "auto", problems: Problems | None = None) -> Iterator[Located[Prompt]]:
    """Conversations that wait for the assistant: of any schema what stands before the last answer. `Prompt.record` is the whole record.

    `problems` as in `iter_conversations`.
    """
    return _iterate(paths, format, "prompt", _prompt, problems)


def load_conversations(paths: Sequence[str], format: str = "auto") -> list[Located[Conversation]]:
    """`iter_conversations` as a list; raises one UserError with every problem of every file."""
    return list(iter_conversations(paths, format))


def load_preferences(
    paths: Sequence[str], format: str = "auto", ranked: str = "all", notes: list[str] | None = None
) -> list[Located[Preference]]:
    """`iter_preferences` as a list; a sentence about pairs that were left out is added to `notes`."""
    equal: list[str] = []
    found = list(iter_preferences(paths, format, ranked, equal=equal))
    if equal and notes is not None:
        notes.append(equal_note(equal))
    if not found:
        raise UserError(f"no pairs in {', '.join(paths)}: in every record both answers are equal")
    return found


def load_prompts(paths: Sequence[str], format: str = "auto") -> list[Located[Prompt]]:
    """`iter_prompts` as a list."""
    return list(iter_prompts(paths, format))


def load_file(path: str, format: str, problems: Problems, equal: list[str]) -> tuple[str, Use, list[Located[Any]]]:
    """One file for what its schema is made for: `(schema, use, values)`; values are conversations, preferences or prompts by use.

    Problems go to `problems`, places of pairs that are left out to `equal`. The schema is "unknown" when no record could tell it.
    """
    converters: dict[Use, Callable[[Record, Example, Note], Iterator[Any]]] = {
        "answer": _conversation,
        "pair": partial(_preferences, best_only=False, equal=equal),
        "prompt": _prompt,
    }
    name: str = "unknown"
    use: Use = "answer"
    found: list[Located[Any]] = []
    for record, schema_name, schema in _recognised(path, format, problems):
        if name == "unknown":
            name, use = schema_name, _natural_use(schema, record.value)
        found += _convert(record, schema, use, converters[use], problems)
    return name, use, found


def equal_note(equal: list[str]) -> str:
    """What to say about pairs that were left out."""
    shown = ", ".join(equal[:3]) + (f" and {len(equal) - 3} more" if len(equal) > 3 else "")
    return f"{len(equal)} {'pair' if len(equal) == 1 else 'pairs'} left out, both answers are equal: {shown}"


def _iterate(
    paths: Sequence[str],
    format: str,
    use: Use,
    convert: Callable[[Record, Example, Note], Iterator[T]],
    problems: Problems | None,
) -> Iterator[Located[T]]:
    own = Problems() if problems is None else problems
    records, before = 0, own.count
    for path in paths:
        for record, name, schema in _recognised(path, format, own):
            records += 1
            if use not in schema.uses:
                own.add(path, f"schema {name} ({schema.fields}), {_WANTED[use]}")
                break
            yield from _convert(record, schema, use, convert, own)
    none = f"no records in {', '.join(paths) or 'an empty list of files'}; name a file with at least one"
    if problems is None:
        own.stop()
        if not records:
            raise UserError(none)
    elif not records and own.count == before:
        own.add(", ".join(paths) or "files", none)


def _recognised(path: str, format: str, problems: Problems) -> Iterator[tuple[Record, str, Schema]]:
    """Records with their file's schema: the one named, or that of the first record that tells it."""
    if format != "auto" and format not in SCHEMAS:
        raise UserError(f"data.format {format}: no such schema, expected auto or one of {', '.join(SCHEMAS)}")
    name = None if format == "auto" else format
    strange: Record | None = None
    more = 0
    for record in read_records([path], problems):
        name = name or next((known for known, schema in SCHEMAS.items() if schema.recognises(record.value)), None)
        if name is None:
            more += strange is not None
            strange = strange or record
        else:
            yield record, name, SCHEMAS[name]
    if strange is not None:
        fields = ", ".join(list(strange.value)[:8]) or "none"
        known = " | ".join(schema.fields for schema in SCHEMAS.values())
        follow = f" ({more} more such records follow)" if more else ""
        problems.add(strange.where(), f"fields {fields}{follow}, expected those of a known schema: {known}", "record")


def _convert(
    record: Record, schema: Schema, use: Use, convert: Callable[[Record, Example, Note], Iterator[T]], problems: Problems
) -> list[Located[T]]:
    before = problems.count

    def note(field: str, what: str) -> None:
        problems.add(record.where(), what, field)

    example = schema.read(record.value, use, note)
    if problems.count > before:  # the role rules say nothing useful about a record of which half is missing
        return []
    found = list(convert(record, example, note))
    return [] if problems.count > before else [Located(value, record.where()) for value in found]


def _conversation(record: Record, example: Example, note: Note) -> Iterator[Conversation]:
    turns = example.turns.then(example.answers[0], "answer") if example.answers else example.turns
    check_roles(turns, False, note)
    yield Conversation(turns.messages, turns.tools)


def _preferences(record: Record, example: Example, note: Note, best_only: bool, equal: list[str]) -> Iterator[Preference]:
    check_roles(example.turns, True, note)
    prompt = Conversation(example.turns.messages, example.turns.tools)
    for i, better in enumerate(example.answers[: 1 if best_only else -1]):
        for worse in example.answers[i + 1 :]:
            if (better.content.strip(), better.tool) == (worse.content.strip(), worse.tool):
                equal.append(record.where())
            else:
                yield Preference(prompt, better, worse)


def _prompt(record: Record, example: Example, note: Note) -> Iterator[Prompt]:
    count = len(example.turns.messages)
    while count and example.turns.messages[count - 1].role == "assistant":
        count -= 1
    turns = example.turns.before(count)
    check_roles(turns, True, note)
    yield Prompt(Conversation(turns.messages, turns.tools), record.value)


def _natural_use(schema: Schema, record: dict[str, Any]) -> Use:
    """Message lists serve as conversations or as prompts; the first record's last turn tells which."""
    if schema.uses[0] == "answer" and "prompt" in schema.uses:
        noted: list[str] = []
        turns = schema.read(record, "prompt", lambda field, what: noted.append(field)).turns.messages
        only_messages = schema in (SCHEMAS["messages"], SCHEMAS["sharegpt"])
        if only_messages and not noted and turns and turns[-1].role != "assistant":
            return "prompt"
    return schema.uses[0]


# reading one record


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
    system = _text(record, "system", note, optional=True)
    if not system.strip() or (turns.messages and turns.messages[0].role == "system"):
        return Turns(turns.messages, turns.fields, tools)
    return Turns((Message("system", system), *turns.messages), ("system", *turns.fields), tools)


def _single(record: dict[str, Any], query: str, field: str, note: Note) -> Turns:
    """A query after the `history` of [user, assistant] pairs, if there is one."""
    turns = Turns()
    history = record.get("history")
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
    return Example(_with_tools(read_turns(record[name], name, note), record, note))


def _read_columns(record: dict[str, Any], use: Use, note: Note) -> Example:
    """The pair of names that fits best; a query without its answer says more than an answer without its query."""
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


COLUMNS = (("prompt", "response"), ("prompt", "completion"), ("question", "answer"), ("content", "summary"), ("query", "response"))
_WANTED: dict[Use, str] = {
    "answer": "expected conversations with the assistant's answers",
    "pair": "expected two answers to each prompt (chosen and rejected, pos_resp and neg_resp, or a list of ranked outputs)",
    "prompt": "expected prompts",
}
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
        _any_of("response", "completion", "question", "answer", "content", "summary", "query"),
        _BOTH,
        _read_columns,
    ),
    "prompt": Schema("prompt", _any_of("prompt"), ("prompt",), _read_prompt),
}
