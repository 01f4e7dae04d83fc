"""BLEU, ROUGE and win rates, against arithmetic by hand."""

import doctest
import math
from collections import Counter
from pathlib import Path

import jieba
import pytest
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

from trueline.data.cache import TokenPrompt
from trueline.data.conversation import Conversation, Prompt
from trueline.errors import UserError
from trueline.recipes import measures
from trueline.recipes.measures import matches, open_text_measure, references, win_rate, word_cutter

TEXTS = [
    ("这件上衣的版型很显瘦，颜色也好看", "这件上衣的颜色很好看，版型显瘦"),
    ("the cat sat on the mat today", "the cat is on the mat"),
    ("红色的裙子", "蓝色的裤子很长"),
    ("完全不同", "wholly other words"),
]


def grams(text: str, n: int) -> Counter[str]:
    return Counter(text[i : i + n] for i in range(len(text) - n + 1))


def rouge_n(answer: str, reference: str, n: int) -> float:
    shared = sum((grams(answer, n) & grams(reference, n)).values())
    return 200 * shared / (max(len(answer) - n + 1, 0) + max(len(reference) - n + 1, 0)) if shared else 0.0


def rouge_l(answer: str, reference: str) -> float:
    table = [[0] * (len(reference) + 1) for _ in range(len(answer) + 1)]
    for i, a in enumerate(answer):
        for j, r in enumerate(reference):
            table[i + 1][j + 1] = table[i][j] + 1 if a == r else max(table[i][j + 1], table[i + 1][j])
    return 200 * table[-1][-1] / (len(answer) + len(reference))


def test_characters_by_hand() -> None:
    pairs = [(a.replace(" ", ""), r.replace(" ", "")) for a, r in TEXTS]
    means, rows = open_text_measure("characters")([a for a, _ in TEXTS], [r for _, r in TEXTS])
    for (answer, reference), row in zip(pairs, rows, strict=True):
        assert row["rouge_1"] == pytest.approx(rouge_n(answer, reference, 1))
        assert row["rouge_2"] == pytest.approx(rouge_n(answer, reference, 2))
        assert row["rouge_l"] == pytest.approx(rouge_l(answer, reference))
    for name in ("bleu_4", "rouge_1", "rouge_2", "rouge_l"):
        assert means[name] == pytest.approx(sum(row[name] for row in rows) / 4)
    right = [sum(sum((grams(a, n) & grams(r, n)).values()) for a, r in pairs) for n in range(1, 5)]
    said = [sum(sum(grams(a, n).values()) for a, _ in pairs) for n in range(1, 5)]
    long, wanted = (sum(len(pair[i]) for pair in pairs) for i in (0, 1))
    brevity = min(1.0, math.exp(1 - wanted / long))
    precision = math.exp(sum(math.log(a / b) for a, b in zip(right, said, strict=True)) / 4)
    assert means["bleu_4_corpus"] == pytest.approx(100 * brevity * precision)


def test_bleu_of_one_answer_is_finetune_demo_s() -> None:
    """NLTK's sentence BLEU, smoothing method 3, over jieba's words, times 100."""
    _, rows = open_text_measure("words")([a for a, _ in TEXTS[:2]], [r for _, r in TEXTS[:2]])
    for (answer, reference), row in zip(TEXTS, rows, strict=False):
        cut = [[word for word in jieba.lcut(text) if word.strip()] for text in (answer, reference)]
        theirs = sentence_bleu([cut[1]], cut[0], smoothing_function=SmoothingFunction().method3)
        assert row["bleu_4"] == pytest.approx(100 * theirs)


@pytest.mark.parametrize("split", ["words", "characters"])
def test_the_ends_of_the_scale(split: str) -> None:
    measure = open_text_measure(split)
    same = "这是一个很长的句子，words too."
    means, rows = measure([same, "", "  "], [same, same, same])
    assert rows[0] == pytest.approx({"bleu_4": 100, "rouge_1": 100, "rouge_2": 100, "rouge_l": 100})
    assert set(rows[1].values()) == set(rows[2].values()) == {0.0} and 0 < means["bleu_4_corpus"] < 100
    assert measure([""], [same])[0]["bleu_4_corpus"] == 0


def test_words_leave_no_cache_that_others_can_write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert word_cutter()("我来到北京清华大学 ok") == ["我", "来到", "北京", "清华大学", "ok"] and not list(tmp_path.iterdir())


def prompts(*records: dict[str, object]) -> list[TokenPrompt]:
    return [TokenPrompt([1], Prompt(Conversation(()), record)) for record in records]


def test_references() -> None:
    user, assistant = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    found = references(
        prompts(
            {"messages": [user, assistant, user, {**assistant, "content": "b"}]}, {"prompt": "q", "chosen": "c", "rejected": "d"},
            {"question": "q", "answer": "#### 1"}, {"input": "q", "golden": "2"}, {"original_text": "q", "ans": "3"},
            {"instruction": "q", "output": ["best", "worst"]}, {"content": "q", "summary": "s"}, {"prompt": "q"}, {"messages": [user]},
        ),
        None, "auto",
    )  # fmt: skip
    assert found == ["b", "c", "#### 1", "2", "3", "best", "s", None, None]
    assert references(prompts({"prompt": "q", "expected": 4}, {"prompt": "q", "expected": "x"}), "expected", "auto") == ["4", "x"]
    with pytest.raises(UserError, match="metrics.reference: 1 of 2 records have no text or number in gold; one has the fields prompt"):
        references(prompts({"prompt": "q", "gold": 1}, {"prompt": "q"}), "gold", "auto")
    with pytest.raises(UserError, match="metrics.reference names the field"):
        references(prompts({"prompt": "q"}), None, "auto")
    assert matches(["it is 4", "5", ""], ["4", "4", None]) == [1.0, 0.0, None]


def test_win_rate() -> None:
    assert doctest.testmod(measures).failed == 0
    found = win_rate([1, 1, 0, 0, 0.5], [0, 0, 1, 0, 0.4], [False, False, False, False, True])
    assert (found["wins"], found["ties"], found["losses"], found["win_rate"]) == (2, 2, 1, 0.6)
    tenth = win_rate([1] + [0] * 9, [0] + [1] * 9, [False] * 10)
    assert (tenth["win_rate_low"], tenth["win_rate_high"]) == pytest.approx((0.01787621, 0.40415002))  # Wilson, 1 of 10
    swept = win_rate([1.0] * 20, [0.0] * 20, [False] * 20)
    assert swept["win_rate_high"] == pytest.approx(1) and swept["win_rate_low"] == pytest.approx(0.8388748)
