"""report.html: what a run did, on one page that needs nothing else. It only reads what the run folder holds; all text is escaped.

Written by hand are the page (report.html.j2) and the charts (charts.py); no script, no font, no library is fetched.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from trueline.recipes.charts import Chart, Series, draw, increasing, number
from trueline.train.run import write_whole

SHOWN_SAMPLES = 12


@dataclass(frozen=True)
class Tag:
    """A small label under an answer."""

    text: str
    kind: str = "plain"  # plain, good, bad


@dataclass(frozen=True)
class Answer:
    """What a model said, and when."""

    text: str
    label: str = ""
    tags: tuple[Tag, ...] = ()


@dataclass(frozen=True)
class Compared:
    """One prompt and the answers to it, side by side."""

    prompt: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Cell:
    """A number in a table; `share` (0 to 1) draws a bar under it."""

    text: str
    share: float | None = None
    good: bool = False


@dataclass(frozen=True)
class Row:
    name: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Time:
    """A bar of seconds."""

    name: str
    share: float
    text: str


@dataclass(frozen=True)
class Section:
    """A part of the page; what is empty is left out. `more` and `settings` are folded until asked for (open in print)."""

    title: str = ""
    text: tuple[str, ...] = ()
    table: Table | None = None
    times: tuple[Time, ...] = ()
    charts: tuple[Chart, ...] = ()
    samples: tuple[Compared, ...] = ()
    more: tuple[Chart, ...] = ()
    settings: str = ""


@dataclass(frozen=True)
class Page:
    title: str
    lead: tuple[str, ...]
    facts: tuple[str, ...]
    sections: tuple[Section, ...]
    footer: str = "Written by trueline. The numbers are in metrics.jsonl and the answers in samples.jsonl beside this page."

    @property
    def columns(self) -> int:
        """Most answers side by side."""
        return max((len(s.answers) for part in self.sections for s in part.samples), default=1)


@dataclass(frozen=True)
class DemoStage:
    """A finished stage of the demo: `judged` are its answers to the held-out prompts, `{"prompt", "response", "preferred", "correct"}`."""

    name: str
    run: Path
    judged: Sequence[dict[str, Any]] = field(default=())


@dataclass(frozen=True)
class Plot:
    """Which numbers of metrics.jsonl share a chart."""

    title: str
    names: tuple[str, ...]
    hint: str = ""


MAIN = (
    Plot("Score", ("score",), "mean reward of an answer; higher is better"),
    Plot("Loss", ("loss",), "lower is better"),
    Plot("Accuracy", ("accuracy",), "share of pairs ranked right"),
    Plot("Margin", ("margin",), "how far the better answer is ahead"),
    Plot("Implicit rewards", ("chosen_reward", "rejected_reward"), "beta times the log-ratio to the reference"),
    Plot("KL to the reference", ("kl",), "how far the policy has moved, in nats per answer"),
    Plot("Answer length", ("response_length",), "tokens"),
    Plot("Explained variance", ("explained_variance",), "of the returns, by the critic; 1 is perfect"),
    Plot("Entropy", ("entropy",), "nats per token; a fall to 0 is a collapse"),
)
MORE = (
    Plot("Policy loss", ("policy_loss",), "no measure of progress: the answers it is computed on change with the policy"),
    Plot("Value loss", ("value_loss",)),
    Plot("Clipped", ("clip_fraction",), "share of tokens whose ratio left the clip range"),
    Plot("Rollout gap", ("logprob_gap", "logprob_gap_max"), "between log-probabilities when sampled and when trained; rounding only"),
    Plot("Stopped", ("stopped",), "share of answers that came to an end by themselves"),
    Plot("Learning rate", ("lr", "critic_lr")),
    Plot("Gradient norm", ("grad_norm", "critic_grad_norm"), "before clipping"),
    Plot("Speed", ("tokens_per_second",), "tokens per second"),
    Plot("Seconds per iteration", ("generate_seconds", "score_seconds", "update_seconds"), "score: log-probabilities and values"),
    Plot("Seconds around it", ("reward_seconds", "save_seconds", "idle_seconds"), "reward: what was waited for after the last answer"),
    Plot("Peak memory", ("peak_memory_mb",), "MiB, since the process began"),
)
TITLES = {
    "sft": "Supervised fine-tuning",
    "reward": "Reward model",
    "dpo": "Direct preference optimisation (DPO)",
    "ppo": "Proximal policy optimisation (PPO)",
    "evaluate": "Evaluation",
}

_ENVIRONMENT = Environment(
    loader=PackageLoader("trueline.recipes", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=False, auto_reload=False
)


def write_page(path: Path, page: Page) -> Path:
    """Renders `page` and puts it at `path` in one step."""
    write_whole(path, _ENVIRONMENT.get_template("report.html.j2").render(page=page, draw=draw, number=number))
    return path


def run_report(run_folder: Path) -> Path:
    """Writes `<run_folder>/report.html` from its run.json, metrics.jsonl, samples.jsonl and config.yaml; any of them may be missing."""
    facts = _object(run_folder / "run.json")
    stage = str(facts.get("stage", ""))
    metrics, samples = _lines(run_folder / "metrics.jsonl"), _lines(run_folder / "samples.jsonl")
    main, more = curves(metrics)
    sections = [Section("What it reached", table=_final_table(metrics))] if metrics else []
    sections += [Section("Curves", charts=main, more=more)] if main or more else []
    answers = sample_comparisons(samples)
    sections += [Section("What the model said", samples=answers)] if answers else []
    sections += [Section(settings=_text(run_folder / "config.yaml"))]
    lead = () if metrics else ("This run has logged no numbers yet.",)
    page = Page(TITLES.get(stage, "Run"), lead, (run_folder.name, *_run_facts(facts)), tuple(sections))
    return write_page(run_folder / "report.html", page)


def demo_report(out: Path, summary: dict[str, Any], stages: Sequence[DemoStage]) -> Path:
    """Writes `<out>/report.html` of the whole chain. `summary` is the content of summary.json; `stages` in the order they ran."""
    speaking = [s for s in stages if s.judged]
    sections = [Section(table=_demo_table(summary)), Section("Before and after", text=_BEFORE_AFTER, samples=demo_comparisons(speaking))]
    sections.append(Section("Time per stage", times=_times(summary, stages)))
    for stage in stages:
        main, more = curves(_lines(stage.run / "metrics.jsonl"))
        settings = _text(stage.run / "config.yaml")
        title, text = TITLES.get(stage.name, stage.name), _STAGE_TEXT.get(stage.name, ())
        sections.append(Section(title, text, charts=main, more=more, settings=settings))
    run = (_object(stages[0].run / "run.json") if stages else {}) | {
        "seed": summary["seed"],
        "total": None,
    }  # every stage has its own steps
    facts = (f"{summary['seconds']:.0f} s in all", f"{summary['peak_memory_mb']:.0f} MiB of memory at most", *_run_facts(run))
    footer = "Written by trueline demo. The data, the configurations and every run are in the folders beside this page."
    return write_page(out / "report.html", Page("trueline demo", _DEMO_LEAD, facts, tuple(sections), footer))


_DEMO_LEAD = (
    "A small language model learned to answer questions in Chinese and English from examples of which half are courteous and half brusque. "
    "Then preference pairs told it that courtesy is wanted: once through a reward model and PPO, once directly with DPO.",
    "All answers below are to prompts that no stage was trained on, sampled at temperature 1 and judged by the data's own ground truth.",
)
_BEFORE_AFTER = ("Fine-tuning leaves the manner to chance. PPO and DPO start from that same model.",)
_STAGE_TEXT = {
    "sft": ("From random weights. The loss counts only what the assistant says; courteous and brusque answers are equally frequent.",),
    "reward": ("The fine-tuned model with one number in place of the next word: the better answer of a pair is to get the higher one.",),
    "ppo": ("The fine-tuned model answers, the reward model judges, and the policy follows, held back by its distance from the start.",),
    "dpo": ("The fine-tuned model again, trained on the pairs themselves: no reward model, no sampling.",),
}
_SPLITS = {"train": "training", "eval": "held out"}
_SHORT = {"sft": "SFT", "reward": "Reward model", "ppo": "PPO", "dpo": "DPO"}


def curves(metrics: Iterable[dict[str, Any]]) -> tuple[tuple[Chart, ...], tuple[Chart, ...]]:
    """The charts worth a look, and the rest. A number nobody planned for gets a chart of its own among the rest."""
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for line in metrics:
        step, split = line.get("step"), line.get("split", "train")
        for name, value in line.items():
            if name not in ("step", "tokens", "seconds") and _is_number(value) and _is_number(step):
                points.setdefault((name, str(split)), []).append((float(step), float(value)))  # type: ignore[arg-type]
    planned = {name for plot in (*MAIN, *MORE) for name in plot.names}
    others = tuple(
        Plot(_words(name)[:1].upper() + _words(name)[1:], (name,)) for name in dict.fromkeys(n for n, _ in points) if name not in planned
    )
    # PPO's loss is its policy loss and shows no progress
    aside = tuple(plot for plot in MAIN if "loss" in plot.names and ("policy_loss", "train") in points)
    main = tuple(plot for plot in MAIN if plot not in aside)
    return _charts(main, points), _charts((*MORE, *(replace(plot, hint="") for plot in aside), *others), points)


def _charts(plots: Iterable[Plot], points: dict[tuple[str, str], list[tuple[float, float]]]) -> tuple[Chart, ...]:
    charts = []
    for plot in plots:
        found = [(n, s, increasing(points[n, s])) for n in plot.names for s in _SPLITS if (n, s) in points]
        if any(len(p) > 1 for _, _, p in found):  # one number is no curve: it is in the table
            several = len({n for n, _, _ in found}) > 1
            series = tuple(
                Series(_words(n) + ", held out" * (s == "eval"), p, plot.names.index(n), s == "eval")
                if several
                else Series(_SPLITS[s], p, int(s == "eval"), s == "eval")
                for n, s, p in found
            )
            charts.append(Chart(plot.title, series, plot.hint))
    return tuple(charts)


def sample_comparisons(lines: Sequence[dict[str, Any]]) -> tuple[Compared, ...]:
    """The same prompt early and late where there is one, else some of the first and of the last answers, else simply some answers."""
    usable = [x for x in lines if isinstance(x.get("response"), str)]
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for line in usable:
        by_prompt.setdefault(_prompt(line), []).append(line)
    steps = sorted({_step(x) for x in usable})
    if len(steps) < 2:
        return tuple(Compared(p, tuple(_answer(x) for x in group[:2])) for p, group in list(by_prompt.items())[:SHOWN_SAMPLES])
    spans = [(group[0], group[-1]) for group in by_prompt.values() if _step(group[0]) < _step(group[-1])]
    spans.sort(key=lambda pair: _step(pair[0]) - _step(pair[1]))  # the widest first
    if spans:
        return tuple(Compared(_prompt(a), (_answer(a, True), _answer(b, True))) for a, b in spans[:SHOWN_SAMPLES])
    half = SHOWN_SAMPLES // 2
    first, last = ([x for x in usable if _step(x) == at][:half] for at in (steps[0], steps[-1]))
    return tuple(Compared(_prompt(x), (_answer(x, True),)) for x in (*first, *last))


def _answer(line: dict[str, Any], with_step: bool = False) -> Answer:
    score = (Tag(f"score {number(line['score'])}"),) if _is_number(line.get("score")) else ()
    cut = (Tag("cut off", "bad"),) if line.get("finish") == "length" else ()
    return Answer(line["response"].strip(), f"step {_step(line):g}" if with_step else "", score + cut)


def demo_comparisons(stages: Sequence[DemoStage]) -> tuple[Compared, ...]:
    """Every stage's answer to the same prompts: in both languages, more of those the first stage answered in the unwanted manner."""
    if not stages:
        return ()
    rows = list(zip(*(s.judged for s in stages), strict=True))
    brusque, other = ([row for row in rows if bool(row[0]["preferred"]) == kind] for kind in (False, True))
    chosen = [row for part, most in ((brusque, 3), (other, 1)) for chinese in (True, False) for row in _of_language(part, chinese)[:most]]
    return tuple(Compared(row[0]["prompt"], tuple(_judged(s.name, x) for s, x in zip(stages, row, strict=True))) for row in chosen)


def _of_language(rows: list[tuple[dict[str, Any], ...]], chinese: bool) -> list[tuple[dict[str, Any], ...]]:
    return [row for row in rows if any("\u4e00" <= c <= "\u9fff" for c in row[0]["response"]) == chinese]


def _judged(name: str, line: dict[str, Any]) -> Answer:
    manner = Tag("courteous", "good") if line["preferred"] else Tag("brusque", "bad")
    fact = Tag("correct", "good") if line["correct"] else Tag("wrong", "bad")
    return Answer(line["response"].strip(), _SHORT.get(name, name), (manner, fact))


def _demo_table(summary: dict[str, Any]) -> Table:
    rows = [
        Row(
            _SHORT.get(name, name),
            (
                Cell(f"{found['preferred']:.1f} %", found["preferred"] / 100, good=True),
                Cell(f"{found['correct']:.1f} %", found["correct"] / 100),
                Cell(f"{found['seconds']:.0f} s"),
            ),
        )
        for name, found in summary["stages"].items()
    ]
    accuracy, seconds = summary["reward_accuracy"], summary.get("reward_seconds")
    time = Cell("–" if seconds is None else f"{seconds:.0f} s")
    reward = Row("Reward model, pairs", (Cell("–"), Cell(f"{accuracy:.1f} %", accuracy / 100), time))
    return Table(("On held-out prompts", "Courteous", "Correct", "Time"), (*rows[:1], reward, *rows[1:]))


def _times(summary: dict[str, Any], stages: Sequence[DemoStage]) -> tuple[Time, ...]:
    seconds = {name: float(found["seconds"]) for name, found in summary["stages"].items()}
    seconds |= {"reward": float(summary["reward_seconds"])} if "reward_seconds" in summary else {}
    rest = float(summary["seconds"]) - sum(seconds.values())
    order = [s.name for s in stages if s.name in seconds]
    bars = [(_SHORT.get(n, n), seconds[n]) for n in order] + ([("Everything else", rest)] if rest >= 0.5 else [])
    longest = max((s for _, s in bars), default=1.0) or 1.0
    return tuple(Time(name, s / longest, f"{s:.0f} s") for name, s in bars)


def _final_table(metrics: Sequence[dict[str, Any]]) -> Table:
    """The last value of everything, trained and held out."""
    last: dict[str, dict[str, Any]] = {}
    for line in metrics:
        last.setdefault(str(line.get("split", "train")), {}).update({k: v for k, v in line.items() if _is_number(v)})
    splits = [s for s in _SPLITS if s in last]
    planned = [name for plot in (*MAIN, *MORE) for name in plot.names if name not in ("lr", "grad_norm")]
    seen = dict.fromkeys(n for s in splits for n in last[s] if n not in ("step", "lr", "grad_norm", "seconds", "tokens"))
    names = [n for n in planned if n in seen] + [n for n in seen if n not in planned]
    rows = tuple(Row(_words(n), tuple(Cell(number(last[s][n]) if n in last[s] else "–") for s in splits)) for n in names)
    return Table(("At the end", *(_SPLITS[s] for s in splits)), rows)


def _run_facts(run: dict[str, Any]) -> tuple[str, ...]:
    versions = run.get("versions", {})
    found = {
        "started": str(run["started"]).replace("T", " ").replace("+00:00", " UTC") if "started" in run else None,
        "device": run.get("device"),
        "seed": run.get("seed"),
        "steps": run.get("total"),
        "trueline": versions.get("trueline"),
        "torch": versions.get("torch"),
    }
    return tuple(f"{name} {value}" for name, value in found.items() if value is not None)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _words(name: str) -> str:
    return name.replace("_", " ").replace("kl", "KL") if name != "lr" else "learning rate"


def _prompt(line: dict[str, Any]) -> str:
    prompt = line.get("prompt", "")
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def _step(line: dict[str, Any]) -> float:
    return float(line["step"]) if _is_number(line.get("step")) else 0.0


def _text(path: Path) -> str:
    return path.read_text("utf-8", "replace") if path.is_file() else ""


def _object(path: Path) -> dict[str, Any]:
    value = json.loads(_text(path) or "{}")
    return value if isinstance(value, dict) else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines log; a last line that a kill cut short is left out."""
    lines = _text(path).splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n") and line.strip()]
