"""What each key accepts, its default and its sentence, read from the schema; messages and docs/configuration.md both come from here."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from trueline.config.schema import STAGES, Config, GenerateConfig


@dataclass(frozen=True)
class Key:
    """One dotted key. `expected` completes the sentence "expected ..."; `default` is written as YAML, empty for a required key."""

    name: str
    expected: str
    default: str
    sentence: str
    required: bool
    section: type[Config] | None
    choices: tuple[str, ...] = ()
    truth: bool = False  # true and false are among its values


@cache
def describe(schema: type[Config]) -> dict[str, Key]:
    """Every dotted key of a schema, sections included, in the order of the schema."""
    return {key.name: key for key in _walk(schema, "")}


def _walk(schema: type[Config], prefix: str) -> Iterator[Key]:
    for name, field in schema.model_fields.items():
        parts = _alternatives(field.annotation)
        section = next((part for part in parts if isinstance(part, type) and issubclass(part, Config)), None)
        choices = tuple(value for part in parts if get_origin(part) is Literal for value in get_args(part))
        required = field.is_required()
        default = "" if required else _written(field.get_default(call_default_factory=True, validated_data={}))
        expected = _expected(field.annotation, field.metadata)
        yield Key(prefix + name, expected, default, field.description or "", required, section, choices, bool in parts)
        if section:
            yield from _walk(section, f"{prefix}{name}.")


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _expected(annotation: Any, metadata: list[Any]) -> str:
    """An annotation in words: `int` with `Ge(1)` is "a whole number from 1"."""
    if get_origin(annotation) is Annotated:
        annotation, *extra = get_args(annotation)
        bounds = [m for item in extra for m in (item.metadata if isinstance(item, FieldInfo) else [item])]
        return _expected(annotation, [*metadata, *bounds])
    parts = _alternatives(annotation)
    if len(parts) > 1:
        words = [_expected(part, metadata) for part in parts if part is not NoneType]
        return " or ".join([*words, *(["null"] if NoneType in parts else [])])
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        *first, last = map(str, arguments)
        return ("one of " if len(first) > 1 else "") + (f"{', '.join(first)} or {last}" if first else last)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"a list, each {_expected(arguments[0], [])}"
        return f"a list of {len(arguments)}, each {_expected(arguments[0], [])}"
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return "a section"
    plain = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
    return plain[annotation] + _bounds(metadata)


def _bounds(metadata: list[Any]) -> str:
    words = []
    for name, word in (("gt", "above"), ("ge", "from"), ("lt", "below"), ("le", "up to")):
        limits = [getattr(item, name) for item in metadata if getattr(item, name, None) is not None]
        words += [f" {word} {'2^63' if limit == 2**63 else limit}" for limit in limits]
    return " and".join(words)


def _written(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return "[" + ", ".join(_written(item) for item in value) + "]"
    return "" if isinstance(value, Config) else str(value)


PAGE_HEAD = """# Configuration

Written by `make frozen` from `trueline/config/schema.py`; change it there.

```
trueline sft CONFIG.yaml [CONFIG2.yaml ...] [key.path=value ...] [--dry-run]
```

* Files are read from left to right, a later one over an earlier one: sections are merged key by key, lists are replaced. Settings of the
  form `key.path=value` come last; their values are read as YAML: `optimizer.lr=1e-5`, `data.train=[a.jsonl, b.jsonl]`, `data.limit=null`.
* Relative paths, in a file or on the command line, start at the current directory.
* A key that is not listed here is an error. All problems are listed at once, each with its file, line and column.
* Every run writes the resolved configuration, all defaults spelled out, to `config.yaml` in its folder; that file alone repeats the run.
* From Python, `trueline.sft(config)` and its siblings take a path, a dictionary or the schema class.
"""


def reference_page() -> str:
    """docs/configuration.md: one table per section, and for each the commands that have it."""
    tables: dict[tuple[str, str], list[str]] = {}
    titles: dict[tuple[str, str], tuple[str, list[str]]] = {}
    commands: dict[str, type[Config]] = STAGES | {"generate": GenerateConfig, "chat": GenerateConfig}
    for command, schema in commands.items():
        for key in describe(schema).values():
            top = key.name.split(".")[0]
            owner = describe(schema)[top].section
            title = f"`{top}`: {describe(schema)[top].sentence}" if owner else "Keys without a section"
            table = (top, owner.__name__) if owner else ("", schema.__name__)
            users = titles.setdefault(table, (title, []))[1]
            if command not in users:
                users.append(command)
            if not key.section and _row(key) not in tables.setdefault(table, []):
                tables[table].append(_row(key))
    parts = [PAGE_HEAD]
    for table, (title, users) in titles.items():
        parts.append(f"\n## {title}\n\nFor {', '.join(users)}.\n\n| key | default | accepts | meaning |\n|---|---|---|---|\n")
        parts.append("\n".join(tables[table]) + "\n")
    return "".join(parts)


def _row(key: Key) -> str:
    cells = (f"`{key.name}`", "**required**" if key.required else f"`{key.default}`", key.expected, key.sentence)
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"
