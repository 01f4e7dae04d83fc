"""MindRecord files: those MindSpore 2.10 itself wrote (fixtures/), our own, and broken ones."""

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest

from tests.interchange.mindspore_side import records
from trueline.data.mindrecord import read_mindrecord, write_mindrecord
from trueline.errors import UserError

FIXTURES = Path(__file__).parents[1] / "interchange" / "fixtures"


def unpacked(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).write_bytes(gzip.decompress((FIXTURES / f"{name}.gz").read_bytes()))
    return folder / names[0]


def test_every_column_type_mindspore_writes(tmp_path: Path) -> None:
    found = sorted(read_mindrecord(unpacked(tmp_path, "all.mindrecord")), key=lambda row: row["number"])
    check(found)


def test_four_shards(tmp_path: Path) -> None:
    first = unpacked(tmp_path, *(f"four.mindrecord{i}" for i in range(4)))
    for path in (first, tmp_path / "four.mindrecord", tmp_path / "four.mindrecord2"):
        check(sorted(read_mindrecord(path), key=lambda row: row["number"]))
    (tmp_path / "four.mindrecord3").unlink()
    with pytest.raises(UserError, match=r"four\.mindrecord3"):
        list(read_mindrecord(first))


def check(found: list[dict[str, object]]) -> None:
    assert len(found) == 15
    for row, wanted in zip(found, records(), strict=True):
        assert row.keys() == wanted.keys()
        for name, value in wanted.items():
            assert np.array_equal(row[name], value) and getattr(row[name], "dtype", "") == getattr(value, "dtype", ""), name  # type: ignore[arg-type]


def test_pages_shapes_and_single_columns(tmp_path: Path) -> None:
    rows = list(read_mindrecord(unpacked(tmp_path, "pages.mindrecord")))
    assert len(rows) == 40 and [int(row["ids"][0]) for row in rows] == [1000 * i for i in range(40)]
    assert all(np.array_equal(row["box"], np.full((2, 150), i)) for i, row in enumerate(rows))
    assert [row["ids"].tolist() for row in read_mindrecord(unpacked(tmp_path, "one.mindrecord"))] == [[0], [0, 1], [0, 1, 2]]
    plain = list(read_mindrecord(unpacked(tmp_path, "plain.mindrecord")))
    assert plain == [{"number": i, "text": f"行{i}"} for i in range(3)]


@pytest.mark.parametrize("shards", [1, 3])
def test_there_and_back(tmp_path: Path, shards: int) -> None:
    draws = np.random.default_rng(0)
    columns = {"wide": "int64", "narrow": "int32", "single": "float32", "double": "float64", "count": "number"}
    rows = [
        {
            "wide": draws.integers(-(2**63), 2**63, draws.integers(1, 50)) >> draws.integers(0, 63), "narrow": draws.integers(-300, 300, 7),
            "single": draws.normal(size=3).astype(np.float32), "double": draws.normal(size=2),
            "count": int(draws.integers(-(2**63), 2**63)),
        }
        for _ in range(20)
    ]  # fmt: skip
    assert write_mindrecord(tmp_path / "x.mindrecord", columns, rows, shards) == 20
    found = list(read_mindrecord(tmp_path / "x.mindrecord"))
    order = [i for shard in range(shards) for i in range(shard, 20, shards)]
    for i, row in zip(order, found, strict=True):
        assert row["count"] == rows[i]["count"] and isinstance(row["count"], int)
        assert all(np.array_equal(row[name], rows[i][name]) and row[name].dtype == columns[name] for name in columns if name != "count")
    assert len(list(tmp_path.iterdir())) == 2 * shards


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    for values in ([], [[1, 2]]):
        with pytest.raises(UserError, match="record 2: ids has shape"):
            write_mindrecord(tmp_path / "x.mindrecord", {"ids": "int64"}, [{"ids": [1]}, {"ids": np.array(values, np.int64)}])
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_one_sentence(tmp_path: Path) -> None:
    """Any single byte changed in header or rows: other values, or one sentence, never another kind of error."""
    path = unpacked(tmp_path, "all.mindrecord")
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    places = [*range(8), *range(8, 8 + length, 11), *range(1 << 14, (1 << 14) + 900, 2), *range((1 << 14) + (1 << 15), len(data))]
    refused = 0
    for place in places:
        for value in (0xFF, 0x00):
            path.write_bytes(data[:place] + bytes([value]) + data[place + 1 :])
            try:
                for _ in read_mindrecord(path):
                    continue
            except UserError as error:
                refused += 1
                assert "\n" not in str(error)
    assert refused > 300
    for cut in (0, 5, 100, 1 << 14, (1 << 14) + (1 << 15) + 10):
        path.write_bytes(data[:cut])
        with pytest.raises(UserError):
            list(read_mindrecord(path))


def test_a_header_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = unpacked(tmp_path / "in", "one.mindrecord")
    unpacked(tmp_path, "plain.mindrecord")
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length]) | {"shard_addresses": ["one.mindrecord", "../plain.mindrecord"]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + len(text) :])
    with pytest.raises(UserError, match="one of 2 shards, of which plain.mindrecord is not beside it"):
        list(read_mindrecord(path))
