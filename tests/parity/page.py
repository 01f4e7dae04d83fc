"""`make parity`: runs the parity tests and writes what they measured to docs/parity.md.

One rule: no number is made here. Each is the largest difference that a test's own comparison saw, each count is of tests that passed. A
test says its column, and where no parameter does its row, in `@pytest.mark.parity(column, family)`; a cell without a test is an error.
"""

import datetime
import platform
import sys
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from trueline.families.table import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "parity.md"
ORACLES = ("torch", "transformers", "peft", "tokenizers", "tiktoken", "sentencepiece")
COLUMNS = {
    "logits": "",
    "loss and gradients": "",
    "greedy": "same tokens",
    "rendering": "same tokens",
    "adapters": "",
    "export": "same bits",
}
"""What a passed test of the column says besides the differences it measured."""
NOTES = (
    "Each cell: the largest absolute difference the tests of `tests/parity/` saw, by number format, and how many of them passed.",
    "*Same tokens* and *same bits* are comparisons without a tolerance. The other side is transformers (its own classes and chat",
    "templates), PEFT, tiktoken and sentencepiece. Where transformers has no class it is what the authors' own code returned (ChatGLM-6B,",
    "ChatGLM2, and GLM-4 in its original layout, `chatglm4`); beyond those records, and for ChatGLM3, which has the same network, it is",
    "transformers' GLM under the published names and a second implementation in the tests that was held to the records. Skipped tests",
    "need reference material that is not part of the project.",
)


class Recorder:
    """A pytest plugin: the largest difference in each test, by what `torch.testing.assert_close` was given."""

    def __init__(self) -> None:
        self.largest: dict[str, dict[torch.dtype, float]] = defaultdict(dict)
        self.outcomes: dict[str, str] = {}
        self.places: dict[str, tuple[str, str] | None] = {}
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
        self.places[item.nodeid] = place_of(item)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome


def place_of(item: pytest.Item) -> tuple[str, str] | None:
    """Row and column: from the test's `parity` mark, or the row from the parameter that begins with a family's name."""
    mark = item.get_closest_marker("parity")
    if mark is None:
        return None
    values = mark.args[1:] or tuple(item.callspec.params.values())  # type: ignore[attr-defined]
    (family,) = {f for value in values if isinstance(value, str) for f in FAMILIES if value == f or value.startswith(f"{f}_")}
    assert mark.args[0] in COLUMNS, f"{item.nodeid}: no column {mark.args[0]}"
    return family, mark.args[0]


def cell(tests: list[str], recorder: Recorder, exact: str = "") -> str:
    """`what was equal; largest difference by number format; tests that passed`."""
    passed = sum(recorder.outcomes[t] == "passed" for t in tests)
    skipped = sum(recorder.outcomes[t] == "skipped" for t in tests)
    largest: dict[torch.dtype, float] = {}
    for test in tests:
        for dtype, apart in recorder.largest.get(test, {}).items():
            largest[dtype] = max(largest.get(dtype, 0.0), apart)
    floats = sorted(((str(d).removeprefix("torch."), a) for d, a in largest.items() if d.is_floating_point), key=str)
    sizes = [f"{'equal' if a == 0 else f'{a:.1e}'} {name}" for name, a in floats]
    count = f"{passed} of {len(tests)}" + (f" ({skipped} skipped)" if skipped else "")
    return "; ".join([*([exact] if exact and passed else []), *sizes, count])


def write(recorder: Recorder) -> None:
    cells: dict[tuple[str, str], list[str]] = defaultdict(list)
    general = []
    for test in recorder.outcomes:
        place = recorder.places[test]
        (general if place is None else cells[place]).append(test)
    missing = [f"{family}: {column}" for family in FAMILIES for column in COLUMNS if (family, column) not in cells]
    assert not missing, f"no test measures {missing}"
    rows = [[f"`{f}`", *(cell(cells[f, column], recorder, exact) for column, exact in COLUMNS.items())] for f in FAMILIES]
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
