"""YAML files and `key.path=value` settings as plain values that remember where they were written. Nothing here knows any key.

Scalars follow YAML 1.2, not PyYAML's 1.1: `1e-5` is a number, `no` and `2024-01-01` are text.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trueline.errors import UserError

OVERRIDE = re.compile(r"([A-Za-z_]\w*(?:\.\w+)*)=(.*)", re.DOTALL)
_MAX_DEPTH = 40  # deeper than any configuration, shallow enough for Python's stack
_TAG = "tag:yaml.org,2002:"
_SCALARS: tuple[tuple[str, str, str], ...] = (
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+.0123456789"),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


class _Dumper(yaml.SafeDumper):
    """Quotes exactly the texts that `_Loader` would not read back as text."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if any(mark in text for mark in "\x85\u2028\u2029") else None  # PyYAML folds these line breaks into spaces otherwise
    return dumper.represent_scalar(_TAG + "str", text, style=style)


_Dumper.add_representer(str, _text)
_Dumper.add_representer(list, lambda dumper, items: dumper.represent_sequence(_TAG + "seq", items, flow_style=True))
for _name, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_pattern})$"), list(_first) + ([""] if _name == "null" else []))


@dataclass(frozen=True)
class Written:
    """A value and where it was written: `sft.yaml:3:5` (line and column from 1), `override run.seed=1`, or `config` from Python."""

    value: Any  # dict[str, Written], list[Written] or a plain scalar
    origin: str

    def plain(self) -> Any:
        if isinstance(self.value, dict):
            return {key: item.plain() for key, item in self.value.items()}
        return [item.plain() for item in self.value] if isinstance(self.value, list) else self.value


def merge(base: Written, later: Written) -> Written:
    """`later` over `base`: sections are merged key by key, everything else (lists too) is replaced."""
    if not (isinstance(base.value, dict) and isinstance(later.value, dict)):
        return later
    merged = dict(base.value)
    for key, item in later.value.items():
        merged[key] = merge(merged[key], item) if key in merged else item
    return Written(merged, base.origin)


def from_python(value: Any, origin: str) -> Written:
    """Dictionaries and sequences as Python has them; paths become text."""
    if isinstance(value, Mapping):
        return Written({str(key): from_python(item, origin) for key, item in value.items()}, origin)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return Written([from_python(item, origin) for item in value], origin)
    return Written(os.fspath(value) if isinstance(value, os.PathLike) else value, origin)


def read_file(path: str | Path, problems: list[str]) -> Written:
    """A YAML file's one mapping. What can be read past (a key given twice, an alias) is added to `problems`; the rest raises UserError."""
    text = _read_text(path)
    try:
        node = yaml.compose(text, Loader=_Loader)
    except RecursionError:
        raise UserError(f"{path}: nested too deeply to be a configuration") from None
    except yaml.MarkedYAMLError as error:
        raise UserError(f"{path}{_place(error)}: not valid YAML: {_syntax(error)}") from None
    except yaml.reader.ReaderError as error:
        line, code = text.count("\n", 0, error.position) + 1, ord(text[error.position])
        raise UserError(f"{path}:{line}: character U+{code:04X} may not stand in YAML; remove it") from None
    if node is None or (isinstance(node, yaml.ScalarNode) and not node.value):
        raise UserError(f"{path}: empty, expected sections such as `model:`, `data:` and `run:`")
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}{_mark(node)}: expected sections such as `model:`, `data:` and `run:`, found {found(_shape(node))}")
    return _Walk(str(path), problems).section(node, str(path), 0)


def read_override(text: str, problems: list[str]) -> Written:
    """`key.path=value`, the value read as YAML."""
    origin = f"override {text}"
    match = OVERRIDE.fullmatch(text)
    if not match:
        raise UserError(f"{origin}: expected key.path=value, for example optimizer.lr=1e-5")
    try:
        node = yaml.compose(match[2], Loader=_Loader)
    except (yaml.YAMLError, RecursionError):
        advice = f"put text with special characters in quotes: '{match[1]}=\"...\"'"
        raise UserError(f"{origin}: the value is not valid YAML; {advice}") from None
    value = _Walk("", problems, origin).value(node, origin, 0) if node else Written(None, origin)
    for key in reversed(match[1].split(".")):
        value = Written({key: value}, origin)
    return value


def write(values: Mapping[str, Any]) -> str:
    """YAML that `read_file` reads back to the same values, keys in the order given."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=120)


def found(value: Any) -> str:
    """How a message names a value that was not expected."""
    if isinstance(value, dict):
        return "a section" if value else "an empty section"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


class _Walk:
    """Turns nodes into values; `origin` overrides the file's own positions."""

    def __init__(self, path: str, problems: list[str], origin: str | None = None):
        self.path, self.problems, self.origin = path, problems, origin
        self.seen: set[int] = set()

    def at(self, node: yaml.Node) -> str:
        return self.origin or self.path + _mark(node)

    def value(self, node: yaml.Node, origin: str, depth: int) -> Written:
        if id(node) in self.seen:
            self.problems.append(f"{origin}: YAML aliases (*name) are not read; write the value out, or share it as a second config file")
            return Written(None, origin)
        self.seen.add(id(node))
        if depth > _MAX_DEPTH:
            raise UserError(f"{origin}: nested too deeply to be a configuration")
        if isinstance(node, yaml.MappingNode):
            return self.section(node, origin, depth)
        if isinstance(node, yaml.SequenceNode):
            return Written([self.value(item, self.at(item), depth + 1) for item in node.value], origin)
        assert isinstance(node, yaml.ScalarNode)
        return Written(self.scalar(node), origin)

    def section(self, node: yaml.MappingNode, origin: str, depth: int) -> Written:
        self.seen.add(id(node))
        values: dict[str, Written] = {}
        for key_node, item in node.value:
            where = self.at(key_node)
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _TAG + "str":
                self.problems.append(f"{where}: {found(_shape(key_node))} as a key, expected a name")
            elif key_node.value in values:
                self.problems.append(f"{where}: {key_node.value}: given twice, first at {values[key_node.value].origin}; keep one")
            else:
                values[key_node.value] = self.value(item, where, depth + 1)
        return Written(values, origin)

    def scalar(self, node: yaml.ScalarNode) -> Any:
        kind, text = node.tag.removeprefix(_TAG), node.value
        try:
            if kind == "null":
                return None
            if kind == "bool":
                return text.lower() == "true"
            if kind == "int":
                return int(text)
            if kind == "float":
                return float(re.sub(r"\.(?=[inIN])", "", text))
        except ValueError:
            self.problems.append(f"{self.at(node)}: {found(text)} is not a number trueline can hold")
            return None
        if kind != "str":
            self.problems.append(f"{self.at(node)}: YAML tags ({node.tag}) are not read; write a plain value")
        return text


def _read_text(path: str | Path) -> str:
    try:
        raw = Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file (relative paths start at the current directory)") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, expected a YAML file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {(error.strerror or str(error)).lower()}") from None
    except ValueError as error:
        raise UserError(f"{str(path)!r}: not a file name: {error}") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8") from None


def _shape(node: yaml.Node) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return node.value
    return [None] * len(node.value) if isinstance(node, yaml.SequenceNode) else {"": None}


def _mark(node: yaml.Node) -> str:
    return f":{node.start_mark.line + 1}:{node.start_mark.column + 1}"


def _place(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    return f":{mark.line + 1}:{mark.column + 1}" if mark else ""


def _syntax(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or str(error.context)
    if r"'\t'" in problem:
        return "a tab; indent with spaces"
    if "expected a single document" in str(error.context):
        return "a second document (---); give one file per document"
    if "mapping values are not allowed here" in problem:
        return "a second `:` on one line; put the value in quotes or on its own line"
    return problem
