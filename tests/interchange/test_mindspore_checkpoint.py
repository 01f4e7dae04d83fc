"""`.ckpt` files: those MindSpore 2.10 itself wrote (fixtures/), our own, and broken ones."""

from pathlib import Path

import pytest
import torch

from trueline.errors import UserError
from trueline.interchange.mindspore_checkpoint import read_checkpoint, write_checkpoint

FIXTURES = Path(__file__).parent / "fixtures"  # written by MindSpore 2.10: see test_with_mindspore.py


def test_every_type_mindspore_writes() -> None:
    found = {name: (stored.dtype, stored.read()) for name, stored in read_checkpoint(FIXTURES / "types.ckpt").items()}
    assert found.pop("name")[0] is None  # a text
    wanted = {
        "a.f32": torch.arange(6.0).reshape(2, 3), "b.f16": torch.arange(4, dtype=torch.float16), "c.bf16": torch.arange(4).bfloat16(),
        "d.i64": torch.arange(4), "e.scalar": torch.tensor(3, dtype=torch.int32), "f.bool": torch.tensor([True, False]),
        "epoch_num": torch.tensor(3), "lr": torch.tensor(0.5), "flag": torch.tensor(True),
    }  # fmt: skip
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name][0] == tensor.dtype and torch.equal(found[name][1], tensor), name


def test_our_bytes_are_mindspores(tmp_path: Path) -> None:
    """What we write for the same tensors is what MindSpore wrote, byte for byte."""
    stored = read_checkpoint(FIXTURES / "types.ckpt")
    names = ["a.f32", "b.f16", "c.bf16", "d.i64", "e.scalar", "f.bool"]
    write_checkpoint(tmp_path / "ours.ckpt", ((name, stored[name].read()) for name in names))
    ours = (tmp_path / "ours.ckpt").read_bytes()
    assert (FIXTURES / "types.ckpt").read_bytes().startswith(ours) and len(ours) > 200


def test_crc_is_checked(tmp_path: Path) -> None:
    assert torch.equal(read_checkpoint(FIXTURES / "crc.ckpt")["a.f32"].read(), torch.arange(6.0).reshape(2, 3))
    data = bytearray((FIXTURES / "crc.ckpt").read_bytes())
    data[30] ^= 1
    (tmp_path / "bad.ckpt").write_bytes(data)
    with pytest.raises(UserError, match="CRC-32"):
        read_checkpoint(tmp_path / "bad.ckpt")


@pytest.mark.parametrize("piece", [1, 7, 16, 10**6])
def test_large_tensors_in_several_values(tmp_path: Path, piece: int) -> None:
    tensors = {"a": torch.randn(5, 3), "b": torch.randn(11).bfloat16(), "none": torch.empty(0, 4), "one": torch.tensor(2.5)}
    write_checkpoint(tmp_path / "x.ckpt", tensors.items(), piece)
    found = read_checkpoint(tmp_path / "x.ckpt")
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(found[name].read(), tensor) and found[name].read().dtype == tensor.dtype
    assert len(found["a"].spans) == -(-60 // piece)


def test_no_cut_of_a_file_is_read_in_silence(tmp_path: Path) -> None:
    """Every shorter file is refused, unless it ends just between two tensors."""
    whole = (FIXTURES / "types.ckpt").read_bytes()
    kept = set()
    for length in range(len(whole)):
        (tmp_path / "cut.ckpt").write_bytes(whole[:length])
        try:
            kept.add(len(read_checkpoint(tmp_path / "cut.ckpt")))
        except UserError as error:
            assert "\n" not in str(error)
    assert kept == set(range(1, 10))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "empty"),
        (b"PK\x03\x04 a zip file", "left|kind|field"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "announced"),
        (b"\x0a\x0a\x0a\x01a\x12\x05\x08\xff\xff\x7f\x1a", "announced|ends"),
        (b"\x0a\x15\x0a\x01a\x12\x10\x08\xff\xff\xff\x7f\x12\x07Float32\x1a\x00", "0 bytes for"),
        (b"\x0a\x02\x12\x00", "without a name"),
    ],
)
def test_hostile_files_are_one_sentence(tmp_path: Path, data: bytes, why: str) -> None:
    (tmp_path / "bad.ckpt").write_bytes(data)
    with pytest.raises(UserError, match=why) as caught:
        read_checkpoint(tmp_path / "bad.ckpt")
    assert "\n" not in str(caught.value)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="complex"):
        write_checkpoint(tmp_path / "x.ckpt", [("a", torch.ones(2)), ("b", torch.ones(2, dtype=torch.complex64))])
    assert not list(tmp_path.iterdir())
