"""Records from tables: .csv, .tsv and .parquet.

One rule: a cell without a value is a key that is not there, for a table has every key in every row.
"""

import csv
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from typing import IO, Any

import pyarrow

from trueline.data.files import open_bytes, suffix
from trueline.data.json_text import LONGEST_RECORD, Broken, decode_line
from trueline.data.record import Problems, Record, place_of


class _Lines:
    """The lines of a table for the csv module, and those that the row being read is made of."""

    def __init__(self, file: IO[bytes]):
        self.held: list[str] = []
        self.number = 0
        self._lines = iter(partial(file.readline, LONGEST_RECORD), b"")

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        raw = next(self._lines)
        self.number += 1
        line = decode_line(raw) + "\n"
        self.held.append(line)
        return line


def read_csv(path: str, problems: Problems) -> Iterator[Record]:
    """Rows under a row of column names; texts may be quoted and then hold line breaks."""
    delimiter = "\t" if suffix(path) == ".tsv" else ","
    csv.field_size_limit(LONGEST_RECORD)
    with open_bytes(path) as file:
        lines = _Lines(file)
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        names: list[str] = []
        count = 0
        while True:
            line = lines.number + 1
            lines.held.clear()
            place = (path, line, 1)
            try:
                row = next(rows, None)
            except Broken as broken:
                problems.add(f"{path}:{lines.number}:{broken.position + 1}", broken.what, record=place)
                if not names:
                    return
                continue
            except csv.Error as error:
                what = f"not a row of a table: {error}; expected texts with quotes or line breaks in double quotes"
                problems.add(f"{path}:{line}:1", what, record=place)
                continue
            if row is None:
                break
            if not row:
                continue
            if not names:
                names = row
                if (said := _bad_header(names)) is not None:
                    problems.add(f"{path}:{line}:1", said)
                    return
                continue
            count += 1
            text = "".join(lines.held)
            locate = partial(_cell, names=names, delimiter=delimiter)
            if len(row) != len(names):
                where = place_of(path, line, 1, text, locate(text, names[min(len(row), len(names)) - 1]))
                what = f"{len(row)} cells, expected {len(names)} as in the first row (is a text with {delimiter!r} unquoted?)"
                problems.add(where, what, record=place)
                continue
            yield Record(path, line, {name: cell for name, cell in zip(names, row, strict=True) if cell}, text, 1, locate)
        if not count and not problems.count:
            problems.add(path, "a table without rows, expected at least one record")


def _bad_header(names: list[str]) -> str | None:
    doubled = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if doubled is not None:
        return f'column "{doubled}" a second time, expected each column once'
    return None if all(name.strip() for name in names) else "a column without a name, expected a name for every column in the first row"


def _cell(text: str, field: str, names: list[str], delimiter: str) -> int:
    """Where the cell of a field starts in the text of a row; its first character where there is no such column."""
    name = field.split(".")[0].split("[")[0]
    wanted, at, quoted = names.index(name) if name in names else 0, 0, False
    for i, c in enumerate(text):
        if not wanted:
            break
        quoted ^= c == '"'
        if c == delimiter and not quoted:
            wanted, at = wanted - 1, i + 1
    return at


def read_parquet(path: str, problems: Problems) -> Iterator[Record]:
    """Rows, numbered from 1."""
    row = 0
    try:
        with import_module("pyarrow.parquet").ParquetFile(path) as file:  # loaded for this: 5 MB that no other file needs
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
