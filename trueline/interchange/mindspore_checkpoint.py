"""MindSpore's `.ckpt` files, in and out, without MindSpore. One rule: tensors stay in the file until they are asked for, one by one.

A file is a run of `Value{tag = 1, tensor = 2 {dims = 1, tensor_type = 2, tensor_content = 3}}`, each in field 1 of the file (MindSpore's
checkpoint.proto). A large tensor is several values in a row with one tag and the same dims. A file may end in a CRC-32.
"""

import math
import mmap
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from trueline.errors import UserError
from trueline.interchange.protobuf import BrokenMessage, Span, read_fields, read_integers, signed, write_header, write_integer

TYPES = {
    "Float32": torch.float32, "Float16": torch.float16, "BFloat16": torch.bfloat16, "Float64": torch.float64, "Bool": torch.bool,
    "Int8": torch.int8, "UInt8": torch.uint8, "Int16": torch.int16, "Int32": torch.int32, "Int64": torch.int64,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in TYPES.items()}
PIECE_BYTES = 512 * 2**20  # of one value, as MindSpore splits; a protocol-buffer message has to stay below 2 GiB
CRC_MARK = b"crc_num"
CRC_BYTES = len(CRC_MARK) + 10


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: what it is, and where its bytes lie. `dtype` is None for a text and other kinds without numbers."""

    name: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    spans: tuple[Span, ...]
    data: mmap.mmap

    def read(self) -> Tensor:
        """A copy of the tensor."""
        out = torch.empty(sum(end - start for start, end in self.spans), dtype=torch.uint8)
        filled = 0
        for start, end in self.spans:
            if end > start:
                out[filled : filled + end - start] = torch.frombuffer(self.data, dtype=torch.uint8, count=end - start, offset=start)
            filled += end - start
        return out.view(self.dtype or torch.uint8).reshape(self.shape)


def read_checkpoint(path: Path) -> dict[str, Stored]:
    """The tensors of a file by name, in its order; a file that is damaged, encrypted or something else is a UserError."""
    try:
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise BrokenMessage("it is empty")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return _stored(data, _without_crc(data))
    except OSError as problem:
        raise UserError(f"{path}: cannot be read ({problem.strerror or problem})") from None
    except BrokenMessage as problem:
        what = "not a whole MindSpore checkpoint"
        raise UserError(f"{path}: {what} ({problem}); copy it again (encrypted ones cannot be read)") from None


def _without_crc(data: mmap.mmap) -> int:
    """Where the values end, after checking what follows them."""
    end = len(data)
    if end < CRC_BYTES or data[end - CRC_BYTES : end - 10] != CRC_MARK:
        return end
    found = 0
    for start in range(0, end - CRC_BYTES, 2**24):
        found = zlib.crc32(data[start : min(start + 2**24, end - CRC_BYTES)], found)
    if found != int.from_bytes(data[end - 10 : end], "big"):
        raise BrokenMessage("its CRC-32 does not fit its bytes")
    return end - CRC_BYTES


def _stored(data: mmap.mmap, end: int) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    last = None
    for number, value in read_fields(data, (0, end)):
        if number != 1 or isinstance(value, int):
            raise BrokenMessage(f"field {number} where only values belong")
        piece = _piece(data, value)
        if piece.name in found:
            first = found[piece.name]
            if last != piece.name or (first.dtype, first.shape) != (piece.dtype, piece.shape):
                raise BrokenMessage(f"{piece.name} is there twice")
            piece = Stored(piece.name, piece.dtype, piece.shape, first.spans + piece.spans, data)
        found[piece.name] = piece
        last = piece.name
    for tensor in found.values():
        there = sum(end - start for start, end in tensor.spans)
        if tensor.dtype is not None and there != math.prod(tensor.shape) * tensor.dtype.itemsize:
            raise BrokenMessage(f"{tensor.name}: {there:,} bytes for {list(tensor.shape)} of {NAMES[tensor.dtype]}")
    return found


def _piece(data: mmap.mmap, span: Span) -> Stored:
    name, kind = "", ""
    shape: list[int] = []
    content: Span = (0, 0)
    for number, value in read_fields(data, span):
        if number == 1 and not isinstance(value, int):
            name = _text(data, value)
        elif number == 2 and not isinstance(value, int):
            for inner, part in read_fields(data, value):
                if inner == 1:
                    shape += [signed(size) for size in read_integers(data, part)]
                elif inner == 2 and not isinstance(part, int):
                    kind = _text(data, part)
                elif inner == 3 and not isinstance(part, int):
                    content = part
    if not name:
        raise BrokenMessage(f"byte {span[0]}: a value without a name")
    if any(size < 0 for size in shape):
        raise BrokenMessage(f"{name}: dimensions {shape}")
    dtype = TYPES.get(kind)
    return Stored(name, dtype, tuple(shape) if dtype else (content[1] - content[0],), (content,), data)


def _text(data: mmap.mmap, span: Span) -> str:
    if span[1] - span[0] > 4096:
        raise BrokenMessage(f"byte {span[0]}: a name of {span[1] - span[0]:,} bytes")
    try:
        return data[span[0] : span[1]].decode("utf-8")
    except UnicodeDecodeError:
        raise BrokenMessage(f"byte {span[0]}: a name that is not UTF-8") from None


def write_tensor(file: BinaryIO, name: str, tensor: Tensor, piece_bytes: int = PIECE_BYTES) -> None:
    """Appends one tensor to an open file, in values of at most `piece_bytes`."""
    if tensor.dtype not in NAMES:
        raise UserError(f"{name}: {tensor.dtype}, which a MindSpore checkpoint cannot hold; expected one of {', '.join(TYPES)}")
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    kind = NAMES[tensor.dtype].encode()
    head = b"".join(write_integer(1, size) for size in tensor.shape) + write_header(2, len(kind)) + kind
    label = write_header(1, len(name.encode())) + name.encode()
    for piece in raw.split(piece_bytes) if len(raw) else [raw]:
        before = head + write_header(3, len(piece))
        inner = label + write_header(2, len(before) + len(piece)) + before
        file.write(write_header(1, len(inner) + len(piece)) + inner)
        file.write(piece.numpy().data)


def write_checkpoint(path: Path, tensors: Iterable[tuple[str, Tensor]], piece_bytes: int = PIECE_BYTES) -> None:
    """A whole file; it has its name only when it is complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            for name, tensor in tensors:
                write_tensor(file, name, tensor, piece_bytes)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
