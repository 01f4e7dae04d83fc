"""Corrected copies of data files, and what could not be corrected set aside. The input is never touched.

One rule: only what has one possible meaning is changed, every change is counted, and nothing appears under its name before it is whole.
Left out: choosing between two readings, filling in what is missing, removing repeated records (some data repeats them on purpose).
"""

import codecs
import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trueline.data.files import open_bytes, suffix
from trueline.data.formats import FileValues
from trueline.data.json_text import UTF_16, Broken, parse, skip
from trueline.data.mend import fixed_value, mended
from trueline.data.record import Problems
from trueline.data.tables import read_parquet

_CHINESE = re.compile(r"[\x00-\x7f\u00b7\u2010-\u2026\u3000-\u30ff\u4e00-\u9fff\uff00-\uffef]*")
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]]', re.DOTALL)


@dataclass
class Repaired:
    """What became of one file: records copied and set aside, how often each kind of fix was made, and where things were written."""

    path: str
    copied: int = 0
    aside: int = 0
    fixes: Counter[str] = field(default_factory=Counter)
    reasons: list[str] = field(default_factory=list)


def repair(path: str, format: str, out: Path | None, quarantine: Path | None) -> Repaired:
    """Copies the good records of a file to `out` (JSON Lines), corrected where that is safe; without `out` nothing is corrected.

    Records that stay bad go to `quarantine` as they are, and why to `NAME.problems.txt` beside it; without `quarantine` their sentences
    are in `reasons` and `out` is not written.
    """
    done = Repaired(path)
    draft = (out or quarantine or Path(path)).with_suffix(".draft.jsonl")
    draft.parent.mkdir(parents=True, exist_ok=True)
    try:
        lines = _write_draft(path, draft, done, mend=out is not None)
        bad, done.reasons = _judge(path, draft, lines, format)
        done.aside, done.copied = len(bad), len(lines) - len(bad)
        kept = out if out is not None and (quarantine is not None or not bad) else None
        aside = quarantine if bad else None
        _divide(path, draft, bad, kept, aside, done.fixes)
        if aside is not None:
            _publish(aside.with_name(aside.stem + ".problems.txt"), [sentence.encode() + b"\n" for sentence in done.reasons])
    finally:
        draft.unlink(missing_ok=True)
    return done


def _write_draft(path: str, draft: Path, done: Repaired, mend: bool) -> list[int]:
    """One record a line, mended; returns the line of the original that each came from."""
    lines: list[int] = []
    with draft.open("wb") as file:
        for line, raw in _raw_records(path, done.fixes if mend else Counter()):
            for text in _texts(raw, done.fixes, mend):
                lines.append(line)
                file.write(text.encode("utf-8", "surrogateescape") + b"\n")
    return lines


def _texts(raw: str, fixes: Counter[str], mend: bool) -> list[str]:
    """The record as it goes into the draft: unchanged, corrected, or as several; text that cannot be read goes there unreadable still."""
    try:
        value, end = parse(raw, skip(raw, 0))
        values, change = [value], Counter[str]()
        if skip(raw, end) < len(raw):
            raise Broken(end, "more text")
    except Broken:
        change = Counter()
        values = mended(raw, change) if mend else []
        if not values:
            return [raw.replace("\n", "\x01").replace("\r", "\x01")]
    if mend:
        values = [fixed_value(value, change) for value in values]
    fixes.update(change)
    return [json.dumps(value, ensure_ascii=False) for value in values] if change or "\n" in raw else [raw]


def _judge(path: str, draft: Path, lines: list[int], format: str) -> tuple[set[int], list[str]]:
    """Which lines of the draft are bad, and why, with the lines of the original."""
    problems, reasons = Problems(keep=0), list[str]()

    def told(sentence: str) -> None:
        place = re.match(re.escape(str(draft)) + r"(?::(\d+))?(?::\d+)?(.*)", sentence, re.DOTALL)
        reasons.append(f"{path}:{lines[int(place[1]) - 1]}{place[2]}" if place and place[1] else sentence.replace(str(draft), path))

    problems.told = told
    for _ in FileValues[Any](str(draft), format, problems, []):
        continue
    return {line - 1 for _, line, _ in problems.records}, reasons


def _divide(path: str, draft: Path, bad: set[int], kept: Path | None, aside: Path | None, fixes: Counter[str]) -> None:
    """Writes the draft's good lines to `kept`, and to `aside` the originals of the others (drafts, where a line held several records)."""
    if kept is not None:
        with draft.open("rb") as file:
            _publish(kept, (line for i, line in enumerate(file) if i not in bad))
    if aside is None:
        return
    if fixes["several records on one line"]:
        with draft.open("rb") as file:
            _publish(aside, (line for i, line in enumerate(file) if i in bad))
    else:
        raws = (raw.encode("utf-8", "surrogateescape") + b"\n" for i, (_, raw) in enumerate(_raw_records(path, Counter())) if i in bad)
        _publish(aside, raws)


def _publish(path: Path, lines: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _raw_records(path: str, fixes: Counter[str]) -> Iterator[tuple[int, str]]:
    """`(line, text)` of every record, whole or broken; counts what decoding had to put right."""
    ending = suffix(path)
    if ending == ".parquet":
        for record in read_parquet(path, Problems()):
            yield record.line, json.dumps(record.value, ensure_ascii=False)
        return
    with open_bytes(path) as file:
        lines = _lines(file, fixes)
        if ending in (".csv", ".tsv"):
            yield from _rows((line for _, line in lines), "\t" if ending == ".tsv" else ",")
        elif ending == ".json":
            yield from _elements("\n".join(line for _, line in lines))
        else:
            yield from _one_a_line(lines, fixes)


def _one_a_line(lines: Iterator[tuple[int, str]], fixes: Counter[str]) -> Iterator[tuple[int, str]]:
    for number, line in lines:
        if number == 1 and line.lstrip().startswith("["):
            fixes["array instead of one record a line"] += 1
            yield from _elements("\n".join([line, *(line for _, line in lines)]))
            return
        if line.strip():
            yield number, line
        else:
            fixes["empty line"] += 1


def _lines(file: io.BufferedReader, fixes: Counter[str]) -> Iterator[tuple[int, str]]:
    """Decoded lines without their ends: UTF-8, UTF-16 with its mark, or Chinese in GBK; bytes of none of them stay as they are."""
    if file.peek(2)[:2] in UTF_16:
        fixes["UTF-16 text"] += 1
        yield from enumerate((line.rstrip("\r\n") for line in io.TextIOWrapper(file, "utf-16", newline="\n")), start=1)
        return
    for number, raw in enumerate(file, start=1):
        if number == 1 and raw.startswith(codecs.BOM_UTF8):
            fixes["byte-order mark"] += 1
            raw = raw[3:]
        fixes["CRLF line end"] += raw.endswith(b"\r\n")
        raw = raw.rstrip(b"\r\n")
        try:
            yield number, raw.decode("utf-8")
        except UnicodeDecodeError:
            text = _from_gbk(raw)
            fixes["GBK text"] += text is not None
            yield number, raw.decode("utf-8", "surrogateescape") if text is None else text


def _from_gbk(raw: bytes) -> str | None:
    """The text, if it is Chinese all through; other encodings decode as GBK too, to characters nobody writes."""
    try:
        text = raw.decode("gb18030")
    except UnicodeDecodeError:
        return None
    return text if _CHINESE.fullmatch(text) else None


def _elements(text: str) -> Iterator[tuple[int, str]]:
    """Objects of an array, or one after the other, told by their brackets alone."""
    depth, start, line, counted = 0, 0, 1, 0
    floor = 1 if text.lstrip().startswith("[") else 0
    for token in _BRACKETS.finditer(text):
        if token.group() in ("{", "["):
            if depth == floor and token.group() == "{":
                start = token.start()
            depth += 1
        elif token.group() in ("}", "]"):
            depth -= 1
            if depth == floor and token.group() == "}":
                line += text.count("\n", counted, start)
                counted = start
                yield line, text[start : token.end()]
    if depth > floor and start >= counted:
        yield line + text.count("\n", counted, start), text[start:]


def _rows(lines: Iterator[str], delimiter: str) -> Iterator[tuple[int, str]]:
    rows = csv.reader((line + "\n" for line in lines), delimiter=delimiter)
    names = next(rows, [])
    line = rows.line_num + 1
    for row in rows:
        if len(row) == len(names):
            yield line, json.dumps({name: cell for name, cell in zip(names, row, strict=True) if cell}, ensure_ascii=False)
        elif row:
            yield line, delimiter.join(row)
        line = rows.line_num + 1
