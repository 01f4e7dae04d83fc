"""Protocol buffers by hand, against the encodings their documentation gives."""

import pytest

from trueline.interchange.protobuf import BrokenMessage, read_fields, read_integers, signed, write_header, write_integer


def test_documented_examples() -> None:
    assert write_integer(1, 150) == b"\x08\x96\x01"
    assert write_header(2, 7) + b"testing" == b"\x12\x07testing"
    assert list(read_fields(b"\x08\x96\x01\x12\x07testing", (0, 12))) == [(1, 150), (2, (5, 12))]
    assert read_integers(b"\x03\x8e\x02\x9e\xa7\x05", (0, 6)) == [3, 270, 86942]
    assert signed((1 << 64) - 1) == -1 and signed(5) == 5


@pytest.mark.parametrize(
    "data",
    [b"\x08", b"\x08\x96", b"\x12\x7fabc", b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x0b", b"\x08" + b"\xff" * 11, b"\x0d\x00"],
)
def test_hostile_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(BrokenMessage):
        list(read_fields(data, (0, len(data))))
