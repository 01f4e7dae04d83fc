"""Every schema as it is published, every field taken away in turn, and every problem in one error."""

import gzip
import json
import re
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trueline.config.schema import Format
from trueline.data.conversation import Conversation, Message, Preference
from trueline.data.formats import SCHEMAS, load_conversations, load_file, load_preferences, load_prompts
from trueline.data.reader import Problems
from trueline.errors import UserError

USER, ANSWER, WORSE = Message("user", "问"), Message("assistant", "好"), Message("assistant", "坏")
SYSTEM = Message("system", "规则")
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}}]


def chat(*messages: Message) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in messages]


def sharegpt(*messages: Message) -> list[dict[str, str]]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[m.role], "value": m.content} for m in messages]


# schema, record, the turns before the answer; the answer is always 好, and 坏 the worse one where there is one
RECORDS: list[tuple[str, dict[str, Any], tuple[Message, ...]]] = [
    ("cvalues", {"prompt": "问", "pos_resp": "好", "neg_resp": "坏", "pos_type": "拒绝", "neg_type": "风险"}, (USER,)),
    ("preference", {"instruction": "问", "input": "", "chosen": "好", "rejected": "坏"}, (USER,)),
    ("preference", {"prompt": "问", "chosen": "好", "rejected": "坏"}, (USER,)),
    ("preference", {"system": "规则", "question": "问", "chosen": "好", "rejected": "坏"}, (SYSTEM, USER)),
    (
        "preference",
        {"conversations": sharegpt(SYSTEM, USER), "chosen": sharegpt(ANSWER)[0], "rejected": sharegpt(WORSE)[0]},
        (SYSTEM, USER),
    ),
    ("preference", {"conversations": sharegpt(USER), "chosen": "好", "rejected": "坏"}, (USER,)),
    ("preference", {"messages": chat(USER), "chosen": chat(ANSWER)[0], "rejected": chat(WORSE)[0]}, (USER,)),
    ("preference", {"prompt": chat(SYSTEM, USER), "chosen": chat(ANSWER), "rejected": chat(WORSE)}, (SYSTEM, USER)),
    ("preference", {"prompt": "问", "chosen": chat(USER, ANSWER), "rejected": chat(USER, WORSE)}, (USER,)),
    ("preference", {"chosen": chat(USER, ANSWER), "rejected": chat(USER, WORSE)}, (USER,)),
    ("preference", {"chosen": "\n\nHuman: 问\n\nAssistant: 好", "rejected": "\n\nHuman: 问\n\nAssistant: 坏"}, (USER,)),
    ("ranked", {"instruction": "问", "input": "", "output": ["好", "坏"], "history": []}, (USER,)),
    ("alpaca", {"instruction": "问", "input": "", "output": "好"}, (USER,)),
    ("alpaca", {"instruction": "译", "input": "文", "output": "好"}, (Message("user", "译\n文"),)),
    (
        "alpaca",
        {"instruction": "问", "output": "好", "system": "规则", "history": [["一", "二"]]},
        (SYSTEM, Message("user", "一"), Message("assistant", "二"), USER),
    ),
    ("sharegpt", {"conversations": sharegpt(SYSTEM, USER, ANSWER)}, (SYSTEM, USER)),
    ("sharegpt", {"conversations": chat(USER, ANSWER), "system": "规则"}, (SYSTEM, USER)),
    ("messages", {"messages": chat(USER, Message("assistant", "二"), USER, ANSWER)}, (USER, Message("assistant", "二"), USER)),
    ("messages", {"messages": json.dumps(chat(USER, ANSWER))}, (USER,)),
    ("columns", {"prompt": "问", "response": "好", "history": [["一", "二"]]}, (Message("user", "一"), Message("assistant", "二"), USER)),
    ("columns", {"prompt": "问", "completion": "好"}, (USER,)),
    ("columns", {"question": "问", "answer": "好"}, (USER,)),
    ("columns", {"content": "问", "summary": "好"}, (USER,)),
    ("columns", {"query": "问", "response": "好"}, (USER,)),
]
IDS = [f"{schema}-{'+'.join(record)}-{i}" for i, (schema, record, _) in enumerate(RECORDS)]
PAIRED = ("cvalues", "preference", "ranked")
OPTIONAL = {"input", "history", "system", "pos_type", "neg_type"}


def write(folder: Path, *records: Any, name: str = "x.jsonl") -> str:
    path = folder / name
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(("schema", "record", "turns"), RECORDS, ids=IDS)
@pytest.mark.parametrize("named", [False, True])
def test_every_schema_for_every_use(tmp_path: Path, schema: str, record: dict[str, Any], turns: tuple[Message, ...], named: bool) -> None:
    path = write(tmp_path, record)
    format = schema if named else "auto"
    (conversation,) = load_conversations([path], format)
    assert conversation.value == Conversation((*turns, ANSWER)) and conversation.where == f"{path}:1"
    (prompt,) = load_prompts([path], format)
    assert prompt.value.conversation == Conversation(turns) and prompt.value.record == record
    assert load_file(path, format, Problems(), [])[:2] == (schema, "pair" if schema in PAIRED else "answer")
    if schema in PAIRED:
        (preference,) = load_preferences([path], format)
        assert preference.value == Preference(Conversation(turns), ANSWER, WORSE) and preference.where == f"{path}:1"
    else:
        with pytest.raises(UserError, match=f"schema {schema} .*, expected two answers to each prompt"):
            load_preferences([path], format)


@pytest.mark.parametrize(("schema", "record", "turns"), RECORDS, ids=IDS)
def test_parquet_reads_like_json(tmp_path: Path, schema: str, record: dict[str, Any], turns: tuple[Message, ...]) -> None:
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "x.parquet")
    assert load_conversations([str(tmp_path / "x.parquet")])[0].value == Conversation((*turns, ANSWER))


MISSING = [(schema, record, name) for schema, record, _ in RECORDS for name in record]


@pytest.mark.parametrize(("schema", "record", "name"), MISSING, ids=[f"{s}-{'+'.join(r)}-without-{n}" for s, r, n in MISSING])
@pytest.mark.parametrize("value", [None, "", 7, "absent"])
def test_each_field_missing_empty_or_of_the_wrong_type(tmp_path: Path, schema: str, record: dict[str, Any], name: str, value: Any) -> None:
    """A sound record, then the broken one: one problem at the field, unless the field may be absent."""
    broken = {key: item for key, item in record.items() if key != name} | ({} if value == "absent" else {name: value})
    path = write(tmp_path, record, broken)
    if (
        name in ("pos_type", "neg_type")
        or (name in OPTIONAL and value in (None, "absent"))
        or (name in ("input", "system") and value == "")
    ):
        assert len(load_conversations([path])) == 2
        return
    if name == "prompt" and schema == "preference" and isinstance(record["chosen"], list) and len(record["chosen"]) > 1:
        assert len(load_conversations([path])) == 2  # the answers bring their prompt along
        return
    with pytest.raises(UserError) as caught:
        load_conversations([path])
    expected = {None: "null", 7: "a number", "absent": "missing", "": "empty"}[value]
    problems = [re.sub(re.escape(path) + r":2:\d+: ", "", problem) for problem in caught.value.problems]
    assert all(not problem.startswith(path) for problem in problems)
    first = problems[0].split(": ")
    others = {
        "completion": "completion or response",
        "response": "completion or response",
        "query": "prompt or query",
        "prompt": "prompt or query",
    }
    prompts = ("instruction", "question", "conversations", "messages") if schema == "preference" else ()
    assert first[0] in (name, others.get(name), "prompt" if name in prompts else name) and "expected" in problems[0]
    assert expected in first[1] or (value == "" and first[1].startswith("text, expected a list"))


def test_fields_of_a_schema_that_is_named_must_be_there(tmp_path: Path) -> None:
    path = write(tmp_path, {"instruction": "问", "output": "好"})
    expected = {
        "cvalues": ["prompt", "pos_resp", "neg_resp"],
        "preference": ["chosen", "rejected"],
        "sharegpt": ["conversations"],
        "messages": ["messages"],
        "ranked": ["output"],
        "columns": ["prompt or query", "completion or response"],
    }
    for schema, fields in expected.items():
        with pytest.raises(UserError) as caught:
            load_conversations([path], schema)
        assert [re.sub(r"^:1:\d+: ", "", problem.removeprefix(path)).split(": ")[0] for problem in caught.value.problems] == fields
    with pytest.raises(UserError, match="data.format csv: no such schema, expected auto or one of cvalues, preference"):
        load_conversations([path], "csv")


def test_the_configuration_knows_the_same_schemas() -> None:
    assert get_args(Format) == ("auto", *SCHEMAS)


@pytest.mark.parametrize(
    ("record", "problems"),
    [
        ({"messages": []}, ["messages: no turns, expected at least one user turn"]),
        ({"messages": chat(ANSWER)}, ["messages[0]: first turn must be the user's, found assistant"]),
        ({"messages": chat(USER, USER, ANSWER)}, ["messages[1]: two user turns in a row, expected the assistant's answer between them"]),
        ({"messages": chat(USER, SYSTEM, ANSWER)}, ["messages[1]: system message must be the first and only one"]),
        ({"messages": chat(USER)}, ["messages[0]: conversation ends with user, expected the assistant's answer at the end"]),
        ({"messages": chat(SYSTEM)}, ["messages[0]: no turns, expected at least one user turn"]),
        (
            {"messages": [{"role": "boss", "content": "x"}, {"role": "assistant"}]},
            ['messages[0].role: "boss", expected system, user, assistant or observation', "messages[1].content: missing, expected text"],
        ),
        ({"conversations": sharegpt(USER, ANSWER), "tools": "[{}]"}, ["tools[0]: not a tool, expected"]),
        ({"conversations": sharegpt(USER, ANSWER), "system": 3}, ["system: a number, expected text"]),
        ({"instruction": "问", "output": "好", "history": "x"}, ["history: text, expected a list of [user, assistant] pairs"]),
        (
            {"instruction": "问", "output": "好", "history": [["一"], "二"]},
            ["history[0]: a list of 1, expected [user, assistant]", "history[1]: text, expected"],
        ),
        (
            {"instruction": "问", "output": "好", "history": [["一", ""], [2, "三"]]},
            ["history[0][1]: empty, expected text", "history[1][0]: a number, expected"],
        ),
        ({"instruction": "", "input": "文", "output": "好"}, ["instruction: empty, expected text"]),
        ({"instruction": "问", "output": ["好", " ", 3]}, ["output[1]: empty, expected text", "output[2]: a number, expected text"]),
        ({"instruction": "问", "output": []}, ["output: 0 answers, expected at least 1, best first"]),
        ({"prompt": " ", "pos_resp": "", "neg_resp": None}, ["prompt: empty", "pos_resp: empty", "neg_resp: null, expected text"]),
        ({"chosen": "好", "rejected": "坏"}, ["prompt: missing, expected text or messages"]),
        ({"chosen": chat(USER, ANSWER), "rejected": chat(SYSTEM, USER, WORSE)}, ["rejected: other turns before its answer than chosen"]),
        ({"prompt": "问", "chosen": chat(USER), "rejected": chat(WORSE)}, ["chosen[0]: role user, expected the assistant's answer"]),
        ({"prompt": "问", "chosen": [], "rejected": chat(WORSE)}, ["chosen: empty, expected the assistant's answer"]),
        ({"prompt": chat(USER, ANSWER), "chosen": "好", "rejected": "坏"}, ["answer: two assistant turns in a row"]),
        ({"prompt": "问"}, ["schema prompt (prompt), expected conversations with the assistant's answers"]),
        (
            {"text": "x", "id": 1},
            ["record: fields text, id, plain text has no questions and answers to learn from; expected those of a known schema: "],
        ),
        ({}, ["record: fields none, expected"]),
    ],
)
def test_bad_records(tmp_path: Path, record: dict[str, Any], problems: list[str]) -> None:
    path = write(tmp_path, record)
    with pytest.raises(UserError) as caught:
        load_conversations([path])
    assert len(caught.value.problems) == len(problems)
    for found, expected in zip(caught.value.problems, problems, strict=True):
        assert re.sub(r"^(:1:\d+)?: ", "", found.removeprefix(path)).startswith(expected)


def test_one_error_for_all_problems_of_all_files(tmp_path: Path) -> None:
    good = {"instruction": "问", "output": "好"}
    first = write(tmp_path, good, {"instruction": "问"}, good, {"output": 3}, name="a.jsonl")
    second = write(tmp_path, {"messages": []}, "text", name="b.jsonl")
    with pytest.raises(UserError) as caught:
        load_conversations([first, str(tmp_path / "none.json"), second])
    places = [problem.split(": ")[0] for problem in caught.value.problems]
    assert places == [
        *(f"{first}:{place}" for place in ("2:1", "4:1", "4:12")),
        str(tmp_path / "none.json"),
        *(f"{second}:{place}" for place in ("1:14", "2:1")),
    ]
    assert str(caught.value).startswith("6 problems in the data; correct the records named here:\n") and caught.value.exit_code == 2


def test_unknown_records_before_the_first_known_one_are_counted(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_conversations([write(tmp_path, {"x": 1}, {"y": 2}, {"question": "问", "answer": "好"})])
    (problem,) = caught.value.problems
    assert "x.jsonl:1:1: record: fields x (1 more such records follow), expected" in problem


def test_empty_data_sets(tmp_path: Path) -> None:
    for content, name in (("[]", "x.json"), ("", "x.jsonl"), ("\n\n", "y.jsonl")):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match="no records in|empty file"):
            load_conversations([str(tmp_path / name)])
    with pytest.raises(UserError, match="no records in an empty list of files"):
        load_prompts([])


def test_ranked_answers_make_pairs(tmp_path: Path) -> None:
    path = write(tmp_path, {"instruction": "问", "output": ["甲", "乙", "乙 ", "丙"]}, {"instruction": "问", "output": ["丁", "戊"]})
    notes: list[str] = []
    pairs = [(p.value.chosen.content, p.value.rejected.content.strip()) for p in load_preferences([path], notes=notes)]
    assert pairs == [("甲", "乙"), ("甲", "乙"), ("甲", "丙"), ("乙", "丙"), ("乙 ", "丙"), ("丁", "戊")]
    assert notes == [f"1 pair left out, both answers are equal: {path}:1"]
    assert len(load_preferences([path], ranked="best")) == 4
    assert load_conversations([path])[0].value.messages[-1].content == "甲"
    with pytest.raises(UserError, match="output: 1 answers, expected at least 2, best first"):
        load_preferences([write(tmp_path, {"instruction": "问", "output": ["好"]})])


def test_pairs_of_equal_answers_are_left_out_and_counted(tmp_path: Path) -> None:
    equal, fine = {"prompt": "问", "chosen": "好", "rejected": "好\n"}, {"prompt": "问", "chosen": "好", "rejected": "坏"}
    path, notes = write(tmp_path, equal, fine, equal, equal, equal), []
    assert [pair.where for pair in load_preferences([path], notes=notes)] == [f"{path}:2"]
    assert notes == [f"4 pairs left out, both answers are equal: {path}:1, {path}:3, {path}:4 and 1 more"]
    with pytest.raises(UserError, match="no pairs in .*: in every record both answers are equal"):
        load_preferences([write(tmp_path, equal)])


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        ({"prompt": "问"}, (USER,)),
        ({"prompt": chat(SYSTEM, USER)}, (SYSTEM, USER)),
        ({"prompt": "问", "system": "规则", "ground_truth": "1"}, (SYSTEM, USER)),
        ({"messages": chat(USER)}, (USER,)),
        ({"messages": chat(USER, ANSWER, USER)}, (USER, ANSWER, USER)),
        ({"conversations": sharegpt(USER, ANSWER, USER, ANSWER)}, (USER, ANSWER, USER)),
        ({"instruction": "问"}, (USER,)),
        ({"question": "问"}, (USER,)),
    ],
)
def test_prompts(tmp_path: Path, record: dict[str, Any], turns: tuple[Message, ...]) -> None:
    (prompt,) = load_prompts([write(tmp_path, record)])
    assert prompt.value.conversation.messages == turns and prompt.value.record == record


def test_a_call_at_the_end_is_part_of_the_answer(tmp_path: Path) -> None:
    call = {"from": "function_call", "value": json.dumps([{"name": "f", "arguments": {}}] * 2)}
    path = write(tmp_path, {"conversations": [*sharegpt(USER), call], "tools": json.dumps(TOOLS)})
    assert load_conversations([path])[0].value == Conversation((USER, *(Message("assistant", "{}", "f"),) * 2), tuple(TOOLS))
    assert load_prompts([path])[0].value.conversation == Conversation((USER,), tuple(TOOLS))


# the real files

REAL = {  # schema, values, problems
    "advertisegen/dev.json": ("columns", 1070, 0),
    "advertisegen/dev_conversations.json": ("sharegpt", 1070, 0),
    "advertisegen/train_first5000.json": ("columns", 5000, 0),
    "ape210k/test.ape.json": ("columns", 5000, 0),
    "ape210k/valid.ape.json": ("columns", 5000, 0),
    "cmath/cmath_dev.jsonl": ("columns", 600, 0),
    "cmath/distractor.jsonl": ("columns", 360, 0),
    "comparison_gpt4_zh/comparison_gpt4_data_zh.json": ("preference", 2383, 0),
    "cvalues/cvalues_comparison_published_example.jsonl": ("cvalues", 1, 0),
    "cvalues/cvalues_responsibility_prompts.jsonl": ("prompt", 664, 0),
    "glm4_messages/examples.jsonl": ("messages", 2, 0),
    "gsm8k/test.jsonl": ("columns", 1319, 0),
    "gsm8k/train.jsonl": ("columns", 7473, 0),
    "hh_rlhf/harmless-base_test.jsonl.gz": ("preference", 2299, 17),
    "llamafactory_demos/alpaca_en_demo.json": ("alpaca", 999, 0),
    "llamafactory_demos/alpaca_zh_demo.json": ("alpaca", 1000, 0),
    "llamafactory_demos/c4_demo.jsonl": ("unknown", 0, 1),
    "llamafactory_demos/dpo_en_demo.json": ("preference", 300, 0),
    "llamafactory_demos/dpo_zh_demo.json": ("preference", 300, 0),
    "llamafactory_demos/glaive_toolcall_en_demo.json": ("sharegpt", 300, 0),
    "llamafactory_demos/glaive_toolcall_zh_demo.json": ("sharegpt", 300, 0),
    "llamafactory_demos/kto_en_demo.json": ("messages", 150, 150),
    "llamafactory_demos/reason_tool_use_demo_50.jsonl": ("messages", 50, 0),
    "llamafactory_demos/wiki_demo.txt": ("unknown", 0, 1),
    "medicalgpt/dpo_zh_500.jsonl": ("preference", 500, 0),
    "medicalgpt/sharegpt_zh_1K_format.jsonl": ("sharegpt", 992, 24),
    "oasst_zh/oaast_rm_zh.json": ("ranked", 1803, 0),
    "oasst_zh/oaast_sft_zh.json": ("alpaca", 689, 0),
    "rlvr/general_ifeval_train_deal.jsonl": ("messages", 463, 0),
    "rlvr/math_benchmarks.jsonl": ("messages", 560, 0),
    "rlvr/math_deepmath_deal.jsonl": ("messages", 4994, 0),
    "tinystories/tinystories_sample.txt": ("unknown", 0, 1),
    "toolalpaca/eval_real.json": ("unknown", 0, 1),
    "toolalpaca/eval_simulated.json": ("unknown", 0, 1),
}
REFUSED = {
    "llamafactory_demos/c4_demo.jsonl": ":1:1: record: fields text (299 more such records follow), plain text has no questions and answers",
    "llamafactory_demos/kto_en_demo.json": "label: false, so an answer not to learn from, expected only good ones; leave the record out",
    "llamafactory_demos/wiki_demo.txt": "plain text has no questions and answers to learn from",
    "tinystories/tinystories_sample.txt": "plain text has no questions and answers to learn from",
    "toolalpaca/eval_real.json": "ToolAlpaca's tests hold instructions and expected calls, no conversations",
    "toolalpaca/eval_simulated.json": "ToolAlpaca's tests hold instructions and expected calls, no conversations",
    "hh_rlhf/harmless-base_test.jsonl.gz": ":87:12: chosen[3].content: empty, expected text",
}
EQUAL = {"comparison_gpt4_zh/comparison_gpt4_data_zh.json": 20, "oasst_zh/oaast_rm_zh.json": 6}


@pytest.mark.parametrize("name", REAL)
def test_published_files_load_as_they_are_or_are_refused(shared: Path, name: str) -> None:
    problems, equal = Problems(), []
    found, _, values = load_file(str(shared / "data" / name), "auto", problems, equal)
    assert (found, len(values), problems.count) == REAL[name]
    assert len(equal) == EQUAL.get(name, 0)
    assert REFUSED.get(name, "") in "".join(problems.lines[:1])


def test_no_published_file_is_forgotten(shared: Path) -> None:
    folders = [folder for folder in (shared / "data").iterdir() if folder.is_dir() and folder.name != "tokenizers"]
    assert {f"{file.parent.name}/{file.name}" for folder in folders for file in folder.iterdir()} == set(REAL)


def test_published_tool_calls(shared: Path) -> None:
    conversations = load_conversations([str(shared / "data/llamafactory_demos/glaive_toolcall_zh_demo.json")])
    calls = [m for c in conversations for m in c.value.messages if m.tool]
    assert len(calls) > 200 and all(isinstance(json.loads(call.content), dict) for call in calls)
    assert all(set(tool) == {"type", "function"} for c in conversations for tool in c.value.tools)
    tools = load_conversations([str(shared / "data/glm4_messages/examples.jsonl")])[1].value
    assert [(m.role, m.tool) for m in tools.messages] == [
        ("user", None),
        ("assistant", "get_recommended_books"),
        ("observation", None),
        ("assistant", None),
    ]
    assert tools.messages[1].content == '{"interests": ["history", "science fiction"]}' and len(tools.tools) == 1


def test_published_flaws_are_named(shared: Path) -> None:
    """17 empty values and conversations that end with the user."""
    with pytest.raises(UserError) as caught:
        load_conversations([str(shared / "data/medicalgpt/sharegpt_zh_1K_format.jsonl")])
    assert caught.value.problems[0].endswith("sharegpt_zh_1K_format.jsonl:59:1176: conversations[2].value: empty, expected text")
    assert sum("empty, expected text" in problem for problem in caught.value.problems) == 17
    assert sum("conversation ends with user" in problem for problem in caught.value.problems) == 7


def test_published_transcripts(shared: Path, tmp_path: Path) -> None:
    path = tmp_path / "hh.jsonl"
    path.write_bytes(gzip.decompress((shared / "data/hh_rlhf/harmless-base_test.jsonl.gz").read_bytes()))
    problems = Problems()
    schema, use, values = load_file(str(path), "auto", problems, [])
    assert (schema, use) == ("preference", "pair") and len(values) > 2200
    assert sum("other turns before its answer than chosen" in line for line in problems.lines) == 5
