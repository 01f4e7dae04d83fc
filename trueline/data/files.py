"""Which files a data path means; how files are opened, hashed and put on the disk.

One rule: the files are sorted, so that a data set is one order everywhere.
A path is a file, a folder (all data files in it and below), or a pattern with `*`, `?` or `[...]`. `x.mindrecord` is also a name for its
shards `x.mindrecord0`, `x.mindrecord1` and so on.
"""

import glob
import gzip
import hashlib
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import cast

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
PACKED = ".gz"
MINDRECORD = ".mindrecord"
KNOWN = ".json, .jsonl, .csv, .tsv (each also .gz), .parquet or .mindrecord"


def suffix(path: str) -> str:
    """`.jsonl` of `a.jsonl` and of `a.jsonl.gz`, in lower case, `.mindrecord` of `a.mindrecord3`; "" when it is no data file's."""
    name = Path(path).name.lower()
    packed = name.endswith(PACKED)
    ending = Path(name.removesuffix(PACKED)).suffix
    if re.fullmatch(rf"{MINDRECORD}\d*", ending) and ending == Path(name).suffix:
        return MINDRECORD
    return ending if ending in SUFFIXES and not (packed and ending == ".parquet") else ""


def find_files(paths: Sequence[str]) -> list[list[str]]:
    """The files each path means, in order. A path that names no folder and matches nothing stands for itself: who reads it will say so."""
    return [_find(path) for path in paths]


def _find(path: str) -> list[str]:
    place = Path(path)
    try:
        if place.is_dir():
            inside = (found for found in place.rglob("*") if suffix(str(found)) and found.is_file())
            hidden = (found for found in inside if not any(part.startswith(".") for part in found.relative_to(place).parts))
            return sorted(map(str, hidden)) or [path]
        if not place.exists() and place.suffix == MINDRECORD:
            shards = (found for found in place.parent.glob(f"{glob.escape(place.name)}*") if suffix(str(found)))
            return [str(found) for found in sorted(shards, key=lambda found: (len(found.name), found.name))] or [path]
        if not place.exists() and glob.has_magic(path):
            return sorted(found for found in glob.glob(path, recursive=True) if Path(found).is_file()) or [path]
    except (OSError, ValueError):
        return [path]
    return [path]


def open_bytes(path: str) -> io.BufferedReader:
    """The file's bytes, unpacked when its name ends in .gz."""
    raw = gzip.open(path) if path.lower().endswith(PACKED) else open(path, "rb", buffering=0)
    return io.BufferedReader(cast(io.RawIOBase, raw), 1 << 18)


def file_hash(path: Path | str) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Returns when the file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
