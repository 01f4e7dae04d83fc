"""Corrected copies: every fix by itself, counted once; what has no one reading is set aside as it is; nothing half-written."""

import codecs
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from trueline.data.formats import load_conversations
from trueline.data.mend import fixed_value, mended
from trueline.data.repair import repair

GOOD = {"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]}
LINE = json.dumps(GOOD, ensure_ascii=False)

TEXTS: list[tuple[str, str, str]] = [
    ("trailing comma", LINE[:-1] + ",}", LINE),
    ("trailing comma", LINE + ",", LINE),
    ("NaN or Infinity", '{"prompt": "a", "response": "b", "n": [NaN, 1]}', '{"prompt": "a", "response": "b", "n": [null, 1]}'),
    ("Python constant", LINE[:-1] + ', "x": True}', LINE[:-1] + ', "x": true}'),
    ("control character in a text", '{"prompt": "a\tb", "response": "True, NaN,}"}', '{"prompt": "a\\tb", "response": "True, NaN,}"}'),
    ("key twice with one value", '{"prompt": "a", "prompt": "a", "response": "b"}', '{"prompt": "a", "response": "b"}'),
]
VALUES: list[tuple[str, Any, Any]] = [
    ("field name", {"Prompt": "a", " response": "b"}, {"prompt": "a", "response": "b"}),
    ("null field", {"prompt": "a", "response": "b", "tools": None}, {"prompt": "a", "response": "b"}),
    ("number instead of text", {"question": "a", "answer": 42}, {"question": "a", "answer": "42"}),
    ("blanks around a text", {"prompt": "a", "response": "\n  b \n"}, {"prompt": "a", "response": "  b"}),
    ("messages as text", {"messages": json.dumps(GOOD["messages"])}, GOOD),
    ("tools as text", GOOD | {"tools": '[{"name": "f"}]'}, GOOD | {"tools": [{"name": "f"}]}),
    ("empty system message", {"messages": [{"role": "system", "content": ""}, *GOOD["messages"]]}, GOOD),
    ("role name", {"messages": [{"role": "User", "content": "问"}, {"role": "bot", "content": "答"}]}, GOOD),
    ("record inside a text", json.dumps(GOOD), GOOD),
]


@pytest.mark.parametrize(("kind", "text", "expected"), TEXTS)
def test_texts(kind: str, text: str, expected: str) -> None:
    fixes: Counter[str] = Counter()
    assert mended(text, fixes) == [json.loads(expected)] and set(fixes) == {kind}


@pytest.mark.parametrize(
    "text", ['{"a": 1, "a": 2}', "{'a': 1}", '{"a": "x', '{"a" 1}', "nothing", '{"a": "\\ud800"}', '{"a": 1 "b": 2}', "{" * 9999]
)
def test_what_has_no_one_reading_is_left(text: str) -> None:
    fixes: Counter[str] = Counter()
    assert mended(text, fixes) == [] and not fixes


@pytest.mark.parametrize(("kind", "value", "expected"), VALUES)
def test_values(kind: str, value: Any, expected: Any) -> None:
    fixes: Counter[str] = Counter()
    assert fixed_value(value, fixes) == expected and set(fixes) == {kind}
    again: Counter[str] = Counter()
    assert fixed_value(expected, again) == expected and not again


def fix(path: Path, **folders: Path) -> tuple[Any, list[Any]]:
    before = path.read_bytes()
    done = repair(str(path), "auto", folders.get("out"), folders.get("quarantine"))
    assert path.read_bytes() == before
    out = folders.get("out")
    return done, [json.loads(line) for line in out.read_text("utf-8").splitlines()] if out and out.exists() else []


@pytest.mark.parametrize(
    ("name", "raw", "kind"),
    [
        ("x.jsonl", codecs.BOM_UTF8 + LINE.encode(), "byte-order mark"),
        ("x.jsonl", LINE.encode("utf-16"), "UTF-16 text"),
        ("x.jsonl", LINE.encode("gbk"), "GBK text"),
        ("x.jsonl", LINE.encode() + b"\r\n", "CRLF line end"),
        ("x.jsonl", b"\n" + LINE.encode(), "empty line"),
        ("x.jsonl", b"[" + LINE.encode() + b"]", "array instead of one record a line"),
        ("x.json", b"[\n" + json.dumps(GOOD, indent=1).encode()[:-1] + b",\n},]", "trailing comma"),
        ("x.csv", codecs.BOM_UTF8 + b"prompt,response\na,b\n", "byte-order mark"),
    ],
)
def test_files(tmp_path: Path, name: str, raw: bytes, kind: str) -> None:
    (tmp_path / name).write_bytes(raw)
    done, records = fix(tmp_path / name, out=tmp_path / "out" / "x.jsonl")
    assert records == [{"prompt": "a", "response": "b"} if name == "x.csv" else GOOD]
    assert set(+done.fixes) == {kind} and (done.copied, done.aside) == (1, 0)
    assert load_conversations([str(tmp_path / "out")])
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["x.jsonl"]


def test_several_records_on_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(LINE + " " + LINE + "\n" + LINE, encoding="utf-8")
    done, records = fix(tmp_path / "x.jsonl", out=tmp_path / "y.jsonl")
    assert records == [GOOD] * 3 and +done.fixes == {"several records on one line": 1}


def test_bad_records_are_set_aside_as_they_are(tmp_path: Path) -> None:
    bad = [b"{'a': 1}", b'{"messages": []}', b'{"messages": "\xff\xfe"}']
    lines = [LINE.encode(), bad[0], LINE.encode().replace(b'"user"', b'"User"'), bad[1], bad[2]]
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join(lines))
    out, aside = tmp_path / "out" / "x.jsonl", tmp_path / "aside" / "x.jsonl"
    done, records = fix(path, out=out)
    assert not out.exists() and not list((tmp_path / "out").iterdir())
    assert done.aside == 3 and [reason.split(": ")[0] for reason in done.reasons] == [f"{path}:{n}" for n in (2, 4, 5)]
    done, records = fix(path, out=out, quarantine=aside)
    assert records == [GOOD, GOOD] and aside.read_bytes() == b"\n".join(bad) + b"\n"
    assert aside.with_name("x.problems.txt").read_text().splitlines() == done.reasons
    assert {p.name for p in (tmp_path / "aside").iterdir()} == {"x.jsonl", "x.problems.txt"}
    only, _ = fix(path, quarantine=tmp_path / "only" / "x.jsonl")
    assert only.aside == 4 and not +only.fixes  # without corrections, User is no role
    unknown = tmp_path / "u.jsonl"
    unknown.write_text('{"x": 1}\n{"x": 2}\n' + LINE, encoding="utf-8")
    assert fix(unknown, out=out, quarantine=aside)[0].aside == 2


def test_published_flaws_are_set_aside(shared: Path, tmp_path: Path) -> None:
    path = shared / "data/medicalgpt/sharegpt_zh_1K_format.jsonl"
    done = repair(str(path), "auto", tmp_path / "x.jsonl", tmp_path / "aside.jsonl")
    assert (done.copied, done.aside, len(done.reasons)) == (992, 8, 24)
    assert len(load_conversations([str(tmp_path / "x.jsonl")])) == 992
