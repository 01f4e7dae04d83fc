"""The report page: one file that fetches nothing, escapes everything, and shows the numbers the run wrote."""

import json
import math
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trueline.recipes.charts import HEIGHT, LEFT, WIDTH, Chart, Series, draw, increasing, number, smooth, thin, ticks
from trueline.recipes.report import DemoStage, curves, demo_report, run_report, sample_comparisons

EVIL = "<script>alert('x')</script> & \"quoted\" </pre> {{ 7 * 7 }}"
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Tags, attributes and visible text; notes tags that are not closed in order."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[str] = []
        self.values: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(path.read_text("utf-8"))
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.values += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)


def self_contained(path: Path) -> Page:
    """The page, once it is known to be well formed and to fetch and run nothing."""
    page = Page(path)
    assert not page.open
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    fetching = [(n, v) for n, v in page.values if n in ("src", "href", "srcset", "action") or n.startswith("on")]
    assert not fetching
    text = path.read_text("utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert "http" not in text and "url(" not in text and "@import" not in text
    return page


def write_run(folder: Path, metrics: list[dict[str, Any]], samples: list[dict[str, Any]] | None = None, stage: str = "ppo") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics), "utf-8")
    if samples is not None:
        (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples), "utf-8")
    (folder / "config.yaml").write_text(f"run:\n  output: {EVIL}\n", "utf-8")
    run = {"stage": stage, "seed": 11, "total": 3, "device": "cpu", "versions": {"trueline": "0.9"}, "started": "2026-01-02T03:04:05+00:00"}
    (folder / "run.json").write_text(json.dumps(run), "utf-8")
    return folder


def test_a_run_page_shows_its_numbers_samples_and_settings(tmp_path: Path) -> None:
    metrics = [{"step": i, "split": "train", "score": i * 1.5, "kl": 0.01 * i, "loss": None, "lr": 1e-5, "novel": 3.25} for i in (1, 2, 3)]
    metrics.append({"step": 3, "split": "eval", "score": 4.375})
    samples = [{"step": i, "prompt": EVIL, "response": f"answer {i} {EVIL}", "finish": "length", "score": i / 8} for i in (1, 2, 3)]
    page = self_contained(run_report(write_run(tmp_path / "run", metrics, samples)))
    for wanted in (
        "Proximal policy optimisation",
        "4.375",
        "held out",
        "2026-01-02 03:04:05 UTC",
        "seed 11",
        "answer 1",
        "answer 3",
        "cut off",
    ):
        assert wanted in page.text, wanted
    assert page.text.count("{{ 7 * 7 }}") == 4  # the prompt once, the first and the last answer, the settings
    assert "step 1" in page.text and "answer 2" not in page.text
    assert "training, 3: 4.5" in page.text  # a tooltip
    assert "Novel" in page.text


def test_a_page_is_written_for_a_run_that_has_written_nothing_yet(tmp_path: Path) -> None:
    page = self_contained(run_report(tmp_path))
    assert "no numbers yet" in page.text


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [{"step": 1, "split": "train", "loss": 2.0}, {"step": 2, "split": "train", "loss": 1.0}])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "split": "tra')
    assert "training, 2: 1" in self_contained(run_report(folder)).text


def demo_parts(tmp_path: Path) -> tuple[dict[str, Any], list[DemoStage]]:
    def answers(manner: bool) -> list[dict[str, Any]]:
        said = [("What?", "Of course! It is 7."), (f"问 {EVIL}", "好的！是7。")]
        return [{"prompt": p, "response": f"\n{r}{manner}", "preferred": manner, "correct": True} for p, r in said]

    metrics = [{"step": i, "split": "train", "loss": 1.0 / i} for i in (1, 2, 3)]
    judged = {"sft": answers(False), "ppo": answers(True), "dpo": answers(True)}
    stages = [DemoStage(n, write_run(tmp_path / n, metrics, stage=n), judged.get(n, ())) for n in ("sft", "reward", "ppo", "dpo")]
    summary = {
        "seconds": 200.0,
        "peak_memory_mb": 700,
        "seed": 5,
        "reward_accuracy": 98.7,
        "reward_seconds": 21.0,
        "stages": {
            n: {"preferred": p, "correct": 96.5, "seconds": s} for n, p, s in (("sft", 49.1, 70), ("ppo", 97.3, 61), ("dpo", 95.2, 31))
        },
    }
    return summary, stages


def test_the_demo_page_shows_every_stage_side_by_side(tmp_path: Path) -> None:
    summary, stages = demo_parts(tmp_path)
    page = self_contained(demo_report(tmp_path, summary, stages))
    for wanted in ("49.1 %", "97.3 %", "95.2 %", "98.7 %", "96.5 %", "21 s", "200 s in all", "700 MiB", "seed 5", "Everything else 17 s"):
        assert wanted in page.text, wanted
    assert page.text.count("courteous correct") == 4 and page.text.count("brusque correct") == 2
    assert page.text.count("SFT Of course!") == 1 and page.text.count("DPO 好的！") == 1
    assert page.tags.count("details") == 4  # settings of each stage
    assert (tmp_path / "report.html").stat().st_size < 1_000_000


def test_a_summary_without_the_reward_models_time_is_enough(tmp_path: Path) -> None:
    summary, stages = demo_parts(tmp_path)
    del summary["reward_seconds"]
    assert "98.7 %" in self_contained(demo_report(tmp_path, summary, stages)).text


def test_prompts_that_never_come_back_are_shown_early_and_late() -> None:
    lines = [{"step": s, "prompt": f"p{s}{i}", "response": "r"} for s in (1, 2, 9) for i in range(20)]
    shown = sample_comparisons(lines)
    assert [c.prompt for c in shown] == [f"p1{i}" for i in range(6)] + [f"p9{i}" for i in range(6)]


def test_the_widest_span_of_steps_is_shown_first() -> None:
    lines = [{"step": s, "prompt": p, "response": f"{p}{s}"} for s, p in ((1, "a"), (2, "b"), (3, "a"), (9, "b"))]
    assert [(c.prompt, [a.text for a in c.answers]) for c in sample_comparisons(lines)] == [("b", ["b2", "b9"]), ("a", ["a1", "a3"])]


def test_a_number_nobody_planned_for_gets_a_chart_and_a_lone_one_does_not() -> None:
    main, more = curves([{"step": i, "split": "train", "loss": 1.0, "mine": 2.0} | ({"once": 1.0} if i == 1 else {}) for i in (1, 2)])
    assert [c.title for c in main] == ["Loss"] and [c.title for c in more] == ["Mine"]


def test_held_out_lines_are_dashed_and_keep_the_colour_of_their_name() -> None:
    names = ("chosen_reward", "rejected_reward")
    lines: list[dict[str, Any]] = [
        {"step": i, "split": s, "loss": 1.0} | dict.fromkeys(names, 1.0) for i in (1, 2) for s in ("train", "eval")
    ]
    charts = {c.title: [(s.name, s.colour, s.dashed) for s in c.series] for c in curves(lines)[0]}
    assert charts["Loss"] == [("training", 0, False), ("held out", 1, True)]
    assert charts["Implicit rewards"] == [
        ("chosen reward", 0, False),
        ("chosen reward, held out", 0, True),
        ("rejected reward", 1, False),
        ("rejected reward, held out", 1, True),
    ]


def test_the_loss_of_ppo_is_no_headline() -> None:
    main, more = curves([{"step": i, "split": "train", "loss": 1.0, "policy_loss": 1.0, "score": 1.0} for i in (1, 2)])
    assert [c.title for c in main] == ["Score"] and [c.title for c in more] == ["Policy loss", "Loss"]


def svg(chart: Chart) -> ET.Element:
    return ET.fromstring(str(draw(chart)))


def points_drawn(root: ET.Element) -> list[tuple[float, float]]:
    return [
        (float(c.attrib["cx"]), float(c.attrib["cy"]))
        for c in root.iter("{http://www.w3.org/2000/svg}circle")
        if c.attrib["class"] == "dot"
    ]


def test_points_lie_where_the_axes_say() -> None:
    root = svg(Chart("t", (Series("s", ((0, 0.0), (5, 2.5), (10, 10.0))),)))
    (x0, y0), (x1, y1), (x2, y2) = points_drawn(root)
    assert x0 == LEFT and x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y0 - y1 == pytest.approx((y0 - y2) / 4, abs=0.1) and y2 < y1 < y0 < HEIGHT
    labels = {t.text for t in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"0", "2.5", "5", "7.5", "10", "step"} <= labels
    assert [t.text for t in root.iter("{http://www.w3.org/2000/svg}title")] == ["s, 0: 0", "s, 5: 2.5", "s, 10: 10"]


def test_a_chart_survives_what_is_not_a_number_and_names_with_markup() -> None:
    root = svg(Chart(EVIL, (Series(EVIL, ((1, math.nan), (2, math.inf))), Series("empty", ()))))
    assert "no points" in "".join(root.itertext()) and root.attrib["aria-label"] == EVIL


@given(st.lists(st.floats(-1e12, 1e12, allow_subnormal=False), min_size=1, max_size=150))
def test_any_values_can_be_drawn(values: list[float]) -> None:
    root = svg(Chart("t", (Series("s", tuple((float(i), v) for i, v in enumerate(values))),)))
    for x, _ in points_drawn(root):
        assert LEFT - 0.1 <= x <= WIDTH


@given(st.floats(-1e9, 1e9, allow_subnormal=False), st.floats(-1e9, 1e9, allow_subnormal=False))
def test_ticks_are_few_evenly_spaced_and_cover_the_range(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    found = ticks(low, high)
    room = 1e-6 * max(abs(low), abs(high)) + 1e-11
    assert 2 <= len(found) <= 7 and found[0] <= low + room and found[-1] >= high - room
    steps = [y - x for x, y in zip(found, found[1:], strict=False)]
    assert max(steps) == pytest.approx(min(steps), rel=1e-3)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (3.0, "3"),
        (0.98765, "0.9877"),
        (-0.5, "-0.5"),
        (1.2e-5, "1.2e-5"),
        (-3e-7, "-3e-7"),
        (0.0015, "1.5e-3"),
        (15880, "15.88k"),
        (1234567, "1235k"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400), st.integers(2, 50))
def test_thinning_keeps_the_ends_and_smoothing_the_range(values: list[float], most: int) -> None:
    points = [(float(i), v) for i, v in enumerate(values)]
    thinned = thin(points, most)
    assert len(thinned) == min(most, len(points)) and (thinned[0], thinned[-1]) == (points[0], points[-1])
    smoothed = [v for _, v in smooth(points)]
    assert min(values) - 1e-3 <= min(smoothed) and max(smoothed) <= max(values) + 1e-3


def test_of_two_values_at_one_step_the_later_counts() -> None:
    assert increasing([(1, 5.0), (3, 1.0), (2, 2.0), (1, 4.0)]) == ((1, 4.0), (2, 2.0), (3, 1.0))
