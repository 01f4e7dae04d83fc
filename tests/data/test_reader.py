"""Each kind of broken file gives its line: where, what, what was expected; what is fine is read with the line it starts on."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trueline.data.reader import Problems, read_records
from trueline.errors import UserError


def read(path: Path) -> tuple[list[tuple[int, dict]], list[str]]:
    problems = Problems()
    found = [(record.line, record.value) for record in read_records([str(path)], problems)]
    return found, [line.removeprefix(str(path)) for line in problems.listed()]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


GOOD = '{"a": "一"}'

# name, a line of a .jsonl, column (in characters), a part of the sentence
BROKEN_LINES = [
    ("bad utf-8", '{"a": "一'.encode() + b'\xe9"}', 9, "byte 0xE9 is not UTF-8, expected UTF-8"),
    ("gbk", '{"a": "一二"}'.encode("gbk"), 9, "is not UTF-8, expected UTF-8 text (GBK?"),
    ("byte-order mark", b"\xef\xbb\xbf" + GOOD.encode(), 1, "byte-order mark, expected UTF-8 without one"),
    ("utf-16", GOOD.encode("utf-16"), 1, "UTF-16 text, expected UTF-8"),
    ("nul in text", b'{"a": "x\0y"}', 9, "NUL byte, expected text"),
    ("nul at the start", b"\0\0\0\0", 1, "NUL byte, expected text"),
    ("trailing comma in object", '{"a": "x", }', 10, "trailing comma, expected nothing"),
    ("trailing comma in list", '{"a": [1, 2,]}', 12, "trailing comma, expected nothing"),
    ("key twice", '{"a": {"b": 1}, "b": "\\"a\\":", "a": 2}', 32, 'key "a" a second time'),
    ("nested key twice", '{"a": [{"b": 1, "b": 2}]}', 17, 'key "b" a second time'),
    ("NaN", '{"a": "NaN", "b": NaN}', 19, "NaN, expected a number or null"),
    ("infinity", '{"a": [-Infinity]}', 8, "-Infinity, expected a number or null"),
    ("huge number", '{"a": 1' + "0" * 5000 + "}", 1, "number of thousands of digits"),
    ("too deep", '{"a": ' + "[" * 200_000, 1, "nested too deeply"),
    ("line break in text", '{"a": "x\ty"}', 9, "control character 0x09 inside a string, expected it escaped"),
    ("single quotes", "{'a': 1}", 2, "single quotes, expected JSON's double quotes"),
    ("python's None", '{"a": None}', 7, "None, expected JSON's null"),
    ("python's True", '{"a": True}', 7, "True, expected JSON's true"),
    ("cut off", '{"a": "x"', 10, "ends too early, expected its closing bracket"),
    ("cut off in text", '{"a": "x', 7, "a string that never ends"),
    ("missing comma", '{"a": 1 "b": 2}', 9, "not JSON: expecting ',' delimiter"),
    ("missing colon", '{"a" 1}', 6, "not JSON: expecting ':' delimiter"),
    ("bad escape", '{"a": "\\x"}', 8, "not JSON: invalid"),
    ("half a surrogate pair", '{"a": "ok \\ud83d"}', 11, "half of a surrogate pair"),
    ("two objects", '{"a": 1} {"a": 2}', 10, "text after the object, expected one object a line"),
    ("comma behind", '{"a": 1},', 9, "text after the object"),
    ("text", "hello", 1, "not JSON: expecting value"),
]


@pytest.mark.parametrize(("line", "column", "sentence"), [row[1:] for row in BROKEN_LINES], ids=[row[0] for row in BROKEN_LINES])
def test_a_broken_line_is_named_and_the_others_are_read(tmp_path: Path, line: str | bytes, column: int, sentence: str) -> None:
    raw = line.encode() if isinstance(line, str) else line
    if raw.startswith(b"\xff\xfe"):  # a UTF-16 file has no lines that could be told apart
        found, problems = read(write(tmp_path, "x.jsonl", raw))
        assert problems == [f":1:1: {sentence}; save the file as UTF-8"] and not found
        assert read(write(tmp_path, "x.jsonl", "\n".join([GOOD, GOOD]).encode("utf-16"))) == (found, problems)
        return
    found, problems = read(write(tmp_path, "x.jsonl", GOOD.encode() + b"\n" + raw + b"\n" + GOOD.encode()))
    assert [line for line, _ in found] == [1, 3]
    assert len(problems) == 1
    assert problems[0].startswith(f":2:{column}: ") and sentence in problems[0]


@pytest.mark.parametrize(("line", "column", "sentence"), [row[1:] for row in BROKEN_LINES if row[0] not in ("utf-16", "byte-order mark")])
def test_the_same_in_an_array_with_the_place_in_the_file(tmp_path: Path, line: str | bytes, column: int, sentence: str) -> None:
    raw = line.encode() if isinstance(line, str) else line
    _, problems = read(write(tmp_path, "x.json", b"[\n" + GOOD.encode() + b",\n" + raw + b"\n]"))
    assert len(problems) == 1
    if sentence.startswith(("text after", "a string that never", "ends too early")):  # in an array these run on into the next line
        assert problems[0].startswith((":3:", ":4:"))
    else:
        assert problems[0].startswith(f":3:{column}: ") and sentence in problems[0]


@pytest.mark.parametrize(
    ("value", "found"), [("[1]", "a list"), ('"x"', "text"), ("3", "a number"), ("null", "null"), ("true", "true or false")]
)
def test_a_record_must_be_an_object(tmp_path: Path, value: str, found: str) -> None:
    sentence = f":2:1: record: {found}, expected an object"
    assert read(write(tmp_path, "x.jsonl", f"{GOOD}\n{value}\n")) == ([(1, {"a": "一"})], [sentence])
    assert read(write(tmp_path, "x.json", f"[{GOOD},\n{value}]")) == ([(1, {"a": "一"})], [sentence])


def test_blank_lines_are_fine_at_the_end_only(tmp_path: Path) -> None:
    found, problems = read(write(tmp_path, "x.jsonl", f"{GOOD}\n\n  \n{GOOD}\r\n\n\n"))
    assert [line for line, _ in found] == [1, 4]
    assert problems == [f":{n}:1: empty line, expected an object on every line; delete the line" for n in (2, 3)]


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    cases = {
        "missing.json": "no such file, expected",
        "folder.json": "a folder without data files",
        "empty.jsonl": "empty file, expected at least one record",
        "blank.json": "only white space, expected at least one record",
        "x.txt": "file name ends in .txt, expected .json, .jsonl, .csv",
        "x.jsonl.gz": "cannot be read (Not a gzipped file", "y.parquet.gz": "file name ends in .gz",
        "noise.parquet": "not a readable Parquet file",
        "array.jsonl": "an array, expected one object a line",
    }
    contents = {"empty.jsonl": "", "blank.json": " \n", "x.txt": GOOD, "x.jsonl.gz": GOOD, "y.parquet.gz": "x", "noise.parquet": "PAR1 no"}
    for name, content in contents.items():
        write(tmp_path, name, content)
    write(tmp_path, "array.jsonl", f"[\n{GOOD}\n]")
    problems = Problems()
    assert list(read_records([str(tmp_path / name) for name in cases], problems)) == []
    assert problems.count == len(cases)
    for (name, sentence), line in zip(cases.items(), problems.lines, strict=True):
        assert line.startswith(f"{tmp_path / name}:") and sentence in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file(tmp_path: Path) -> None:
    path = write(tmp_path, "x.json", "[]")
    path.chmod(0)
    assert "cannot be read (Permission denied)" in read(path)[1][0]


def test_a_path_that_cannot_be_one() -> None:
    problems = Problems()
    assert list(read_records(["a\0b.json", "x" * 300 + ".json"], problems)) == []
    assert problems.count == 2


@pytest.mark.parametrize(
    ("text", "place", "sentence"),
    [
        ("[" + GOOD + ",\n]", ":1:", "trailing comma, expected nothing between the last record and ]"),
        ("[" + GOOD + "\n", ":2:1", "the file ends inside the array, expected ]"),
        ("[" + GOOD + "\n" + GOOD + "]", ":2:1", "expected , or ] after a record"),
        ("[" + GOOD + "] x", ":1:14", "text after the array"),
        (GOOD + ",\n" + GOOD, ":1:", "comma between records"),
    ],
)
def test_broken_arrays(tmp_path: Path, text: str, place: str, sentence: str) -> None:
    _, problems = read(write(tmp_path, "x.json", text))
    assert len(problems) == 1 and problems[0].startswith(place) and sentence in problems[0]


def test_lines_in_a_json_file_go_on_after_a_broken_one(tmp_path: Path) -> None:
    found, problems = read(write(tmp_path, "x.json", f'{GOOD}\n{{"a": \n{GOOD}\n{{"a":\n 2}}\n'))
    assert [line for line, _ in found] == [1, 3, 4]
    assert len(problems) == 1 and problems[0].startswith(":4:1: ")  # the broken one took line 3 as its value


@given(
    st.lists(st.dictionaries(st.text(max_size=3), st.text() | st.integers() | st.lists(st.none() | st.booleans(), max_size=2)), min_size=1),
    st.integers(0, 2),
)
def test_every_layout_of_the_same_records_reads_alike(tmp_path_factory: pytest.TempPathFactory, records: list[dict], indent: int) -> None:
    folder = tmp_path_factory.mktemp("layouts")
    records = json.loads(json.dumps(records, ensure_ascii=True).encode("utf-8", "replace"))
    lines = "\r\n".join(json.dumps(record) for record in records)
    array = json.dumps(records, indent=indent or None)
    starts = [array.count("\n", 0, at) + 1 for at in _starts(array)]
    assert read(write(folder, "x.jsonl", lines)) == (list(enumerate(records, 1)), [])
    assert read(write(folder, "y.json", lines)) == (list(enumerate(records, 1)), [])
    assert read(write(folder, "z.json", array)) == (list(zip(starts, records, strict=True)), [])


def _starts(array: str) -> list[int]:
    """Where the top-level objects start, by counting brackets outside strings."""
    found, depth, quoted, escaped = [], 0, False, False
    for i, c in enumerate(array):
        if quoted:
            quoted, escaped = (escaped or c != '"'), (c == "\\" and not escaped)
            continue
        if c == "{" and depth == 1:
            found.append(i)
        depth += (c in "[{") - (c in "]}")
        quoted = c == '"'
    return found


def test_parquet_rows_without_their_nulls(tmp_path: Path) -> None:
    rows = [{"prompt": "一", "meta": {"a": 1, "b": None}}, {"prompt": None, "meta": {"a": None, "b": [2]}}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert read(tmp_path / "x.parquet") == ([(1, {"prompt": "一", "meta": {"a": 1}}), (2, {"meta": {"b": [2]}})], [])
    pq.write_table(pa.Table.from_pylist(rows).slice(0, 0), tmp_path / "y.parquet")
    assert read(tmp_path / "y.parquet") == ([], [": a table without rows, expected at least one record"])


def test_all_problems_of_all_files_in_one_error_and_a_bounded_list(tmp_path: Path) -> None:
    a, b = write(tmp_path, "a.jsonl", "x\n" * 40 + GOOD), write(tmp_path, "b.jsonl", "y\n" * 40)
    found = []
    with pytest.raises(UserError) as caught:
        found += read_records([str(a), str(b), str(tmp_path / "none.json")])
    assert str(caught.value).startswith("81 problems in the data; ")
    assert len(caught.value.problems) == 51 and caught.value.problems[-1] == "... and 31 more"
    assert caught.value.problems[40].startswith(f"{b}:1:1: ")
