"""Protocol-buffer messages, read where they lie and written by hand. One rule: no length is believed beyond the end of its message."""

import mmap
from collections.abc import Iterator

Span = tuple[int, int]
"""Where bytes begin and end in their buffer."""
_FIXED = {1: 8, 5: 4}


class BrokenMessage(Exception):
    """Bytes that are no message; the text says what is wrong, without the file's name."""


def read_fields(data: bytes | mmap.mmap, span: Span) -> Iterator[tuple[int, int | Span]]:
    """`(number, value)` of each field between the ends of `span`: an integer, or the span of bytes, text, or an inner message."""
    position, end = span
    while position < end:
        key, position = _varint(data, position, end)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, position = _varint(data, position, end)
            yield number, value
        elif wire == 2 or wire in _FIXED:
            length, position = _varint(data, position, end) if wire == 2 else (_FIXED[wire], position)
            if length > end - position:
                raise BrokenMessage(f"byte {position}: {length:,} bytes are announced, but {end - position:,} are left")
            yield number, (position, position + length)
            position += length
        else:
            raise BrokenMessage(f"byte {position}: a field of unknown kind {wire}")


def read_integers(data: bytes | mmap.mmap, value: int | Span) -> list[int]:
    """A repeated integer's next values: one, or several packed together."""
    if isinstance(value, int):
        return [value]
    found, position = [], value[0]
    while position < value[1]:
        number, position = _varint(data, position, value[1])
        found.append(number)
    return found


def signed(value: int) -> int:
    """An integer of 64 bits with its sign."""
    return value - (1 << 64) if value >> 63 else value


def write_integer(number: int, value: int) -> bytes:
    """An integer field."""
    return _bytes(number << 3) + _bytes(value)


def write_header(number: int, length: int) -> bytes:
    """What stands before the `length` bytes of a field of bytes, text or an inner message."""
    return _bytes(number << 3 | 2) + _bytes(length)


def _varint(data: bytes | mmap.mmap, position: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position == end:
            raise BrokenMessage(f"byte {position}: ends inside a number")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, position
    raise BrokenMessage(f"byte {position}: a number of more than 64 bits")


def _bytes(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
