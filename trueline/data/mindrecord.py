"""MindRecord files, in and out, without MindSpore. One rule: the file alone is read; its `.db` index is written for MindSpore, never read.

A file is a header of `header_size` bytes (u64 length, JSON), then pages of `page_size` bytes, the last one cut short. Rows of a raw page
are msgpack maps of single numbers and texts, rows of a blob page hold arrays; each row follows its length (u64). A blob row's columns
each follow their length (u64, big-endian), unless there is only one. Arrays of integers are compressed: see `_widths`.
"""

import json
import mmap
import os
import sqlite3
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trueline.errors import UserError

ARRAYS = {"int32": "<i4", "int64": "<i8", "float32": "<f4", "float64": "<f8"}
NUMBER = "number"
HEADER_BYTES, PAGE_BYTES = 1 << 24, 1 << 25  # MindSpore's own defaults; the unused parts are holes
INDEX = "ROW_ID PAGE_ID_RAW PAGE_OFFSET_RAW PAGE_OFFSET_RAW_END ROW_GROUP_ID PAGE_ID_BLOB PAGE_OFFSET_BLOB PAGE_OFFSET_BLOB_END".split()
Row = dict[str, Any]
Data = bytes | mmap.mmap


class _Broken(Exception):
    """What is wrong with a file, without its name."""


@dataclass(frozen=True)
class _Shard:
    data: mmap.mmap
    header: dict[str, Any]
    columns: dict[str, dict[str, Any]]
    blobs: list[str]

    def pages(self, kind: str) -> list[tuple[int, int]]:
        """Begin and end of the pages of a kind, in the order of their rows."""
        found = sorted((p for p in self.header["page"] if p["page_type"] == kind and p["page_size"]), key=lambda p: int(p["page_type_id"]))
        spans = []
        for page in found:
            start = self.header["header_size"] + page["page_id"] * self.header["page_size"]
            if not 0 <= page["page_size"] <= self.header["page_size"] or page["page_id"] < 0 or start + page["page_size"] > len(self.data):
                raise _Broken(f"page {page['page_id']} lies beyond the file's end")
            spans.append((start, start + page["page_size"]))
        return spans


def read_mindrecord(path: str | Path) -> Iterator[Row]:
    """The records of a file and of the other shards its header names, in order.

    An array is a numpy array of the column's dtype and shape, a single number an int or float, text a str, and `bytes` is bytes.
    """
    first = Path(path)
    if not first.is_file() and first.with_name(first.name + "0").is_file():
        first = first.with_name(first.name + "0")
    opened = _open(first)
    for file in _shards(first, opened):
        if _open(file).columns != opened.columns:
            raise UserError(f"{file}: other columns than {first.name}, expected shards of one data set")
        yield from read_shard(file)


def read_shard(path: Path) -> Iterator[Row]:
    """The records of one file alone, when the others its header names are beside it."""
    opened = _open(path)
    if gone := [file.name for file in _shards(path, opened) if not file.is_file()]:
        raise UserError(f"{path}: one of {len(_shards(path, opened))} shards, of which {gone[0]} is not beside it; copy it there")
    try:
        yield from _rows(opened)
    except (_Broken, KeyError, TypeError, ValueError, IndexError, struct.error, RecursionError) as problem:
        raise UserError(f"{path}: damaged MindRecord file ({problem}); copy it again") from None


def _shards(path: Path, opened: _Shard) -> list[Path]:
    """The files of the data set: only beside this one, wherever they lay when they were written."""
    addresses = opened.header.get("shard_addresses") or []
    return [path.with_name(Path(str(name)).name) for name in addresses] if len(addresses) > 1 else [path]


def _open(path: Path) -> _Shard:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < 8:
                raise _Broken("it is too short")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        (length,) = struct.unpack("<Q", data[:8])
        if length > len(data) - 8:
            raise _Broken(f"a header of {length:,} bytes in a file of {len(data):,}")
        header = json.loads(data[8 : 8 + length])
        schema = header["schema"][0]
        columns, blobs = schema["schema"], list(schema.get("blob_fields") or [])
        sizes = (header["header_size"], header["page_size"])
        if not all(isinstance(size, int) and size > 0 for size in sizes) or not all(isinstance(columns[name], dict) for name in blobs):
            raise _Broken("sizes or columns that are none")
        return _Shard(data, header, columns, blobs)
    except OSError as problem:
        raise UserError(f"{path}: cannot be read ({problem.strerror or problem})") from None
    except (_Broken, KeyError, TypeError, ValueError, IndexError, RecursionError) as problem:
        raise UserError(f"{path}: not a MindRecord file, or damaged ({problem})") from None


def _rows(shard: _Shard) -> Iterator[Row]:
    raws = _pieces(shard.data, shard.pages("RAW_DATA"))
    blobs = _pieces(shard.data, shard.pages("BLOB_DATA"))
    for raw, blob in zip(raws, blobs if shard.blobs else iter(lambda: b"", None), strict=bool(shard.blobs)):
        values, end = _unpack(raw, 0)
        if not isinstance(values, dict) or end != len(raw):
            raise _Broken("a row that is no map")
        row = {name: values[name] for name in shard.columns if name in values}
        position = 0
        for name in shard.blobs:
            size = len(blob) if len(shard.blobs) == 1 else struct.unpack_from(">Q", blob, position)[0]
            position += 0 if len(shard.blobs) == 1 else 8
            if size > len(blob) - position:
                raise _Broken(f"column {name} of {size:,} bytes in a row of {len(blob):,}")
            row[name] = _value(blob[position : position + size], shard.columns[name])
            position += size
        yield {name: row[name] for name in shard.columns if name in row}


def _pieces(data: Data, spans: list[tuple[int, int]]) -> Iterator[bytes]:
    for start, end in spans:
        while start < end:
            length = struct.unpack_from("<Q", data, start)[0] if end - start >= 8 else -1
            if not 0 <= length <= end - start - 8:
                raise _Broken(f"a row of {length:,} bytes where {end - start:,} are left")
            yield data[start + 8 : start + 8 + length]
            start += 8 + length


def _value(raw: bytes, column: dict[str, Any]) -> Any:
    kind = column["type"]
    if kind == "bytes":
        return raw
    if kind not in ARRAYS:
        raise _Broken(f"an array of type {kind}")
    found = _expand(raw, ARRAYS[kind]) if kind.startswith("int") else np.frombuffer(raw, ARRAYS[kind]).copy()
    return found.reshape([int(size) for size in column.get("shape") or [-1]])


def _widths(codes: np.ndarray) -> np.ndarray:
    """A compressed array is its count (u32, big-endian), a two-bit code for each number (the first in the highest bits of its byte), and
    the numbers in 1, 2, 4 or 8 bytes, little-endian, as their codes 0, 1, 2, 3 say."""
    return np.left_shift(1, codes.astype(np.int64))


def _expand(raw: bytes, dtype: str) -> np.ndarray:
    (count,) = struct.unpack_from(">I", raw)
    packed = np.frombuffer(raw, np.uint8, offset=4)
    tags = (count + 3) // 4
    if tags > len(packed):
        raise _Broken(f"{count:,} numbers in {len(raw):,} bytes")
    codes = (packed[:tags, None] >> np.array([6, 4, 2, 0], np.uint8) & 3).reshape(-1)[:count]
    widths = _widths(codes)
    ends = np.cumsum(widths)
    body = packed[tags:]
    if (int(ends[-1]) if count else 0) != len(body):
        raise _Broken(f"{len(body):,} bytes for {count:,} numbers")
    out = np.empty(count, dtype)
    for code in range(4):
        at = np.flatnonzero(codes == code)
        places = (ends - widths)[at][:, None] + np.arange(1 << code)
        out[at] = np.ascontiguousarray(body[places]).view(f"<i{1 << code}").reshape(-1)
    return out


def _compress(values: np.ndarray) -> bytes:
    codes = np.zeros(len(values), np.uint8)
    for code, bits in ((1, 8), (2, 16), (3, 32)):
        codes[(values < -(1 << bits - 1)) | (values >= 1 << bits - 1)] = code
    padded = np.zeros((len(codes) + 3) // 4 * 4, np.uint8)
    padded[: len(codes)] = codes
    tags = (padded.reshape(-1, 4) << np.array([6, 4, 2, 0], np.uint8)).sum(axis=1).astype(np.uint8)
    widths = _widths(codes)
    kept = np.arange(8) < widths[:, None]
    body = np.ascontiguousarray(values.astype("<i8")).view(np.uint8).reshape(-1, 8)[kept]
    return struct.pack(">I", len(values)) + tags.tobytes() + body.tobytes()


def write_mindrecord(path: Path, columns: dict[str, str], rows: Iterable[Row], shards: int = 1, about: str = "trueline") -> int:
    """Writes flat arrays and numbers, `columns` being name -> int32, int64, float32, float64, or "number" for one int64.

    Returns the number of records.

    One file, or `shards` of them with their number at the end of the name (record i is in shard i % shards), each with its index
    `NAME.db`. All have their names only when all are complete.
    """
    if unknown := {kind for kind in columns.values() if kind not in (*ARRAYS, NUMBER)}:
        raise ValueError(f"column types {unknown}, expected {', '.join(ARRAYS)} or {NUMBER}")
    width = len(str(shards - 1))  # as MindSpore names them
    names = [path.name] if shards == 1 else [f"{path.name}{number:0{width}}" for number in range(shards)]
    finals = [path.with_name(name) for name in names]
    if there := [file for final in finals for file in (final, final.with_name(f"{final.name}.db")) if file.exists()]:
        raise UserError(f"{there[0]}: is already there; name another file, or remove this one first")
    temporary = [final.with_name(f".{final.name}.{os.getpid()}.tmp") for final in finals]
    count = 0
    try:
        writers = [_Writer(place, dict(sorted(columns.items()))) for place in temporary]
        for row in rows:
            writers[count % shards].add(row, f"{path}: record {count + 1}")
            count += 1
        for number, (writer, final) in enumerate(zip(writers, finals, strict=True)):
            writer.finish(number, names, about)
            os.rename(f"{temporary[number]}.db", f"{final}.db")
        for place, final in zip(temporary, finals, strict=True):
            os.rename(place, final)
    finally:
        for place in temporary:
            place.unlink(missing_ok=True)
            Path(f"{place}.db").unlink(missing_ok=True)
    return count


class _Writer:
    """One file on its way: blob rows go to the open page, raw rows are written at the end, being all of one length."""

    def __init__(self, place: Path, columns: dict[str, str]):
        self.place = place
        self.columns = {name: kind for name, kind in columns.items() if kind != NUMBER}
        self.numbers = [name for name in columns if name not in self.columns]
        self.raws: list[bytes] = []
        self.file = place.open("wb")
        self.blob_pages: list[list[int]] = []  # first row, last row + 1, bytes
        self.offsets: list[tuple[int, int, int]] = []  # page, begin and end of each blob row
        self.saved = 0

    def add(self, row: Row, where: str) -> None:
        parts = []
        for name, kind in self.columns.items():
            values = np.asarray(row[name])
            if values.ndim != 1 or not len(values):
                raise UserError(f"{where}: {name} has shape {list(values.shape)}, expected a flat array of at least one number")
            values = values.astype(ARRAYS[kind], casting="same_kind")
            raw = _compress(values) if kind.startswith("int") else values.tobytes()
            self.saved += values.nbytes - len(raw) if kind.startswith("int") else 0
            parts.append(raw if len(self.columns) == 1 else struct.pack(">Q", len(raw)) + raw)
        blob = b"".join(parts)
        data = struct.pack("<Q", len(blob)) + blob
        if len(data) > PAGE_BYTES:
            raise UserError(f"{where}: {len(data):,} bytes, more than a page of {PAGE_BYTES:,}")
        if not self.blob_pages or self.blob_pages[-1][2] + len(data) > PAGE_BYTES:
            self.blob_pages.append([len(self.offsets), len(self.offsets), 0])
        page = self.blob_pages[-1]
        self.file.seek(HEADER_BYTES + (len(self.blob_pages) - 1) * PAGE_BYTES + page[2])
        self.file.write(data)
        self.offsets.append((len(self.blob_pages) - 1, page[2], page[2] + len(data)))
        raw = b"".join(_packed(name) + b"\xd3" + struct.pack(">q", row[name]) for name in self.numbers)
        raw = bytes([0x80 | len(self.numbers)]) + raw if raw else b"\x81\xa2id\x00"  # {"id": 0}: what a row without numbers holds
        self.raws.append(struct.pack("<Q", len(raw)) + raw)
        page[1], page[2] = page[1] + 1, page[2] + len(data)

    def finish(self, shard: int, names: list[str], about: str) -> None:
        length = len(self.raws[0]) if self.raws else 1
        per_page = PAGE_BYTES // length
        pages = [_page(i, "BLOB_DATA", i, shard, size, first, last) for i, (first, last, size) in enumerate(self.blob_pages)]
        index = []
        for start in range(0, len(self.offsets), per_page):
            rows = self.offsets[start : start + per_page]
            number = len(pages)
            self.file.seek(HEADER_BYTES + number * PAGE_BYTES)
            self.file.write(b"".join(self.raws[start : start + per_page]))
            pages.append(_page(number, "RAW_DATA", start // per_page, shard, length * len(rows), 0, 0))
            index += [(start + i, number, i * length, (i + 1) * length, page, page, a, b) for i, (page, a, b) in enumerate(rows)]
        schema: dict[str, Any] = {name: {"shape": [-1], "type": kind} for name, kind in self.columns.items()}
        schema |= {name: {"type": "int64"} for name in self.numbers}
        header = {
            "compression_size": self.saved, "header_size": HEADER_BYTES, "index_fields": None, "page": pages, "page_size": PAGE_BYTES,
            "schema": [{"blob_fields": list(self.columns), "desc": about, "schema": schema}], "shard_addresses": names, "shard_id": shard,
            "statistics": None, "version": "3.0",
        }  # fmt: skip
        text = json.dumps(header).encode()
        if len(text) + 8 > HEADER_BYTES:
            raise UserError(f"{self.place}: {len(pages):,} pages, more than one file can list; use more shards")
        self.file.seek(0)
        self.file.write(struct.pack("<Q", len(text)) + text)
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        with sqlite3.connect(f"{self.place}.db") as database:
            database.execute("CREATE TABLE SHARD_NAME(NAME TEXT NOT NULL)")
            database.execute("INSERT INTO SHARD_NAME VALUES(?)", (names[shard],))
            database.execute(f"CREATE TABLE INDEXES({', '.join(f'{name} INT NOT NULL' for name in INDEX)}, PRIMARY KEY(ROW_ID))")
            database.executemany(f"INSERT INTO INDEXES VALUES({','.join('?' * len(INDEX))})", index)
        database.close()


def _page(number: int, kind: str, of_kind: int, shard: int, size: int, first: int, last: int) -> dict[str, Any]:
    return {
        "end_row_id": last, "page_id": number, "page_size": size, "page_type": kind, "page_type_id": of_kind,
        "row_group_ids": [{"id": 0, "offset": 0}], "shard_id": shard, "start_row_id": first,
    }  # fmt: skip


def _packed(name: str) -> bytes:
    """A short text in msgpack."""
    raw = name.encode()
    return bytes([0xA0 | len(raw)]) + raw


def _unpack(data: bytes, at: int) -> tuple[Any, int]:
    """`(value, end)` of one msgpack value of the kinds that rows hold."""
    kind = data[at]
    at += 1
    if kind < 0x80 or kind >= 0xE0:
        return (kind if kind < 0x80 else kind - 256), at
    if kind in _NUMBERS:
        code = _NUMBERS[kind]
        return struct.unpack_from(code, data, at)[0], at + struct.calcsize(code)
    if kind in (0xC0, 0xC2, 0xC3):
        return {0xC0: None, 0xC2: False, 0xC3: True}[kind], at
    size = kind & 0x1F if 0xA0 <= kind <= 0xBF else kind & 0x0F
    if kind in _SIZED:
        size, at = struct.unpack_from(_SIZED[kind], data, at)[0], at + struct.calcsize(_SIZED[kind])
    if 0xA0 <= kind <= 0xBF or kind in _SIZED and kind != 0xDE:
        if size > len(data) - at:
            raise _Broken(f"a text of {size:,} bytes in a row of {len(data):,}")
        raw = data[at : at + size]
        return (raw if kind in (0xC4, 0xC5, 0xC6) else raw.decode("utf-8")), at + size
    if not (0x80 <= kind <= 0x8F or kind == 0xDE):
        raise _Broken(f"a value of unknown kind {kind:#x}")
    found = {}
    for _ in range(size):
        name, at = _unpack(data, at)
        found[name], at = _unpack(data, at)
    return found, at


_NUMBERS = {
    0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q",
}  # fmt: skip
_SIZED = {0xC4: ">B", 0xC5: ">H", 0xC6: ">I", 0xD9: ">B", 0xDA: ">H", 0xDB: ">I", 0xDE: ">H"}
