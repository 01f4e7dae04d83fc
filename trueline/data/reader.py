"""Records from .json, .jsonl and .parquet files, each with the line it starts on.

One rule: problems are collected, never raised at the first; each says where (file:line:column), what, and what was expected.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pyarrow
import pyarrow.parquet

from trueline.errors import UserError

SUFFIXES = (".json", ".jsonl", ".parquet")
_SPACE = re.compile(r"[ \t\n\r]*")
_LONE_SURROGATE = re.compile(
    r"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)


@dataclass(frozen=True)
class Record:
    """One object of a data file. `line` is where it starts (parquet: its row), from 1."""

    file: str
    line: int
    value: dict[str, Any]

    def where(self) -> str:
        """`file:line`."""
        return f"{self.file}:{self.line}"


class Problems:
    """What is wrong with the data, collected over all files; memory stays flat because only the first `keep` sentences are held."""

    def __init__(self, keep: int | None = 50):
        self.keep = keep
        self.count = 0
        self.lines: list[str] = []

    def add(self, where: str, what: str, field: str = "") -> None:
        """`where` is "file" or "file:line[:column]"; `what` says what was found and what was expected."""
        self.count += 1
        if self.keep is None or len(self.lines) < self.keep:
            self.lines.append(f"{where}: {field}: {what}" if field else f"{where}: {what}")

    def listed(self) -> list[str]:
        """The sentences held, and how many more there are."""
        more = self.count - len(self.lines)
        return self.lines + ([f"... and {more} more"] if more else [])

    def stop(self) -> None:
        """Raises one UserError with everything that was added; does nothing when nothing was."""
        if self.count:
            what = "1 problem" if self.count == 1 else f"{self.count} problems"
            raise UserError(f"{what} in the data; correct the records named here:", self.listed())


class _Broken(Exception):
    """Text that is not what a record must be, at a character of the text."""

    def __init__(self, position: int, what: str):
        super().__init__(what)
        self.position = position
        self.what = what


def read_records(paths: Sequence[str], problems: Problems | None = None) -> Iterator[Record]:
    """Every object of every file, in order. After a broken line of a .jsonl (or of a .json that holds no array) the next one is tried.

    Problems go to `problems`; without one, a UserError with all of them is raised after the last record.
    """
    own = problems if problems is not None else Problems()
    for path in paths:
        if _readable(path, own):
            yield from _READERS[Path(path).suffix.lower()](path, own)
    if problems is None:
        own.stop()


def _readable(path: str, problems: Problems) -> bool:
    place = Path(path)
    try:
        if not place.exists():
            problems.add(path, "no such file, expected a .json, .jsonl or .parquet file")
        elif place.is_dir():
            problems.add(path, "a folder, expected a file; name the files in it")
        elif place.suffix.lower() not in SUFFIXES:
            ending = place.suffix or "nothing"
            problems.add(path, f"file name ends in {ending}, expected .json, .jsonl or .parquet (unpack compressed files first)")
        else:
            with place.open("rb") as file:
                if file.read(1):
                    return True
            problems.add(path, "empty file, expected at least one record")
    except (OSError, ValueError) as error:
        problems.add(path, f"cannot be read ({getattr(error, 'strerror', None) or error}), expected a readable file")
    return False


def _read_lines(path: str, problems: Problems) -> Iterator[Record]:
    """One object a line. Blank lines are allowed at the end only: inside, they are mostly what a broken export left of a record."""
    blank: list[int] = []
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                blank.append(number)
                continue
            for line in blank:
                problems.add(f"{path}:{line}:1", "empty line, expected an object on every line; delete the line")
            blank.clear()
            try:
                text = _decode(raw.rstrip(b"\r\n"))
                if number == 1 and text.lstrip().startswith("["):
                    problems.add(f"{path}:1:1", "an array, expected one object a line; name a file that holds one array .json")
                    return
                value, end = _parse(text, _skip(text, 0))
                rest = _skip(text, end)
                if rest < len(text):
                    raise _Broken(rest, "text after the object, expected one object a line")
            except _Broken as broken:
                problems.add(f"{path}:{number}:{broken.position + 1}", broken.what)
            else:
                if (record := _record(path, number, value, problems)) is not None:
                    yield record


def _read_json(path: str, problems: Problems) -> Iterator[Record]:
    """An array of objects; a file that opens with anything else holds objects one after the other, over one line or several each."""
    raw = Path(path).read_bytes()
    text = ""
    try:
        text = _decode(raw)
        start = _skip(text, 0)
        if start == len(text):
            raise _Broken(0, "only white space, expected at least one record")
        for line, value in _array(text, start) if text[start] == "[" else _stream(path, text, start, problems):
            if (record := _record(path, line, value, problems)) is not None:
                yield record
    except _Broken as broken:
        shown = text or raw.decode("utf-8", errors="replace")  # the same characters up to the broken one
        problems.add(_place(path, shown, broken.position), f"{broken.what} (the file was read up to here)")


def _array(text: str, start: int) -> Iterator[tuple[int, Any]]:
    """`(line, value)` of each element. The standard scanner reads the values; only line ends between them are counted here."""
    line, counted = 1, 0
    position = _skip(text, start + 1)
    while position < len(text) and text[position] != "]":
        line += text.count("\n", counted, position)
        counted = position
        value, end = _parse(text, position)
        yield line, value
        position = _skip(text, end)
        if text[position : position + 1] == ",":
            comma, position = position, _skip(text, position + 1)
            if text[position : position + 1] == "]":
                raise _Broken(comma, "trailing comma, expected nothing between the last record and ]")
        elif text[position : position + 1] not in ("]", ""):
            raise _Broken(position, "expected , or ] after a record")
    if position == len(text):
        raise _Broken(position, "the file ends inside the array, expected ]")
    if (rest := _skip(text, position + 1)) < len(text):
        raise _Broken(rest, "text after the array, expected the end of the file")


def _stream(path: str, text: str, position: int, problems: Problems) -> Iterator[tuple[int, Any]]:
    """`(line, value)` of objects that follow one another; after a broken one, the next line that opens with { is tried."""
    line, counted = 1, 0
    while position < len(text):
        line += text.count("\n", counted, position)
        counted = position
        try:
            value, end = _parse(text, position)
        except _Broken as broken:
            problems.add(_place(path, text, broken.position), broken.what)
            following = text.find("\n{", max(position, broken.position - 1))
            position = following + 1 if following >= 0 else len(text)
            continue
        yield line, value
        position = _skip(text, end)
        if text[position : position + 1] == ",":
            raise _Broken(position, "comma between records, expected one array in [ ] or one object a line")


def _read_parquet(path: str, problems: Problems) -> Iterator[Record]:
    """Rows, numbered from 1. Keys without a value are left out: a table has every key in every row."""
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    row += 1
                    yield Record(path, row, _without_nulls(value))
    except (pyarrow.ArrowException, OSError) as error:
        problems.add(path if row == 0 else f"{path}:{row + 1}", f"not a readable Parquet file ({str(error).splitlines()[0]})")
        return
    if row == 0:
        problems.add(path, "a table without rows, expected at least one record")


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


_READERS = {".jsonl": _read_lines, ".json": _read_json, ".parquet": _read_parquet}


def _record(path: str, line: int, value: Any, problems: Problems) -> Record | None:
    if isinstance(value, dict):
        return Record(path, line, value)
    problems.add(f"{path}:{line}", f"{kind(value)}, expected an object", "record")
    return None


def kind(value: Any) -> str:
    """A JSON value's type in words, for messages."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "true or false"
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return next((name for known, name in names.items() if isinstance(value, known)), type(value).__name__)


def _skip(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    return found.end() if found else position


def _place(path: str, text: str, position: int) -> str:
    return f"{path}:{text.count(chr(10), 0, position) + 1}:{position - text.rfind(chr(10), 0, position)}"


def _decode(raw: bytes) -> str:
    """UTF-8, or `_Broken` at the first character that is not."""
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise _Broken(0, "UTF-16 text, expected UTF-8; save the file as UTF-8")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        position = len(raw[: error.start].decode("utf-8"))
        raise _Broken(position, f"byte 0x{raw[error.start]:02X} is not UTF-8, expected UTF-8 text (GBK? iconv -f GBK -t UTF-8)") from None
    if text.startswith("\ufeff"):
        raise _Broken(0, "byte-order mark, expected UTF-8 without one; save the file as UTF-8 without BOM")
    return text


class _Doubled(Exception):
    pass


class _NotJson(Exception):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise _Doubled
    return value


def _constant(name: str) -> NoReturn:
    raise _NotJson(name)


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def _parse(text: str, position: int) -> tuple[Any, int]:
    """`(value, end)` of the JSON value at `position`; `_Broken` where it is none, holds a key twice, or is no valid text."""
    try:
        value, end = _DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        raise _explained(text, error) from None
    except _Doubled:
        raise _doubled_key(text, position) from None
    except _NotJson as error:
        at = next(token.start() for token in _tokens(text, position) if token.group() == str(error))
        raise _Broken(at, f"{error}, expected a number or null") from None
    except RecursionError:
        raise _Broken(position, "nested too deeply, expected a flat record") from None
    except ValueError:
        raise _Broken(position, "a number of thousands of digits, expected a shorter one or text") from None
    if text.find("\\ud", position, end) >= 0 or text.find("\\uD", position, end) >= 0:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            found = _LONE_SURROGATE.search(text, position, end)
            raise _Broken(found.start() if found else position, "half of a surrogate pair, expected a whole character") from None
    return value, end


def _tokens(text: str, position: int) -> Iterable[re.Match[str]]:
    """Strings, brackets and constants of JSON text; slow, for finding the place of an error only."""
    return re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]]|NaN|-?Infinity').finditer(text, position)


def _doubled_key(text: str, position: int) -> _Broken:
    open_objects: list[set[str]] = []
    for token in _tokens(text, position):
        found = token.group()
        if found == "{":
            open_objects.append(set())
        elif found == "}":
            open_objects.pop()
        elif found[0] == '"' and _at(text, token.end()) == ":":
            name = json.loads(found)
            if name in open_objects[-1]:
                return _Broken(token.start(), f'key "{name}" a second time, expected each key once')
            open_objects[-1].add(name)
    return _Broken(position, "a key twice in one object, expected each key once")


def _at(text: str, position: int) -> str:
    """The first character from `position` on that is no white space; "" at the end."""
    start = _skip(text, position)
    return text[start : start + 1]


def _explained(text: str, error: json.JSONDecodeError) -> _Broken:
    """The decoder's complaint in terms of what to change; the same for every Python version."""
    at = _skip(text, error.pos)
    here = text[at : at + 1]
    last = error.pos - 1
    while last >= 0 and text[last] in " \t\r\n":
        last -= 1
    comma = at if here == "," and _at(text, at + 1) in ("}", "]") else last if text[last] == "," and here in ("}", "]") else None
    if comma is not None:
        return _Broken(comma, "trailing comma, expected nothing between the last value and the closing bracket")
    if here == "\x00":
        return _Broken(at, "NUL byte, expected text")
    if error.msg.startswith("Invalid control character"):
        code = ord(text[error.pos])
        return _Broken(error.pos, f"control character 0x{code:02X} inside a string, expected it escaped (a line break as \\n)")
    if error.msg.startswith("Unterminated string"):
        return _Broken(error.pos, 'a string that never ends, expected a closing "')
    if here == "'":
        return _Broken(at, "single quotes, expected JSON's double quotes")
    for wrong, right in (("None", "null"), ("True", "true"), ("False", "false")):
        if text.startswith(wrong, at):
            return _Broken(at, f"{wrong}, expected JSON's {right}")
    if not here:
        return _Broken(last + 1, "the record ends too early, expected its closing bracket")
    return _Broken(at, f"not JSON: {error.msg[0].lower()}{error.msg[1:]}, found {here!r}")
