"""Final answers as people and models write them."""

import doctest
import json
from fractions import Fraction
from pathlib import Path

import pytest

from trueline.data import answers
from trueline.data.answers import final_answer, number_in, same_answer


def test_examples_in_the_module() -> None:
    assert doctest.testmod(answers).failed == 0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234", 1234), ("$18.00", 18), ("3/4", "3/4"), ("(11/20)", "11/20"), ("1(5/6)", "11/6"), ("12.5%", "1/8"), ("１２３", 123),
        ("４５％", "9/20"), ("so 5 - 3 = 2", 2), ("it is -7", -7), ("x - 7", 7), ("#### 1,000,000", 1000000), ("a\n#### 72", 72),
        ("\\boxed{42}", 42), ("\\boxed{\\frac{3}{4}}", "3/4"), ("\\(x = \\boxed{\\dfrac{10}{4}}\\)", "5/2"), ("\\boxed{5} is not 6", 5),
        ("The answer is 12 apples, of 30.", 12), ("Answer: $1,234.50", "1234.5"), ("答案是：8个", 8), ("答案为三百零五", 305),
        ("答：一共二十一元。", 21),
        ("答案是三分之二", "2/3"), ("答案是百分之五", "1/20"), ("答案是一万二千", 12000), ("答案是十二点五", "12.5"), ("答案：负三", -3),
        ("二零二四", 2024),
        ("It was 1999. The answer is 3", 3), ("answer is 3? No. The answer is 4.", 4), (".5", "1/2"), ("no number", None), ("", None),
        ("一共有很多", None), ("1/0", None),
    ],
)  # fmt: skip
def test_numbers(text: str, value: str | int | None) -> None:
    found = number_in(text)
    assert (found[0] if found else None) == (None if value is None else Fraction(value))


def test_digits_without_end_are_no_burden() -> None:
    found = number_in("9" * 100_000)
    assert found and found[0] < 10**41


@pytest.mark.parametrize(
    ("response", "reference", "same"),
    [
        ("She makes $18 every day.", "9 * 2 = 18\n#### 18", True),
        ("She makes $18 a day, for 7 days.", "#### 18", False),
        ("共 20%", "20", True), ("0.2", "20%", True), ("20%", "0.2", True), ("0.5", "1/2", True), ("50%", "5", False),
        ("0.3333333", "1/3", True), ("0.33", "1/3", False),
        ("so \\boxed{x + 1}", "x+1", True), ("\\boxed{\\frac{\\pi}{2}}", "$\\frac{\\pi}{2}$", True), ("\\boxed{\\pi/2}", "\\pi", False),
        ("The answer is Yes.", "yes", True), ("no", "yes", False), ("", "yes", False), ("", "5", False), ("five", "5", False),
        ("红色", "红色。", True), ("anything", "", False), ("7", "答案是7个苹果", True), ("答案是七", "7", True), ("7", "七", True),
    ],
)  # fmt: skip
def test_same_answer(response: str, reference: str, same: bool) -> None:
    assert same_answer(response, reference) is same


def test_marks_win_over_the_last_number() -> None:
    assert final_answer("The answer is\n12") == ("12", True)
    assert final_answer("no mark") == ("no mark", False)


FILES = {
    "gsm8k/test.jsonl": ("answer", 1.0), "cmath/cmath_dev.jsonl": ("golden", 1.0), "ape210k/test.ape.json": ("ans", 0.99),
    "rlvr/math_benchmarks.jsonl": ("ground_truth", 0.75),
}  # fmt: skip


@pytest.mark.parametrize("file", FILES)
def test_published_answers(file: str, shared: Path) -> None:
    """Each is its own answer, in three dresses, and another number is not; so many are numbers."""
    field, share = FILES[file]
    wanted = [json.loads(line)[field] for line in (shared / "data" / file).read_text("utf-8").splitlines()]
    for reference in map(str, wanted):
        answer = final_answer(reference)[0]
        assert same_answer(reference, reference) and same_answer(f"5 and 7. The answer is {answer}.", reference), reference
        assert same_answer(f"2, then \\boxed{{{answer}}}, not 3", reference), reference
        assert not same_answer("the answer is 987654321", reference), reference
    numbers = sum(answers._NUMBER.fullmatch(final_answer(str(reference))[0]) is not None for reference in wanted)
    assert numbers >= share * len(wanted)
