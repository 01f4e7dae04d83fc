"""Data files in the schemas people have, read into conversations, preferences and prompts.

One rule: a bad record is never skipped in silence; all problems of all files are raised together.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from trueline.data.conversation import Conversation, Preference, Prompt
from trueline.data.files import find_files
from trueline.data.messages import Note, check_roles
from trueline.data.reader import read_records
from trueline.data.record import Problems, Record
from trueline.data.schemas import FOREIGN, SCHEMAS, Example, Schema, Use
from trueline.data.tokenizer import Tokenizer
from trueline.errors import UserError

T = TypeVar("T")
_WANTED: dict[Use, str] = {
    "answer": "expected conversations with the assistant's answers",
    "pair": "expected two answers to each prompt (chosen and rejected, pos_resp and neg_resp, or a list of ranked outputs)",
    "prompt": "expected prompts",
}
@dataclass(frozen=True)
class Located(Generic[T]):
    """A value and the record it came from: its file, and its line there (Parquet: its row)."""

    value: T
    file: str
    line: int

    @property
    def where(self) -> str:
        """`file:line`."""
        return f"{self.file}:{self.line}"


def iter_conversations(
    paths: Sequence[str], format: str = "auto", problems: Problems | None = None, tokenizer: Tokenizer | None = None
) -> Iterator[Located[Conversation]]:
    """Whole conversations one by one, each ending with the assistant's answer; of ranked or paired answers the best.

    Problems go to `problems`; without one, a UserError with every problem of every file is raised after the last record. No record at all
    is a problem too. Memory stays flat; a caller that stops early has not seen the rest. `tokenizer` as in `read_records`.
    """
    return _iterate(paths, format, "answer", _conversation, problems, tokenizer)


def iter_preferences(
    paths: Sequence[str],
    format: str = "auto",
    ranked: str = "all",
    problems: Problems | None = None,
    equal: list[str] | None = None,
    tokenizer: Tokenizer | None = None,
) -> Iterator[Located[Preference]]:
    """Pairs of answers to one prompt. Of n ranked answers: all n(n-1)/2 pairs, or with `ranked="best"` the best against each other one.

    Pairs of equal answers carry no preference and are left out; their places are added to `equal` (see `equal_note`). `problems` and
    `tokenizer` as in `iter_conversations`.
    """
    places = equal if equal is not None else []
    return _iterate(paths, format, "pair", partial(_preferences, best_only=ranked == "best", equal=places), problems, tokenizer)


def iter_prompts(
    paths: Sequence[str], format: str = "auto", problems: Problems | None = None, tokenizer: Tokenizer | None = None
) -> Iterator[Located[Prompt]]:
    """Conversations that wait for the assistant: of any schema what stands before the last answer. `Prompt.record` is the whole record.

    `problems` and `tokenizer` as in `iter_conversations`.
    """
    return _iterate(paths, format, "prompt", _prompt, problems, tokenizer)


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


def load_prompts(paths: Sequence[str], format: str = "auto", tokenizer: Tokenizer | None = None) -> list[Located[Prompt]]:
    """`iter_prompts` as a list."""
    return list(iter_prompts(paths, format, tokenizer=tokenizer))


class FileValues(Generic[T]):
    """One file's values for what its schema is made for, to be iterated over once: conversations, preferences or prompts by `use`.

    Problems go to `problems`, places of pairs that are left out to `equal`. `schema` and `use` are known from the first value on;
    the schema is "unknown" when no record could tell it.
    """

    def __init__(self, path: str, format: str, problems: Problems, equal: list[str], tokenizer: Tokenizer | None = None):
        self.schema: str = "unknown"
        self.use: Use = "answer"
        self._records = _recognised(path, format, problems, tokenizer)
        self._problems = problems
        self._converters: dict[Use, Callable[[Record, Example, Note], Iterator[Any]]] = {
            "answer": _conversation,
            "pair": partial(_preferences, best_only=False, equal=equal),
            "prompt": _prompt,
        }

    def __iter__(self) -> Iterator[Located[T]]:
        for record, name, schema in self._records:
            if self.schema == "unknown":
                self.schema, self.use = name, _natural_use(schema, record.value)
            yield from _convert(record, schema, self.use, self._converters[self.use], self._problems)


def load_file(path: str, format: str, problems: Problems, equal: list[str]) -> tuple[str, Use, list[Located[Any]]]:
    """`FileValues` as `(schema, use, values)`."""
    values = FileValues[Any](path, format, problems, equal)
    found = list(values)
    return values.schema, values.use, found


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
    tokenizer: Tokenizer | None,
) -> Iterator[Located[T]]:
    own = Problems() if problems is None else problems
    records, before = 0, own.count
    for path in (file for files in find_files(paths) for file in files):
        for record, name, schema in _recognised(path, format, own, tokenizer):
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


def _recognised(path: str, format: str, problems: Problems, tokenizer: Tokenizer | None) -> Iterator[tuple[Record, str, Schema]]:
    """Records with their file's schema: the one named, or that of the first record that tells it."""
    if format != "auto" and format not in SCHEMAS:
        raise UserError(f"data.format {format}: no such schema, expected auto or one of {', '.join(SCHEMAS)}")
    name = None if format == "auto" else format
    strange: Record | None = None
    more = 0
    for record in read_records([path], problems, tokenizer):
        name = name or next((known for known, schema in SCHEMAS.items() if schema.recognises(record.value)), None)
        if name is None:
            more += strange is not None
            strange = strange or record
            problems.mark((record.file, record.line, record.column))
        else:
            yield record, name, SCHEMAS[name]
    if strange is not None:
        fields = ", ".join(list(strange.value)[:8]) or "none"
        hint = next((f"{sentence}; " for name, sentence in FOREIGN.items() if name in strange.value), "")
        known = " | ".join(schema.fields for schema in SCHEMAS.values())
        follow = f" ({more} more such records follow)" if more else ""
        problems.add(strange.place(""), f"fields {fields}{follow}, {hint}expected those of a known schema: {known}", "record")


def _convert(
    record: Record, schema: Schema, use: Use, convert: Callable[[Record, Example, Note], Iterator[T]], problems: Problems
) -> list[Located[T]]:
    before = problems.count

    def note(field: str, what: str) -> None:
        problems.add(record.place(field), what, field, (record.file, record.line, record.column))

    example = schema.read(record.value, use, note)
    if problems.count > before:  # the role rules say nothing useful about a record of which half is missing
        return []
    found = list(convert(record, example, note))
    return [] if problems.count > before else [Located(value, record.file, record.line) for value in found]


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
