"""Kinds of malformed record: each is told with its line, the column of what is wrong, the field and what to write instead."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from trueline.data.formats import load_file
from trueline.data.json_text import LONGEST_RECORD
from trueline.data.record import Problems

GOOD = '{"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]}'
U, A = '{"role": "user", "content": "问"}', '{"role": "assistant", "content": "答"}'


def chat(*turns: str, more: str = "") -> str:
    return f'{{"messages": [{", ".join(turns)}]{more}}}'


# what it is, the bad line, the text its column points at (or the column itself), and what is said
ROWS: list[tuple[str, str | bytes, str | int, str]] = [
    ("bad UTF-8", b'{"messages": "\xff"}', 15, "byte 0xFF is not UTF-8, expected UTF-8 text"),
    ("GBK", '{"a": "中"}'.encode("gbk"), 8, "is not UTF-8, expected UTF-8 text (GBK? iconv"),
    ("byte-order mark", b"\xef\xbb\xbf" + GOOD.encode(), 1, "byte-order mark, expected UTF-8 without one"),
    ("NUL", GOOD.replace("问", "a\x00b"), "\x00", "NUL byte, expected text"),
    ("NUL between values", '{"a": \x001}', 7, "NUL byte, expected text"),
    ("trailing comma in an object", GOOD[:-1] + ",}", ",}", "trailing comma, expected nothing between"),
    ("trailing comma in a list", GOOD.replace("}]", "},]"), ",]", "trailing comma, expected nothing between"),
    ("key twice", '{"messages": [], "messages": []}', 18, 'key "messages" a second time, expected each key once'),
    ("key twice inside", GOOD.replace('"user",', '"user", "role" : "x",'), '"role" :', 'key "role" a second time'),
    ("NaN", GOOD[:-1] + ', "score": NaN}', "NaN", "NaN, expected a number or null"),
    ("Infinity", GOOD[:-1] + ', "score": -Infinity}', "-Inf", "-Infinity, expected a number or null"),
    ("a huge number", GOOD[:-1] + f', "n": {"9" * 5000}}}', 1, "a number of thousands of digits, expected a shorter one"),
    ("a line break in a text", GOOD.replace("问", "a\tb"), "\t", "control character 0x09 inside a string"),
    ("single quotes", "{'messages': []}", "'mess", "single quotes, expected JSON's double quotes"),
    ("typographic quotes", "{“messages”: []}", "“mess", "typographic quotes (“), expected JSON's double quotes"),
    ("None", GOOD[:-1] + ', "tools": None}', "None", "None, expected JSON's null"),
    ("True", GOOD[:-1] + ', "label": True}', "True", "True, expected JSON's true"),
    ("False", GOOD[:-1] + ', "label": False}', "False", "False, expected JSON's false"),
    ("a comment", GOOD[:-1] + ", // note", "//", "a comment, expected none"),
    ("a key without quotes", "{messages: []}", "messages", "a key without quotes, expected it in double quotes"),
    ("cut off", GOOD[:-1], len(GOOD), "the record ends too early, expected its closing bracket"),
    ("cut off in a text", GOOD[: GOOD.index("问") + 1], '"问', 'a string that never ends, expected a closing "'),
    ("no comma", GOOD.replace('"user", ', '"user" '), '"content": "问', "not JSON: expecting ',' delimiter"),
    ("no colon", '{"messages" []}', "[]", "not JSON: expecting ':' delimiter"),
    ("a bad escape", GOOD.replace("问", "\\x"), "\\x", "not JSON: invalid"),
    ("half a character", GOOD.replace("问", "\\ud83d"), "\\ud83d", "half of a surrogate pair, expected a whole character"),
    ("two records", GOOD + GOOD, len(GOOD) + 1, "text after the object, expected one object a line"),
    ("comma behind", GOOD + ",", len(GOOD) + 1, "text after the object"),
    ("an empty line", "", 1, "empty line, expected an object on every line; delete the line"),
    ("a list", "[1]", 1, "record: a list, expected an object"),
    ("a text", '"x"', 1, "record: text, expected an object"),
    ("nested too deeply", "[" * 100_000, 1, "nested too deeply, expected a flat record"),
    ("no messages", '{"id": 1}', 1, "messages: missing, expected a list of messages"),
    ("messages null", '{"messages": null}', "null", "messages: null, expected a list of messages"),
    ("messages an object", '{"messages": {}}', "{}", "messages: an object, expected a list of messages"),
    ("no turns", chat(), "[]", "messages: no turns, expected at least one user turn"),
    ("a turn that is text", chat(U, '"答"'), '"答"', "messages[1]: text, expected an object with role and content"),
    ("no role", chat('{"content": "x"}', A), '{"content": "x"}', "messages[0].role: missing, expected system, user"),
    ("unknown role", chat(U, '{"role": "bot", "content": "x"}'), '"bot"', 'messages[1].role: "bot", expected system, user'),
    ("role in capitals", chat('{"role": "User", "content": "x"}', A), '"User"', 'messages[0].role: "User", expected'),
    ("role a number", chat('{"role": 1, "content": "x"}', A), '1, "content', "messages[0].role: a number, expected"),
    ("no content", chat(U, '{"role": "assistant"}'), '{"role": "assistant"}', "messages[1].content: missing, expected text"),
    ("content null", chat(U, '{"role": "assistant", "content": null}'), "null", "messages[1].content: null, expected text"),
    ("empty answer", chat(U, '{"role": "assistant", "content": ""}'), '""', "messages[1].content: empty, expected text"),
    ("blank question", chat('{"role": "user", "content": " "}', A), '" "', "messages[0].content: empty, expected text"),
    ("content a number", chat(U, '{"role": "assistant", "content": 4}'), "4}", "messages[1].content: a number, expected text"),
    ("an image", chat('{"role": "user", "content": [{"type": "image"}]}', A), '{"type"', "content[0]: block of type image, expected"),
    ("answer first", chat(A, U, A), A, "messages[0]: first turn must be the user's, found assistant"),
    ("two questions", chat(U, '{"role": "user", "content": "x"}', A), '{"role": "user", "content": "x"}', "two user turns in a row"),
    ("two answers", chat(U, A, '{"role": "assistant", "content": "x"}'), '{"role": "assistant", "content": "x"}', "two assistant turns"),
    ("no answer", chat(U, A, '{"role": "user", "content": "x"}'), '{"role": "user", "content": "x"}', "conversation ends with user"),
    ("system twice", chat(*['{"role": "system", "content": "s"}'] * 2, U, A), 51, "system message must be the first and only one"),
    ("system late", chat(U, '{"role": "system", "content": "s"}', A), '{"role": "system"', "system message must be the first"),
    ("observation first", chat('{"role": "tool", "content": "x"}', A), '{"role": "tool"', "first turn must be the user's, found obs"),
    ("tools no list", chat(U, A, more=', "tools": {}'), "{}}", "tools: an object, expected a list of tools"),
    ("a tool without a name", chat(U, A, more=', "tools": [{"function": {}}]'), '{"function"', "tools[0]: not a tool, expected"),
    ("a bad call", chat(U, '{"role": "assistant", "tool_calls": [{"id": 1}]}'), '{"id"', "tool_calls[0]: not a tool call, expected"),
    ("text and calls", chat(U, '{"role": "assistant", "content": "x", "tool_calls": [{}]}'), '"x"', "text beside tool_calls, expected one"),
    ("system a number", chat(U, A, more=', "system": 3'), "3}", "system: a number, expected text"),
    ("an answer marked bad", chat(U, A, more=', "label": false'), "false", "label: false, so an answer not to learn from"),
]


def read(path: Path) -> tuple[int, list[str]]:
    problems = Problems()
    values = load_file(str(path), "messages", problems, [])[2]
    return len(values), problems.lines


def test_there_are_forty() -> None:
    assert len({name for name, *_ in ROWS}) == len(ROWS) >= 40


@pytest.mark.parametrize(("line", "place", "sentence"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_a_bad_record_is_told_with_line_column_and_field(tmp_path: Path, line: str | bytes, place: str | int, sentence: str) -> None:
    raw = line.encode() if isinstance(line, str) else line
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join([GOOD.encode(), raw, GOOD.encode()]) + b"\n")
    column = place if isinstance(place, int) else str(line).index(place) + 1
    count, problems = read(path)
    assert count == 2, "the records around it are read"
    assert problems[0].startswith(f"{path}:2:{column}: ") and sentence in problems[0]
    assert len(problems) == 1 or all(problem.startswith(f"{path}:2:") for problem in problems)


@pytest.mark.parametrize("name", [row[0] for row in ROWS if row[0] not in ("byte-order mark", "an empty line")])
def test_the_records_behind_a_bad_one_in_an_array_are_read(tmp_path: Path, name: str) -> None:
    line = next(row[1] for row in ROWS if row[0] == name)
    raw = line.encode() if isinstance(line, str) else line
    path = tmp_path / "x.json"
    path.write_bytes(b"[\n" + b",\n".join([GOOD.encode(), raw, GOOD.encode()]) + b"\n]\n")
    count, problems = read(path)
    assert problems and problems[0].split(":")[1] in ("3", "4")
    decoding = name in ("bad UTF-8", "GBK")  # what follows such bytes cannot be told apart from them
    assert count >= (1 if decoding or name == "two records" else 2)


def test_a_line_without_an_end_is_refused_before_it_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(4):
            file.write(b'"' + b"a" * (LONGEST_RECORD - 1))
    count, problems = read(path)
    assert (count, problems) == (0, [f"{path}:1:1: a record longer than 16 MiB, expected shorter ones (are the line ends missing?)"])


def test_the_column_is_that_of_the_field_over_several_lines(tmp_path: Path) -> None:
    bad: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": 3}]}
    path = tmp_path / "x.json"
    path.write_text(json.dumps([json.loads(GOOD), bad], indent=2, ensure_ascii=False), encoding="utf-8")
    line = next(i for i, text in enumerate(path.read_text("utf-8").splitlines(), 1) if text.endswith('"content": 3'))
    assert read(path)[1] == [f"{path}:{line}:20: messages[1].content: a number, expected text"]
