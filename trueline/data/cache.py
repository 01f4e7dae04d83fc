"""Rendered records as arrays, and on disk: every file's tokens once, under a key of all they depend on.

One rule: what stands under a key is whole, for its manifest is complete and one rename published it; a chunk is read only if its hash fits.

<folder>/<key>/   chunk-000000.arrow ..., manifest.json (counts, and size and SHA-256 of every chunk); <key>.part while it is made
"""

import fcntl
import hashlib
import json
import os
import shutil
import struct
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, overload

import numpy as np
import pyarrow as pa
from numpy.typing import DTypeLike, NDArray

from trueline.data.conversation import Conversation, Message, Prompt
from trueline.data.files import file_hash, sync
from trueline.data.sample import Pair, Sample
from trueline.errors import RunError, UserError, disk_full

FORMAT = 3
CHUNK = 10_000  # records; what a kill can cost
MANIFEST = "manifest.json"
_SIZES = struct.Struct("qq")  # tokens and context of a sample, in front of them in its digest
T = TypeVar("T")
Kind = Literal["sample", "pair", "prompt"]
SIDES: dict[Kind, tuple[str, ...]] = {"sample": ("",), "pair": ("chosen_", "rejected_"), "prompt": ("",)}


@dataclass(frozen=True)
class TokenPrompt:
    """A prompt as the model sees it, and where it came from."""

    tokens: list[int]
    prompt: Prompt

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass
class Tally:
    """How far a file has been read, and what became of its records. `failed`: not all of them can be used, so none are kept."""

    seen: int = 0
    dropped: int = 0
    truncated: int = 0
    equal: list[int] = field(default_factory=list)  # lines of pairs that were left out
    failed: bool = False


Rows = Callable[[Tally], Iterator[Sequence[Any]]]
"""The items of each record of a file, from record `tally.seen` on; counts in the tally before each record's."""


class Block:
    """The items of one chunk, in arrays that are copied when an item is asked for and not before."""

    def __init__(self, batch: pa.RecordBatch, kind: Kind):
        self.kind, self.batch = kind, batch
        self.sides = []
        for side in SIDES[kind]:
            tokens, trained = batch.column(f"{side}tokens"), batch.column(f"{side}trained")
            offsets = np.frombuffer(tokens.buffers()[1], np.int64, len(batch) + 1)
            values = tokens.values
            ids = np.frombuffer(values.buffers()[1], np.uint32, len(values)) if len(values) else np.empty(0, np.uint32)
            bits = np.frombuffer(trained.values.buffers()[1], np.uint8) if len(values) else np.empty(0, np.uint8)
            self.sides.append((offsets, ids, bits, *(batch.column(f"{side}{name}").to_numpy() for name in ("context", "anchor"))))

    def __len__(self) -> int:
        return len(self.batch)

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each side `[records, sides]`."""
        return np.stack([np.diff(offsets) for offsets, *_ in self.sides], axis=1)

    def records(self) -> NDArray[np.int64]:
        """The record each item was made from, by its number in the file."""
        return np.frombuffer(self.batch.column("record").buffers()[1], np.int64, len(self.batch))

    def digests(self) -> NDArray[np.void]:
        """`digest` of each item."""
        return np.frombuffer(self.batch.column("digest").buffers()[1], "V16", len(self.batch))

    def item(self, i: int) -> Any:
        samples = [self._sample(side, i) for side in self.sides]
        if self.kind == "prompt":
            found = json.loads(self.batch.column("prompt")[i].as_py())
            messages = tuple(Message(*message) for message in found["messages"])
            return TokenPrompt(samples[0].tokens, Prompt(Conversation(messages, tuple(found["tools"])), found["record"]))
        return Pair(samples[0], samples[1]) if self.kind == "pair" else samples[0]

    @staticmethod
    def _sample(side: tuple[Any, ...], i: int) -> Sample:
        offsets, ids, bits, contexts, anchors = side
        first, last = int(offsets[i]), int(offsets[i + 1])
        window = np.unpackbits(bits[first // 8 : -(-last // 8)], bitorder="little")[first % 8 : first % 8 + last - first]
        anchor = int(anchors[i]) if anchors[i] >= 0 else None
        return Sample(ids[first:last].tolist(), window.view(np.bool_).tolist(), int(contexts[i]), anchor)


class Items(Sequence[T], Generic[T]):
    """Items of several blocks in some order, made when asked for. `sides` `[items, sides]` are their lengths in tokens."""

    def __init__(self, blocks: Sequence[Block], order: NDArray[np.int64] | None = None):
        self._blocks = blocks
        self._starts = np.cumsum([0, *(len(block) for block in blocks)])
        self._order = np.arange(self._starts[-1]) if order is None else order
        sides = [block.lengths() for block in blocks]
        self.sides: NDArray[np.int64] = np.concatenate(sides)[self._order] if sides else np.empty((0, 1), np.int64)

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, i: int) -> T: ...

    @overload
    def __getitem__(self, i: slice) -> "Items[T]": ...

    def __getitem__(self, i: int | slice) -> "T | Items[T]":
        if isinstance(i, slice):
            return Items(self._blocks, self._order[i])
        place = int(self._order[i])
        home = int(np.searchsorted(self._starts, place, side="right")) - 1
        found: T = self._blocks[home].item(place - int(self._starts[home]))
        return found

    def take(self, order: NDArray[np.int64]) -> "Items[T]":
        """The items at these places of this sequence, in this order."""
        return Items(self._blocks, self._order[order])

    def digests(self) -> NDArray[np.void]:
        """`digest` of every item, without making any."""
        return self.told(Block.digests, "V16")

    def told(self, ask: Callable[[Block], NDArray[Any]], dtype: DTypeLike) -> NDArray[Any]:
        """What `ask` tells of every item, a block at a time."""
        return np.concatenate([np.empty(0, dtype), *map(ask, self._blocks)])[self._order]


def lengths(items: Sequence[Any]) -> NDArray[np.int64]:
    """Tokens of each item, of a pair those of both sides; without making any item of `Items`."""
    sides = getattr(items, "sides", None)
    return np.array([len(item) for item in items], np.int64) if sides is None else sides.sum(axis=1)


def items_fingerprint(*parts: Sequence[Any]) -> str:
    """Hash of all items' tokens, of which are trained and of their contexts, in order; stored digests give the same as the items do."""
    total = hashlib.sha256()
    for items in parts:
        total.update(items.digests().tobytes() if hasattr(items, "digests") else b"".join(digest(item) for item in items))
    return total.hexdigest()


def digest(item: Sample | Pair | TokenPrompt) -> bytes:
    """16 bytes that tell an item's tokens, trained tokens and contexts from any other's."""
    return _digest([_parts(sample) for sample in _samples(item)])


def _digest(samples: Sequence[tuple[bytes, "array[int]", bytes]]) -> bytes:
    return hashlib.blake2b(b"".join(part for parts in samples for part in parts), digest_size=16).digest()


def _parts(sample: Sample) -> tuple[bytes, "array[int]", bytes]:
    return _SIZES.pack(len(sample.tokens), sample.context), array("I", sample.tokens), bytes(sample.trained)


def _samples(item: Sample | Pair | TokenPrompt) -> tuple[Sample, ...]:
    if isinstance(item, Pair):
        return item.chosen, item.rejected
    return (item,) if isinstance(item, Sample) else (Sample(item.tokens, [False] * len(item.tokens)),)


class _Gathered:
    """The rows of the chunk being made."""

    def __init__(self, kind: Kind):
        self.kind = kind
        self.records, self.digests, self.prompts = array("q"), bytearray(), list[bytes]()
        self.sides = [(array("q", [0]), array("I"), bytearray(), array("i"), array("i")) for _ in SIDES[kind]]

    def add(self, item: Any, record: int) -> None:
        self.records.append(record)
        samples = _samples(item)
        parts = [_parts(sample) for sample in samples]
        self.digests += _digest(parts)
        for (offsets, tokens, trained, contexts, anchors), sample, (_, ids, bits) in zip(self.sides, samples, parts, strict=True):
            tokens.extend(ids)
            trained += bits
            offsets.append(len(tokens))
            contexts.append(sample.context)
            anchors.append(-1 if sample.anchor is None else sample.anchor)
        if isinstance(item, TokenPrompt):
            talk = item.prompt.conversation
            whole = {"messages": [(m.role, m.content, m.tool) for m in talk.messages], "tools": talk.tools, "record": item.prompt.record}
            self.prompts.append(json.dumps(whole, ensure_ascii=False, default=str).encode())

    def batch(self) -> pa.RecordBatch:
        count = len(self.records)
        digests = pa.Array.from_buffers(pa.binary(16), count, [None, pa.py_buffer(bytes(self.digests))])
        columns: dict[str, pa.Array] = {"record": pa.array(np.array(self.records)), "digest": digests}
        for name, (offsets, tokens, trained, *places) in zip(SIDES[self.kind], self.sides, strict=True):
            ends = pa.array(np.array(offsets))
            columns[f"{name}tokens"] = pa.LargeListArray.from_arrays(ends, pa.array(np.array(tokens, np.uint32)))
            columns[f"{name}trained"] = pa.LargeListArray.from_arrays(ends, pa.array(np.frombuffer(bytes(trained), np.bool_)))
            columns |= {f"{name}{of}": pa.array(np.array(x, np.int32)) for of, x in zip(("context", "anchor"), places, strict=True)}
        if self.kind == "prompt":
            columns["prompt"] = pa.array(self.prompts, pa.large_binary())
        return pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))


def _chunks(rows: Iterator[Sequence[Any]], kind: Kind, size: int, tally: Tally) -> Iterator[pa.RecordBatch]:
    """A chunk ends with a record, whose items stay together: a start that goes on does so with the next record."""
    gathered = _Gathered(kind)
    for items in rows:
        if not tally.failed:
            for item in items:
                gathered.add(item, tally.seen)
            if len(gathered.records) >= size:
                yield gathered.batch()
                gathered = _Gathered(kind)
    if gathered.records and not tally.failed:
        yield gathered.batch()


@dataclass(frozen=True)
class Kept:
    """What is known of one file: its items, its counts, where they are stored (None: in memory only), and what is to be said."""

    blocks: list[Block]
    tally: Tally
    place: Path | None = None
    made: bool = True  # now; False: found in the cache
    note: str = ""


def in_memory(kind: Kind, rows: Rows) -> Kept:
    """The items of a file without a cache, in the same arrays."""
    tally = Tally()
    blocks = [Block(batch, kind) for batch in _chunks(rows(tally), kind, CHUNK, tally)]
    return Kept([] if tally.failed else blocks, tally)


def stored(folder: Path, facts: dict[str, Any], kind: Kind, rows: Rows, chunk: int = CHUNK) -> Kept:
    """The items of a file from the cache in `folder`; what is not there yet is made from `rows` and put there.

    `facts` are all that the items depend on. Of several processes that want the same, one makes it and the others wait. After a kill the
    next one goes on behind the last whole chunk, to the same bytes. Nothing is kept of a file that fails. RunError for a full disk.
    """
    place = folder / key_of(facts)
    found = _open(place, kind)
    if isinstance(found, Kept):
        return found
    try:
        with _building(place) as part:
            found = _open(place, kind)  # another process may have made it meanwhile
            if isinstance(found, Kept):
                shutil.rmtree(part)
                return found
            note = f"{place} was damaged ({found}) and is made again" if found else ""
            if found:
                shutil.rmtree(place)
            tally = _make(part, facts, kind, rows, chunk)
            if tally.failed:
                shutil.rmtree(part)
                return Kept([], tally)
            os.rename(part, place)
            sync(folder)
    except OSError as error:
        _refuse(error, place)
    made = _open(place, kind)
    if not isinstance(made, Kept):
        raise RunError(f"{place} was written but does not read back: {made or 'it is gone'}; the disk may be failing; set data.cache=off")
    return replace(made, made=True, note=note)


def key_of(facts: dict[str, Any]) -> str:
    """The name of an entry: a hash of the facts and of this file's format."""
    return hashlib.sha256(_canonical({"format": FORMAT, **facts})).hexdigest()


def _refuse(error: OSError, place: Path) -> None:
    if disk_full(error):
        shutil.rmtree(f"{place}.part", ignore_errors=True)
        advice = "free some space, set data.cache to a folder on another disk, or set data.cache=off"
        raise RunError(f"disk full: the tokens could not be stored in {place.parent}; {advice}") from error
    advice = "name another folder, or set data.cache=off"
    raise UserError(f"data.cache: {place.parent} cannot be used to store tokens in ({error.strerror or error}); {advice}") from error


@contextmanager
def _building(place: Path) -> Iterator[Path]:
    """Holds the folder `<place>.part` (made if missing) for this process, once nobody else does.

    The kernel's lock is on the folder itself, so nothing is left to be cleaned away; a folder that was published or removed while this
    process waited is not the one that the name means now.
    """
    part = place.with_name(f"{place.name}.part")
    while True:
        part.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if part.exists() and os.fstat(handle).st_ino == part.stat().st_ino:
                yield part
                return
        finally:
            os.close(handle)


def _make(part: Path, facts: dict[str, Any], kind: Kind, rows: Rows, size: int) -> Tally:
    """Writes what is missing of the chunks and the manifest; after each chunk the manifest tells how far it is."""
    chunks = _sound_chunks(part, facts)
    tally = Tally(**(chunks[-1]["tally"] if chunks else {}))
    batches = _chunks(rows(tally), kind, size, tally)
    for batch in batches:
        name = f"chunk-{len(chunks):06d}.arrow"
        with (part / name).open("wb") as file:
            with pa.ipc.new_file(file, batch.schema) as writer:
                writer.write_batch(batch)
            file.flush()
            os.fsync(file.fileno())
        known = {"rows": len(batch), "bytes": (part / name).stat().st_size, "sha256": file_hash(part / name)}
        # equal pairs are met again on the way to where a later start goes on
        chunks.append({"name": name, **known, "tally": asdict(replace(tally, equal=[]))})
        _write_manifest(part, {"facts": facts, "format": FORMAT, "complete": False, "chunks": chunks})
    if not tally.failed:
        _write_manifest(part, {"facts": facts, "format": FORMAT, "complete": True, "chunks": chunks, "tally": asdict(tally)})
        sync(part)
    return tally


def _sound_chunks(part: Path, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The whole chunks that an earlier, killed start has left; all else goes."""
    try:
        manifest = json.loads((part / MANIFEST).read_bytes())
        chunks = manifest["chunks"] if manifest["facts"] == facts and manifest["format"] == FORMAT else []
        count = next((i for i, chunk in enumerate(chunks) if _chunk_damage(part, chunk)), len(chunks))
        sound: list[dict[str, Any]] = chunks[:count]
    except (OSError, ValueError, KeyError, TypeError):
        sound = []
    names = {chunk["name"] for chunk in sound}
    for path in part.iterdir():
        if path.name not in names:
            path.unlink()
    return sound


def _open(place: Path, kind: Kind) -> Kept | str | None:
    """What is stored at `place`; a sentence when it is damaged, None when there is nothing."""
    if not place.exists():
        return None
    try:
        raw = (place / MANIFEST).read_bytes()
        manifest = json.loads(raw)
        if _canonical(manifest) != raw or not manifest["complete"] or key_of(manifest["facts"]) != place.name:
            return f"{MANIFEST} is not as it was written"
        for chunk in manifest["chunks"]:
            if reason := _chunk_damage(place, chunk):
                return reason
        blocks = [Block(pa.ipc.open_file(pa.memory_map(str(place / c["name"]))).get_batch(0), kind) for c in manifest["chunks"]]
        return Kept(blocks, Tally(**manifest["tally"]), place, made=False)
    except FileNotFoundError as error:
        return f"{Path(error.filename or MANIFEST).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read: {error}"


def _chunk_damage(folder: Path, chunk: dict[str, Any]) -> str | None:
    path = folder / chunk["name"]
    if path.stat().st_size != chunk["bytes"]:
        return f"{path.name} has {path.stat().st_size} bytes, expected {chunk['bytes']}"
    return None if file_hash(path) == chunk["sha256"] else f"{path.name} is not as it was written"


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    beside = folder / f"{MANIFEST}.tmp"
    with beside.open("wb") as file:
        file.write(_canonical(manifest))
        file.flush()
        os.fsync(file.fileno())
    beside.replace(folder / MANIFEST)


def _canonical(value: object) -> bytes:
    return (json.dumps(value, sort_keys=True, indent=1) + "\n").encode()
