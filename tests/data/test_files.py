"""Folders, patterns and packed files mean the same records as the plain file."""

import gzip
import json
from pathlib import Path

from trueline.data.files import find_files, suffix
from trueline.data.formats import iter_conversations, load_conversations
from trueline.data.record import Problems

RECORD = {"prompt": "q", "response": "a"}


def test_folders_and_patterns_are_sorted(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.json", "sub/c.csv.gz", ".hidden/d.jsonl", "notes.txt", "e.parquet.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    expected = [str(tmp_path / name) for name in ("a.json", "b.jsonl", "sub/c.csv.gz")]
    assert find_files([str(tmp_path)]) == [expected]
    assert find_files([str(tmp_path / "*.json*"), str(tmp_path / "none*"), "x"]) == [expected[:2], [str(tmp_path / "none*")], ["x"]]
    (tmp_path / "odd[1].jsonl").write_text("x")
    assert find_files([str(tmp_path / "odd[1].jsonl")]) == [[str(tmp_path / "odd[1].jsonl")]]


def test_suffixes() -> None:
    assert [suffix(name) for name in ("a.JSONL", "a.jsonl.gz", "a.ape.json", "a.gz", "a.parquet.gz", "a")] == [
        ".jsonl",
        ".jsonl",
        ".json",
        "",
        "",
        "",
    ]


def test_every_way_to_name_a_file_reads_alike(tmp_path: Path) -> None:
    lines = "".join(json.dumps(RECORD | {"prompt": f"q{i}"}) + "\n" for i in range(5))
    (tmp_path / "x.jsonl").write_text(lines)
    plain = [located.value for located in load_conversations([str(tmp_path / "x.jsonl")])]
    for name, text in {
        "a/x.jsonl.gz": lines,
        "b/x.json.gz": "[" + ",".join(lines.splitlines()) + "]",
        "c/x.csv": "prompt,response\n" + "".join(f"q{i},a\n" for i in range(5)),
        "d/x.tsv.gz": "prompt\tresponse\n" + "".join(f'"q{i}"\ta\n' for i in range(5)),
    }.items():
        path = tmp_path / name
        path.parent.mkdir()
        path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
        for given in (path, path.parent, path.parent / "x*"):
            assert [located.value for located in load_conversations([str(given)])] == plain


def test_a_packed_file_that_is_cut_off(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(json.dumps(RECORD | {"id": str(i) * 50}).encode() + b"\n" for i in range(2000)), mtime=0)
    (tmp_path / "x.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    problems = Problems()
    list(iter_conversations([str(tmp_path)], problems=problems))
    assert any("cannot be read (Compressed file ended before" in line for line in problems.lines)


def test_csv_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('prompt,response,note\n"a, ""b""\nc",d,\n\ne,f\n"g",,n\nh,i,"j\n', encoding="utf-8")
    problems = Problems()
    found = list(iter_conversations([str(path)], problems=problems))
    assert [(v.line, v.value.messages[0].content) for v in found] == [(2, 'a, "b"\nc')]
    assert problems.lines == [
        f"{path}:5:3: 2 cells, expected 3 as in the first row (is a text with ',' unquoted?)",
        f"{path}:6:1: completion or response: missing, expected text",
        f"{path}:7:1: not a row of a table: unexpected end of data; expected texts with quotes or line breaks in double quotes",
    ]
    for text, sentence in (("a,a\n1,2\n", 'column "a" a second time'), ("a,\n1,2\n", "a column without a name"), ("a,b\n", "without rows")):
        path.write_text(text)
        problems = Problems()
        assert not list(iter_conversations([str(path)], problems=problems)) and sentence in problems.lines[0]


def test_the_column_of_a_cell(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('instruction,history,output\n"a,b",x,y\n', encoding="utf-8")
    problems = Problems()
    list(iter_conversations([str(path)], problems=problems))
    assert problems.lines == [f"{path}:2:7: history: text, expected a list of [user, assistant] pairs"]
