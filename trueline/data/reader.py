"""Records from data files one by one, each with the place it starts at, in memory that does not grow with the file.

One rule: problems are collected, never raised at the first; each says where (file:line:column), what, and what was expected.
"""

import codecs
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

from trueline.data.files import KNOWN, MINDRECORD, find_files, open_bytes, suffix
from trueline.data.json_text import LONGEST_RECORD, TOO_LONG, UTF_16, Broken, decode_line, not_utf8, offset, parse, skip
from trueline.data.mindrecord_text import read_tokens
from trueline.data.record import Problems, Record, kind, place_of
from trueline.data.tables import read_csv, read_parquet
from trueline.data.tokenizer import Tokenizer

BLOCK = 1 << 20
UNREADABLE = (OSError, EOFError, ValueError)
"""What opening or unpacking a file may raise; ValueError is a name no file can have."""


def read_records(paths: Sequence[str], problems: Problems | None = None, tokenizer: Tokenizer | None = None) -> Iterator[Record]:
    """Every object of every file that `paths` mean (see `find_files`), in order. After a broken record the next one is tried.

    Problems go to `problems`; without one, a UserError with all of them is raised after the last record.
    `tokenizer` makes text of the token ids in MindRecord files.
    """
    own = problems if problems is not None else Problems()
    for files in find_files(paths):
        for path in files:
            if _readable(path, own):
                yield from read_file(path, own, tokenizer)
    if problems is None:
        own.stop()


def read_file(path: str, problems: Problems, tokenizer: Tokenizer | None = None) -> Iterator[Record]:
    """Every object of one file that is known to be there."""
    ending = suffix(path)
    try:
        yield from read_tokens(path, problems, tokenizer) if ending == MINDRECORD else _READERS[ending](path, problems)
    except UNREADABLE as error:
        problems.add(path, f"cannot be read ({getattr(error, 'strerror', None) or error}), expected a readable file")


def _readable(path: str, problems: Problems) -> bool:
    place = Path(path)
    try:
        if not place.exists():
            what = "no file matches, expected" if any(sign in path for sign in "*?[") else "no such file, expected"
            problems.add(path, f"{what} a {KNOWN} file")
        elif place.is_dir():
            problems.add(path, f"a folder without data files, expected {KNOWN} files in it")
        elif not suffix(path):
            problems.add(path, f"file name ends in {place.suffix or 'nothing'}, expected {KNOWN}" + _plain_text(place))
        else:
            with open_bytes(path) as file:
                if file.read(1):
                    return True
            problems.add(path, "empty file, expected at least one record")
    except UNREADABLE as error:
        problems.add(path, f"cannot be read ({getattr(error, 'strerror', None) or error}), expected a readable file")
    return False


def _plain_text(place: Path) -> str:
    return "; plain text has no questions and answers to learn from" if place.suffix.lower() == ".txt" else ""


def _read_lines(path: str, problems: Problems) -> Iterator[Record]:
    """One object a line. Blank lines are allowed at the end only: inside, they are mostly what a broken export left of a record."""
    blank: list[int] = []
    with open_bytes(path) as file:
        for number, raw in enumerate(iter(partial(file.readline, LONGEST_RECORD), b""), start=1):
            if not raw.strip():
                blank.append(number)
                continue
            for line in blank:
                problems.add(f"{path}:{line}:1", "empty line, expected an object on every line; delete the line", record=(path, line, 1))
            blank.clear()
            try:
                text = decode_line(raw)
                start = skip(text, 0)
                if number == 1 and text[start : start + 1] == "[":
                    problems.add(f"{path}:1:1", "an array, expected one object a line; name a file that holds one array .json")
                    return
                value, end = parse(text, start)
                if end < len(text) and (rest := skip(text, end)) < len(text):
                    raise Broken(rest, "text after the object, expected one object a line")
            except Broken as broken:
                problems.add(f"{path}:{number}:{broken.position + 1}", broken.what, record=(path, number, 1))
                if len(raw) >= LONGEST_RECORD or (number == 1 and raw[:2] in UTF_16):  # what follows has no lines to be told apart
                    return
            else:
                if isinstance(value, dict):
                    yield Record(path, number, value, text, 1, _json_offset)
                else:
                    problems.add(f"{path}:{number}:1", f"{kind(value)}, expected an object", "record", (path, number, 1))


class Window:
    """The part of a file's text that is being looked at: grows at its end, is cut at its start, and knows where it stands in the file."""

    def __init__(self, file: IO[bytes]):
        self.text, self.at, self.line, self.column = "", 0, 1, 1
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8")()
        self._broken: Broken | None = None
        self._ended = False

    def more(self) -> bool:
        """Reads on; False at the end of the file, or of what is text."""
        if self._ended or self._broken:
            return False
        raw = self._file.read(max(BLOCK, len(self.text)))
        self._ended = not raw
        before = self._decode.getstate()[0]
        try:
            self.text += self._decode.decode(raw, final=self._ended)
        except UnicodeDecodeError as error:
            held = before + raw
            self._broken = not_utf8(held, error)
            self.text += held[: error.start].decode("utf-8")
            self._broken.position = len(self.text)
        return True

    def skip(self, at: int) -> int:
        """The next position that holds no white space; the end of the text only where the file ends."""
        at = skip(self.text, at)
        while at == len(self.text) and self.more():
            at = skip(self.text, at)
        if at == len(self.text) and self._broken:
            raise self._broken
        return at

    def value(self) -> tuple[Any, int]:
        """`(value, end)` of the JSON value here, reading on as long as that may help."""
        while True:
            try:
                value, end = parse(self.text, self.at)
                if end < len(self.text) or not self.more():
                    return value, end
            except Broken:
                if len(self.text) - self.at > LONGEST_RECORD:
                    raise Broken(self.at, TOO_LONG) from None
                if not self.more():
                    raise self._broken or parse_error(self.text, self.at) from None

    def move(self, at: int) -> None:
        """Goes on to `at`; what lies before is dropped from time to time."""
        lines = self.text.count("\n", self.at, at)
        self.line += lines
        self.column = at - self.text.rfind("\n", self.at, at) if lines else self.column + at - self.at
        self.at = at
        if at > BLOCK:
            self.text, self.at = self.text[at:], 0
            if self._broken:
                self._broken.position -= at

    def next_record(self, opening: str) -> bool:
        """Moves on to the next line that starts like `opening`; False when there is none."""
        while (found := self.text.find("\n" + opening, self.at)) < 0:
            self.move(max(self.at, len(self.text) - len(opening)))
            if not self.more():
                self.move(len(self.text))
                return False
        self.move(found + len(opening))
        return True


def parse_error(text: str, at: int) -> Broken:
    """What is wrong with the value at `at`."""
    try:
        parse(text, at)
    except Broken as broken:
        return broken
    return Broken(at, "not JSON")


def _read_json(path: str, problems: Problems) -> Iterator[Record]:
    """An array of objects; a file that opens with anything else holds objects one after the other, over one line or several each.

    After a broken record the next line that opens with { under the same indent is tried.
    """
    with open_bytes(path) as file:
        window = Window(file)
        try:
            window.more()
            if window.text.startswith("\ufeff"):
                raise Broken(0, "byte-order mark, expected UTF-8 without one; save the file as UTF-8 without BOM")
            window.move(window.skip(0))
            if window.at == len(window.text):
                raise Broken(0, "only white space, expected at least one record")
            array = window.text[window.at] == "["
            if array:
                window.move(window.skip(window.at + 1))
            yield from _read_values(path, window, array, problems)
        except Broken as broken:
            problems.add(_at(path, window, broken.position), f"{broken.what} (the file was read up to here)")


def _read_values(path: str, window: Window, array: bool, problems: Problems) -> Iterator[Record]:
    while window.at < len(window.text) and not (array and window.text[window.at] == "]"):
        line, column = window.line, window.column
        opening = window.text[window.at - column + 1 : window.at] if window.at >= column - 1 else ""
        try:
            value, end = window.value()
            text = window.text[window.at : end]
            following = window.skip(end)
            if not array and window.text[following : following + 1] == ",":
                raise Broken(following, "comma between records, expected one array in [ ] or one object a line")
        except Broken as broken:
            problems.add(_at(path, window, broken.position), broken.what, record=(path, line, column))
            if not window.next_record((opening if not opening.strip() else "") + "{"):
                return
            continue
        if isinstance(value, dict):
            yield Record(path, line, value, text, column, _json_offset)
        else:
            problems.add(f"{path}:{line}:{column}", f"{kind(value)}, expected an object", "record", (path, line, column))
        window.move(following)
        if array:
            _next_element(window)
    if array:
        _end_of_array(window)


def _next_element(window: Window) -> None:
    if window.text[window.at : window.at + 1] == ",":
        comma = window.at
        following = window.skip(comma + 1)
        if window.text[following : following + 1] == "]":
            raise Broken(comma, "trailing comma, expected nothing between the last record and ]")
        window.move(following)
    elif window.text[window.at : window.at + 1] not in ("]", ""):
        raise Broken(window.at, "expected , or ] after a record")


def _end_of_array(window: Window) -> None:
    if window.at == len(window.text):
        raise Broken(window.at, "the file ends inside the array, expected ]")
    rest = window.skip(window.at + 1)
    if rest < len(window.text):
        raise Broken(rest, "text after the array, expected the end of the file")


def _json_offset(text: str, field: str) -> int:
    return offset(text, 0, field)


def _at(path: str, window: Window, position: int) -> str:
    return place_of(path, window.line, window.column, window.text[window.at : position], position - window.at)


_READERS = {".jsonl": _read_lines, ".json": _read_json, ".csv": read_csv, ".tsv": read_csv, ".parquet": read_parquet}
