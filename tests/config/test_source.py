"""Text to values by YAML 1.2's rules, and back to the same values."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trueline.config.source import Written, from_python, merge, read_file, read_override, write

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(values=st.dictionaries(TEXT, VALUES, min_size=1, max_size=4))
def test_written_values_read_back_the_same(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("yaml") / "c.yaml"
    path.write_text(write(values), encoding="utf-8")
    problems: list[str] = []
    again = read_file(path, problems).plain()
    assert again == values and not problems
    assert repr(again) == repr(values)  # 1 and 1.0 and True are equal to Python


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5), ("1E5", 1e5), (".5", 0.5), ("5.", 5.0), ("-.inf", float("-inf")), ("007", 7), ("+3", 3),
        ("no", "no"), ("on", "on"), ("yes", "yes"), ("2024-01-01", "2024-01-01"), ("1:30", "1:30"), ("0x10", "0x10"), ("1_000", "1_000"),
        ("true", True), ("~", None), ("", None), ("'1'", "1"), ("中文", "中文"), ("a b", "a b"), ("a.py:score", "a.py:score"),
        ("[1, 2e1, x]", [1, 20.0, "x"]), ("{a: 1}", {"a": 1}), ("a=b", "a=b"),
    ],
)  # fmt: skip
def test_scalars(text: str, value: Any) -> None:
    problems: list[str] = []
    read = read_override(f"x.y={text}", problems).plain()
    assert read == {"x": {"y": value}} and type(read["x"]["y"]) is type(value) and not problems


def test_positions_are_those_of_keys_and_items(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("a:\n  b: 1\n  c: [x,\n    y]\n", encoding="utf-8")
    tree = read_file(path, [])
    assert tree.value["a"].origin == f"{path}:1:1"
    assert tree.value["a"].value["b"].origin == f"{path}:2:3"
    assert [item.origin for item in tree.value["a"].value["c"].value] == [f"{path}:3:7", f"{path}:4:5"]


def test_merging_keeps_the_place_of_what_won() -> None:
    base, later = from_python({"a": {"b": 1, "c": [1, 2]}}, "first"), from_python({"a": {"c": [3]}, "d": 4}, "second")
    merged = merge(base, later)
    assert merged.plain() == {"a": {"b": 1, "c": [3]}, "d": 4}
    assert merged.value["a"].value["b"].origin == "first" and merged.value["a"].value["c"].origin == "second"
    assert merge(Written(1, "x"), Written({}, "y")).origin == "y"
    assert base.plain() == {"a": {"b": 1, "c": [1, 2]}}  # nothing is changed in place


def test_shared_lists_are_written_out(tmp_path: Path) -> None:
    shared = [1]
    assert "&" not in write({"a": shared, "b": shared})
