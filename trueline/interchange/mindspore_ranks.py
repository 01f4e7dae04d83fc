"""Checkpoints in pieces: `rank_N` folders, how a tensor lies over their ranks, and MindSpore's strategy files.

One rule: every piece is used, and pieces that should be equal are compared byte for byte.
"""

import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor

from trueline.errors import UserError
from trueline.interchange.mindspore_checkpoint import Stored, read_checkpoint, write_tensor
from trueline.interchange.mindspore_names import weight_of
from trueline.interchange.protobuf import BrokenMessage, Span, read_fields, read_integers, signed

RANK = re.compile(r"rank_(\d+)")
NUMBERED = re.compile(r"(.+)-(\d+)_(\d+)\.ckpt")
"""`NAME-epoch_step.ckpt`, as MindSpore numbers what it saves."""
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Into how many parts each dimension is cut, and which part of each the ranks hold, in their order."""

    parts: Shape
    places: tuple[Shape, ...]


def even_layout(dims: int, axis: int | None, parts: int, tensor: int, data: int) -> Layout:
    """Ranks counted model-parallel first: rank r holds part `r % tensor` of `axis`, the same for each of `data` copies.

    With fewer parts than `tensor` ranks (a key/value projection of few heads), neighbours hold the same part.
    """
    cut = tuple(parts if dim == axis else 1 for dim in range(dims))
    places = [tuple((rank % tensor) * parts // tensor if dim == axis else 0 for dim in range(dims)) for rank in range(tensor * data)]
    return Layout(cut, tuple(places))


def find_layout(name: str, whole: Shape, piece: Shape, ranks: int, tensor: int, wanted: int | None) -> Layout:
    """The layout that makes `piece` of `whole`: at most one dimension cut, the `wanted` one, in a number of parts that divides `tensor`.

    An optimizer that is sharded too cuts other dimensions, or further; its order cannot be told from shapes.
    """
    cut = [dim for dim, (full, part) in enumerate(zip(whole, piece, strict=False)) if full != part]
    fits = len(whole) == len(piece) and all(part and full % part == 0 for full, part in zip(whole, piece, strict=True))
    axis = cut[0] if cut else None
    parts = whole[axis] // piece[axis] if fits and axis is not None else 1
    if not fits or len(cut) > 1 or tensor % parts or ranks % tensor or (cut and wanted != axis):
        raise UserError(
            f"{name}: pieces {list(piece)} of {list(whole)} on {ranks} ranks, {tensor} of them for one copy, cannot be laid together; "
            "check --model, or give the strategy files with --strategy"
        )
    return even_layout(len(whole), axis, parts, tensor, ranks // tensor)


def rank_files(folder: Path, pattern: str = "*.ckpt") -> list[Path]:
    """The checkpoint of each `rank_N`, from rank 0 without a gap: the only one whose name fits `pattern`.

    Of several that MindSpore numbered, all of one name, the newest that every rank has; any others are refused.
    """
    found = {int(match[1]): path for path in folder.iterdir() if path.is_dir() and (match := RANK.fullmatch(path.name))}
    if sorted(found) != list(range(len(found))) or not found:
        there = ", ".join(f"rank_{rank}" for rank in sorted(found)[:8]) or "none"
        raise UserError(f"{folder}: folders {there}, expected rank_0, rank_1, ... without a gap")
    inside = [sorted(path for path in found[rank].glob("*.ckpt") if fnmatch(path.name, pattern)) for rank in range(len(found))]
    if all(len(files) == 1 for files in inside):
        return [files[0] for files in inside]
    rank, files = max(enumerate(inside), key=lambda item: (not item[1], len(item[1])))
    names = ", ".join(path.name for path in files[:6]) or f"none that fits {pattern}"
    numbered = [{_moment(path): path for path in files if NUMBERED.fullmatch(path.name)} for files in inside]
    titles = {path.name.rpartition("-")[0].replace(f"rank_{rank}", "rank_N") for rank, files in enumerate(inside) for path in files}
    shared = set.intersection(*({*known} for known in numbered))
    if len(titles) != 1 or not shared or any(len(known) != len(files) for known, files in zip(numbered, inside, strict=True)):
        raise UserError(
            f"{found[rank]}: {len(files)} .ckpt files ({names}), expected one, or NAME-epoch_step.ckpt of one NAME with an epoch and "
            "step that every rank has; choose with --checkpoint 'PATTERN', for example --checkpoint '*-2_500.ckpt'"
        )
    return [known[max(shared)] for known in numbered]


def _moment(path: Path) -> tuple[int, ...]:
    """Epoch and step of a numbered file."""
    return tuple(map(int, path.stem.rpartition("-")[2].split("_")))


@dataclass(frozen=True)
class Pieces:
    """All ranks' files, opened; each tensor is laid together when it is asked for."""

    where: Path
    files: list[Path]
    ranks: list[dict[str, Stored]]
    layouts: dict[str, Layout]
    """From strategy files; empty without them."""

    @staticmethod
    def open(path: Path, strategy: Path | None, pattern: str = "*.ckpt") -> "Pieces":
        files = [path] if path.is_file() else rank_files(path, pattern)
        return Pieces(path, files, [read_checkpoint(file) for file in files], read_strategies(strategy) if strategy else {})

    def first(self) -> dict[str, Stored]:
        """Every tensor's piece on the first rank that has it, by name."""
        return {name: stored for rank in reversed(self.ranks) for name, stored in rank.items()}

    def whole(self, name: str, piece: Shape) -> Shape:
        """The shape of the tensor of a piece that is not cut, or as the strategy says."""
        return tuple(size * part for size, part in zip(piece, self.layouts[name].parts, strict=True)) if name in self.layouts else piece

    def tensor_parallel(self, shapes: dict[str, Shape]) -> int:
        """The most parts that any tensor is cut into."""
        counts = [1]
        for name, whole in shapes.items():
            piece = next((rank[name].shape for rank in self.ranks if name in rank), whole)
            counts.append(max(math.prod(whole), 1) // max(math.prod(piece), 1))
        return max(counts)

    def read(self, name: str, whole: Shape, tensor: int, axis: int | None, weight: bool = True) -> Tensor:
        """The whole tensor. With pipeline stages only some ranks hold it; these are numbered among themselves."""
        where = f"{self.where}: {name}"
        held = [rank[name] for rank in self.ranks if name in rank]
        first = held[0]
        if any((piece.dtype, piece.shape) != (first.dtype, first.shape) for piece in held):
            raise UserError(f"{where} has other sizes or another type on some ranks")
        if weight and (first.dtype is None or not first.dtype.is_floating_point):
            raise UserError(f"{where} is not floating point; quantised weights are not supported")
        if len(self.ranks) == 1:
            if first.shape != whole:
                raise UserError(f"{where} is {list(first.shape)}, expected {list(whole)}; is it one rank's part, or another model's?")
            return first.read()
        layout = self.layouts.get(name) or self.layouts.get(weight_of(name))
        layout = layout or find_layout(where, whole, first.shape, len(held), min(tensor, len(held)), axis)
        if tuple(full // part for full, part in zip(whole, layout.parts, strict=False)) != first.shape or len(layout.places) != len(held):
            raise UserError(f"{where} is {list(first.shape)} on {len(held)} ranks; for {list(whole)} the strategy says otherwise")
        out = torch.empty(whole, dtype=first.dtype)
        seen: set[Shape] = set()
        for rank, (piece, place) in enumerate(zip(held, layout.places, strict=True)):
            target, found = out[_slices(first.shape, place)], piece.read()
            if place in seen and not torch.equal(_raw(target), _raw(found)):
                hint = "the folders are of different runs, or the layout is another one (--strategy)"
                raise UserError(f"{where} differs on rank {rank} from its copy on another rank: {hint}")
            target.copy_(found)
            seen.add(place)
        if len(seen) != math.prod(layout.parts):
            raise UserError(f"{where}: {len(seen)} of {math.prod(layout.parts)} parts are there")
        return out


def write_ranks(folder: Path, tensors: Iterable[tuple[str, Tensor, Layout]], ranks: int) -> None:
    """`rank_N/checkpoint_N.ckpt` for every rank; the folder has its name only when all are complete."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        with ExitStack() as stack:
            places = [temporary / f"rank_{rank}" / f"checkpoint_{rank}.ckpt" for rank in range(ranks)]
            for place in places:
                place.parent.mkdir()
            files = [stack.enter_context(place.open("wb")) for place in places]
            for name, tensor, layout in tensors:
                size = tuple(full // part for full, part in zip(tensor.shape, layout.parts, strict=True))
                for file, part in zip(files, layout.places, strict=True):
                    write_tensor(file, name, tensor[_slices(size, part)])
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        if folder.exists():
            folder.rmdir()
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _slices(size: Shape, place: Shape) -> tuple[slice, ...]:
    return tuple(slice(part * length, (part + 1) * length) for length, part in zip(size, place, strict=True))


def _raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def read_strategies(path: Path) -> dict[str, Layout]:
    """Layouts by parameter from a `strategy_N.ckpt` or a folder of them (one of each pipeline stage; equal ones may repeat)."""
    files = sorted(path.rglob("*.ckpt")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path}: no strategy file (.ckpt) there")
    found: dict[str, Layout] = {}
    for file in files:
        try:
            found |= dict(_strategy(file.read_bytes()))
        except OSError as problem:
            raise UserError(f"{file}: cannot be read ({problem.strerror or problem})") from None
        except (BrokenMessage, UnicodeDecodeError, ValueError) as problem:
            raise UserError(f"{file}: not a MindSpore strategy file ({problem})") from None
    return found


def _strategy(data: bytes) -> Iterator[tuple[str, Layout]]:
    """MindSpore's node_strategy.proto: field 3 of the file is an item with the parameter's name (1) and its layouts (2)."""
    for number, item in read_fields(data, (0, len(data))):
        if number != 3 or isinstance(item, int):
            continue
        fields = dict(read_fields(data, item))
        name, layouts = fields.get(1), fields.get(2)
        if not isinstance(name, int | None) and not isinstance(layouts, int | None):
            yield data[name[0] : name[1]].decode("utf-8"), _layout(data, layouts)


def _layout(data: bytes, span: Span) -> Layout:
    """Devices in a grid; each dimension is cut along the grid's axis it names, counted from the last, or not at all (-1)."""
    lists: dict[int, list[list[int]]] = {1: [], 2: []}
    numbers: dict[int, int] = {}
    for number, value in read_fields(data, span):
        if number in lists and not isinstance(value, int):
            inner = [read_integers(data, part) for at, part in read_fields(data, value) if at == 1]
            lists[number].append([signed(size) for sizes in inner for size in sizes])
        elif isinstance(value, int):
            numbers[number] = signed(value)
    if len(lists[1]) != 1 or len(lists[2]) != 1:
        raise BrokenMessage("a parameter cut along several axes of the grid at once, which is not supported")
    grid, axes = lists[1][0], lists[2][0]
    shards, step = max(numbers.get(7, 0), 1), max(numbers.get(6, 0), 1)  # the optimizer's, a further cut of the first dimension
    if not grid or min(grid) < 1 or math.prod(grid) > 65536 or any(not -1 <= axis < len(grid) for axis in axes):
        raise BrokenMessage(f"devices {grid} and axes {axes} do not fit")
    strides = [math.prod(grid[i + 1 :]) for i in range(len(grid))]
    parts = [1 if axis < 0 else grid[-1 - axis] for axis in axes]
    places = []
    for rank in range(math.prod(grid)):
        place = [0 if axis < 0 else rank // strides[-1 - axis] % grid[-1 - axis] for axis in axes]
        if place and shards > 1:
            place[0] = place[0] * shards + rank // step % shards
        places.append(tuple(place))
    if parts and shards > 1:
        parts[0] *= shards
    return Layout(tuple(parts), tuple(places))
