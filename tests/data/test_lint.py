"""What is counted is what a second, plain count gives."""

import random
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trueline.data.conversation import Conversation, Message, Preference
from trueline.data.lint import CONTROL, Findings, Lengths, find_repeats, script


@given(st.lists(st.integers(0, 50), min_size=1), st.sampled_from([0.0, 0.5, 0.95, 1.0]))
def test_quantiles_are_numpys(values: list[int], share: float) -> None:
    lengths = Lengths()
    for value in values:
        lengths.add(value)
    assert lengths.quantile(share) == np.percentile(values, share * 100, method="higher")
    assert lengths.total() == sum(values)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("The answer is clear", "Latin"),
        ("答案是四，没有别的可能。", "Han"),
        ("これはペンですか、それとも", "kana"),
        ("Это простой ответ", "Cyrillic"),
        ("안녕하세요 반갑습니다", "Hangul"),
        ("12 + 30 = 42", ""),
        ("ok", ""),
        ("混合 with words 一半一半", ""),
    ],
)
def test_scripts(text: str, name: str) -> None:
    assert script(text) == name


def test_control_tokens() -> None:
    for text in ("<|im_end|>", "a [gMASK]", "<sop>", "</s>", "[INST]", "<<SYS>>", "<end_of_turn>"):
        assert CONTROL.search(text)
    for text in ("<b>", "a | b", "[1]", "List<String>", "<|", "x < s > y"):
        assert not CONTROL.search(text)


def chat(question: str, answer: str) -> Conversation:
    return Conversation((Message("user", question), Message("assistant", answer)))


def test_repeats_are_those_of_a_plain_count() -> None:
    draw = random.Random(0)
    texts = {name: [(str(draw.randrange(30)), str(draw.randrange(3))) for _ in range(40)] for name in ("a", "b")}
    found = []
    for name, rows in texts.items():
        findings = Findings(name)
        for line, (question, answer) in enumerate(rows, 1):
            findings.add(chat(question, answer), line)
        found.append(findings)
    seen: dict[str, tuple[str, int]] = {}
    counts: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, str], tuple[str, str]] = {}
    for name, rows in texts.items():
        for line, (question, _) in enumerate(rows, 1):
            if question in seen:
                counts[seen[question][0], name] += 1
                first.setdefault((seen[question][0], name), (":".join(map(str, seen[question])), f"{name}:{line}"))
            seen.setdefault(question, (name, line))
    repeats = find_repeats(found, "prompts")
    assert {(r.first_file, r.file): r.count for r in repeats} == counts
    assert {(r.first_file, r.file): r.places for r in repeats} == first
    assert sum(r.count for r in find_repeats(found, "records")) == 80 - len({row for rows in texts.values() for row in rows})


def test_markup_is_told_apart_from_control_tokens_and_found_in_tools() -> None:
    findings = Findings("f", re.compile(re.escape("<|im_end|>")), re.compile("<tool_call>|<think>"))
    findings.add(chat("<think> of <|im_end|>", "fine"), 1)
    findings.add(Conversation(chat("q", "a").messages, ({"type": "function", "function": {"name": "<|im_end|>"}},)), 2)
    assert {name: places.first for name, places in findings.warnings.items() if name != "short"} == {
        "control": ["f:1 <|im_end|>", "f:2 <|im_end|>"],
        "markup": ["f:1 <think>"],
    }
    assert findings.with_tools == 1


def test_warnings() -> None:
    findings = Findings("f")
    findings.add(chat("What is the answer?", "这个问题的答案是四十二。"), 1)
    findings.add(chat("What is the answer?", "..."), 2)
    findings.add(chat("What is <|im_end|>?", "A control token it is"), 3)
    prompt = Conversation((Message("user", "q"),))
    findings.add(Preference(prompt, Message("assistant", "longer answer"), Message("assistant", "short")), 4)
    assert {name: places.first for name, places in findings.warnings.items()} == {
        "script": ["f:1 (Latin and Han)"],
        "short": ["f:2"],
        "control": ["f:3 <|im_end|>"],
    }
    assert (findings.longer_chosen, findings.longer_rejected) == (1, 0)
