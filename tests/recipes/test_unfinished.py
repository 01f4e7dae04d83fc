"""What is kept of a command that ended early."""

import json
from pathlib import Path

import pytest

from trueline.errors import UserError
from trueline.recipes.unfinished import Unfinished


def test_lines_come_back_by_number_and_end_in_order(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out.jsonl"
    with Unfinished(target, "a") as first:
        first.add(2, {"text": "\u2028 two\n"})
        first.add(0, "zero")
    assert [p.name for p in target.parent.iterdir()] == [".out.jsonl.a.unfinished"]
    with Unfinished(target, "b") as other:
        assert other.lines == {}
    with Unfinished(target, "a") as second:
        assert second.lines == {2: {"text": "\u2028 two\n"}, 0: "zero"}
        second.add(1, [1])
        second.finish()
    assert [json.loads(line) for line in target.read_text(encoding="utf-8").split("\n")[:-1]] == ["zero", [1], {"text": "\u2028 two\n"}]
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("torn", [b"[1, ", b'[1, "two"]', b"\x00\x00\n", b'[1, "tw\n[2, "three"]\n'])
def test_part_of_a_line_is_dropped(tmp_path: Path, torn: bytes) -> None:
    with Unfinished(tmp_path / "out", "a") as first:
        first.add(0, "zero")
    first.place.write_bytes(first.place.read_bytes() + torn)
    with Unfinished(tmp_path / "out", "a") as second:
        assert second.lines == {0: "zero"}
        second.add(1, "one")
    with Unfinished(tmp_path / "out", "a") as third:
        assert third.lines == {0: "zero", 1: "one"}


def test_nothing_is_left_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder; name a file"):
        Unfinished(tmp_path, "a")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        Unfinished(tmp_path / "file" / "out", "a")
    with Unfinished(tmp_path / "out", "a"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
