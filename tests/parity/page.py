"""`make parity`: runs the parity tests and writes what they measured to docs/parity.md.

One rule: no number is made here. Each is the largest difference that a test's own comparison saw, and each count is of tests that passed.
"""

import datetime
import platform
import re
import sys
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "parity.md"
ORACLES = ("torch", "transformers", "peft", "tokenizers", "tiktoken", "sentencepiece")
# the first whose pattern occurs in a test's name; the particular before the general
FAMILIES = (
    ("chatglm2, 3 and GLM-4 in the original layout", r"chatglm[234]|original|authors_recorded"), ("chatglm", r"test_chatglm\.py"),
    ("glm4 (0414)", r"0414|test_(logits|peft|generate)\.py.*glm4"), ("glm", r"glm"), ("qwen3", r"qwen3"), ("qwen2", r"qwen"),
    ("mistral", r"mistral"), ("llama", r"llama"),
)  # fmt: skip
ASPECTS = (
    ("adapters", r"test_peft|lora|prefix|adapter"),
    ("greedy", r"greedy"),
    ("rendering", r"test_rendering|template|tokenizer|render"),
    ("export", r"folder|reward_model|export|saved"),
    ("loss and gradients", r"loss_and_gradients"),
    ("logits", r"logits|logprobs|golden|sizes|place|window|rotary|scal"),
)
NOTES = (
    "Each cell: the largest absolute difference the tests of `tests/parity/` saw, by number format, and how many of them passed. The",
    "other side is transformers (its own classes and chat templates), PEFT, tiktoken and sentencepiece; for ChatGLM-6B, ChatGLM2 and",
    "GLM-4 in its original layout what the authors' own code returned, and for sizes of which there is no such record a second",
    "implementation in the tests that was held to it. *equal*: to the last bit. Skipped tests need reference material that is not part",
    "of the project.",
)
COLUMNS = ("logits", "loss and gradients", "greedy", "rendering", "adapters", "export")


class Recorder:
    """A pytest plugin: the largest difference in each test, by what `torch.testing.assert_close` was given."""

    def __init__(self) -> None:
        self.largest: dict[str, dict[torch.dtype, float]] = defaultdict(dict)
        self.outcomes: dict[str, str] = {}
        self.current = ""
        self.compare = torch.testing.assert_close

    def assert_close(self, actual: Any, expected: Any, **options: Any) -> None:
        if isinstance(actual, torch.Tensor) and isinstance(expected, torch.Tensor) and actual.shape == expected.shape and actual.numel():
            apart = float((actual.detach().double() - expected.detach().double()).abs().max())
            seen = self.largest[self.current]
            seen[actual.dtype] = max(seen.get(actual.dtype, 0.0), apart)
        self.compare(actual, expected, **options)

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self.current = item.nodeid

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome


def first(table: tuple[tuple[str, str], ...], name: str) -> str | None:
    """The family (or aspect) that a test's name tells."""
    return next((found for found, words in table if re.search(words, name)), None)


def cell(tests: list[str], recorder: Recorder) -> str:
    """`largest difference by number format; tests that passed`."""
    passed = sum(recorder.outcomes[t] == "passed" for t in tests)
    skipped = sum(recorder.outcomes[t] == "skipped" for t in tests)
    largest: dict[torch.dtype, float] = {}
    for test in tests:
        for dtype, apart in recorder.largest.get(test, {}).items():
            largest[dtype] = max(largest.get(dtype, 0.0), apart)
    floats = sorted(((str(d).removeprefix("torch."), a) for d, a in largest.items() if d.is_floating_point), key=str)
    sizes = [f"{'equal' if a == 0 else f'{a:.1e}'} {name}" for name, a in floats]
    count = f"{passed} of {len(tests)}" + (f" ({skipped} skipped)" if skipped else "")
    return "; ".join([*sizes, count])


def write(recorder: Recorder) -> None:
    cells: dict[tuple[str, str], list[str]] = defaultdict(list)
    general = []
    for test in recorder.outcomes:
        family, aspect = first(FAMILIES, test), first(ASPECTS, test)
        if family and aspect:
            cells[family, aspect].append(test)
        else:
            general.append(test)
    names = dict.fromkeys(family for family, _ in FAMILIES)
    rows = [[name, *(cell(cells[name, c], recorder) if (name, c) in cells else "" for c in COLUMNS)] for name in names
            if any((name, c) in cells for c in COLUMNS)]  # fmt: skip
    table = ["| family | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|", *("| " + " | ".join(r) + " |" for r in rows)]
    made = ", ".join(f"{name} {version(name)}" for name in ORACLES)
    lines = [
        "# Parity", "",
        f"Written by `make parity` on {datetime.date.today()}: Python {platform.python_version()}, {made}, on a CPU.", "",
        *NOTES, "",
        *table, "",
        f"Not of one family: {cell(general, recorder)} tests passed.", "",
    ]  # fmt: skip
    PAGE.write_text("\n".join(lines), encoding="utf-8")


def main() -> int:
    recorder = Recorder()
    torch.testing.assert_close = recorder.assert_close
    code = pytest.main(["-q", "-p", "no:cacheprovider", str(Path(__file__).parent)], plugins=[recorder])
    torch.testing.assert_close = recorder.compare
    if code == 0:
        write(recorder)
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
