"""trueline beside other programs on the same model, records and step size. One rule: equal numbers first, then alternating runs.

`python bench/peers/compare.py [--environment NAME=DIR ...] [--only GROUP ...] [--runs N] [--steps N] [--threads N] [--write]`;
`make bench-peers` makes the environments and calls this. Every side of a group stays open in a process of its own, and they run in turns.
Prints a JSON line for each reading and ends with a table: tokens per second of the steps after the first (medians over the runs), their
ratio with the smallest and the largest that any two runs give, and most memory by the end of the first. A ratio whose range holds 1 is
within the spread: no claim.
`--write` puts the rows into this machine's table in docs/benchmarks.md.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from material import draw_records, write_model, write_ppo, write_records
from sides import PUBLISHED, SIZE, SIZES

from trueline.parallel.world import fast_bfloat16

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- peers: written by compare.py -->", "<!-- peers end -->"
HEAD = "| case | beside | trueline, tokens/s | peer, tokens/s | ratio (range) | peak MB, trueline | peak MB, peer | must / goal | date |"
NO_BFLOAT16 = "this CPU has no fast bfloat16"
EQUAL = 2e-5  # relative, on the losses of the first two steps, float32
NEAR = 2e-2  # the same for bfloat16
PPO_EQUAL = 1e-4  # absolute, on log-probabilities, values and scores
PPO_NEAR = 5e-2  # the same for bfloat16
ENVIRONMENTS = {"trl": ".venv-peers", "ppo": ".venv-peers-ppo", "lf": ".venv-peers-lf", "lf-ppo": ".venv-peers-lf-ppo"}


@dataclass(frozen=True)
class Side:
    """Who runs: a script with its arguments, in trueline's own environment or a peer's. `{place}` is the folder of models and records."""

    name: str
    script: str
    arguments: tuple[str, ...]
    environment: str = ""
    near: bool = False  # bfloat16: equal to `NEAR` only
    autocast: bool = False  # bfloat16 in what is timed, not in what is compared


@dataclass(frozen=True)
class Group:
    """Sides that run in turns: `ours` beside every one of `theirs`. `targets`: what a ratio should be, by "ours, theirs": must / goal."""

    name: str
    ours: tuple[Side, ...]
    theirs: tuple[Side, ...]
    stage: str = "sft"
    vocabulary: int = SIZES["vocab_size"]
    targets: dict[str, str] = field(default_factory=dict)


def ours(name: str, *arguments: str, model: str = "model", near: bool = False) -> Side:
    return Side(name, "our_side.py", (arguments[0], f"{{place}}/{model}", f"{{place}}/{model}.json", *arguments[1:]), near=near)


def trl(name: str, *arguments: str, model: str = "model") -> Side:
    places, near = (f"{{place}}/{model}", f"{{place}}/{model}.json"), "--bfloat16" in arguments
    return Side(f"TRL, {name}", "trl_side.py", (arguments[0], *places, *arguments[1:]), "trl", near=near)


def factory(*arguments: str, model: str = "model") -> Side:
    places = (f"{{place}}/{model}", f"{{place}}/{model}.json")
    return Side("LLaMA-Factory, packing", "lf_side.py", (arguments[0], *places, *arguments[1:]), "lf")


def rollout(name: str, model: str, case: str, generate: str = "", batching: str = "", at_once: int = 16) -> Group:
    """`at_once` requests at a time. `generate`, `batching`: what is aimed at beside each of them."""
    where = ("rollout_side.py", case, str(at_once), model)
    mine = [Side(dtype, where[0], ("trueline", *where[1:], "--dtype", dtype), near=dtype == "auto") for dtype in ("float32", "auto")]
    peers = {"transformers, generate": ("generate", generate), "transformers, continuous batching": ("batching", batching)}
    theirs = [Side(shown, where[0], (side, *where[1:])) for shown, (side, _) in peers.items()]
    theirs.append(Side("transformers, generate in bfloat16", where[0], ("generate", *where[1:], "--dtype", "auto"), near=True))
    targets = {f"{side.name}, {shown}": target for side in mine for shown, (_, target) in peers.items() if target}
    return Group(f"rollout {name}", tuple(mine), tuple(theirs), targets=targets)


def ppo(name: str, arguments: tuple[str, ...], theirs: dict[str, tuple[str, ...]], targets: dict[str, str]) -> Group:
    """`theirs`: each peer's environment, script and own arguments. A peer leaves its first iteration in a file, and ours checks it."""
    given = ("{place}", "{steps}", *arguments, "--columns")
    columns = {peer: f"{{place}}/{name}, {peer}.safetensors" for peer in theirs}
    peers = [
        Side(peer, script, (*given, columns[peer], *own), place, autocast=place == "lf-ppo")
        for peer, (place, script, *own) in theirs.items()
    ]
    checked = (*given, *columns.values(), "--dtype")
    mine = [Side(dtype, "ppo_ours.py", (*checked, dtype), near=dtype == "auto") for dtype in ("float32", "auto")]
    return Group(name, tuple(mine), tuple(peers), targets={f"{side.name}, {peer}": t for side in mine for peer, t in targets.items()})


BEST = ("--batch", "1", "--no-checkpointing")
PACKED = ("--padding-free", "--no-checkpointing")
SFT = {"float32, TRL, default": "2.5 / 3", "float32, LLaMA-Factory, packing": "1.05 / 1.2", "auto, TRL, default": "4.5 / 6"}
SFT |= {"auto, LLaMA-Factory, packing": "1.7 / 2.2", "auto, TRL, padding-free in bfloat16": "1.4 / 1.8"}
VOCABULARY = {"float32, TRL, default": "6, peak 1/4 / 8", "float32, LLaMA-Factory, packing": "1.1, peak 1/2 / 1.5"}
GROUPS = (
    Group(
        "sft full",
        (ours("float32", "sft"), ours("auto", "sft", "--dtype", "auto", near=True)),
        (
            trl("default", "sft"),
            trl("padding-free", "sft", *PACKED),
            trl("padding-free in bfloat16", "sft", *PACKED, "--bfloat16"),
            factory("sft"),
        ),
        targets=SFT,
    ),
    Group(
        "sft lora",
        (ours("float32", "sft", "--lora"), ours("auto", "sft", "--lora", "--dtype", "auto", near=True)),
        (
            trl("default", "sft", "--lora"),
            trl("padding-free", "sft", "--lora", *PACKED),
            trl("padding-free in bfloat16", "sft", "--lora", *PACKED, "--bfloat16"),
            factory("sft", "--lora"),
        ),
        targets=SFT,
    ),
    Group(
        "sft vocabulary of 151,936",
        (ours("float32", "sft", model="published"),),
        (
            trl("default", "sft", model="published"),
            trl("padding-free", "sft", *PACKED, model="published"),
            factory("sft", model="published"),
        ),
        vocabulary=PUBLISHED["vocab_size"],
        targets=VOCABULARY,
    ),
    Group(
        "reward",
        (ours("float32", "reward"),),
        (trl("default", "reward"), trl("batches of 1", "reward", *BEST)),
        "reward",
        targets={"float32, TRL, default": "2 / 2.5", "float32, TRL, batches of 1": "1.05 / 1.2"},
    ),
    Group(
        "dpo online",
        (ours("float32", "dpo", "--online"),),
        (trl("default", "dpo"), trl("batches of 1", "dpo", *BEST)),
        "dpo",
        targets={"float32, TRL, default": "3 / 4", "float32, TRL, batches of 1": "1.2 / 1.5"},
    ),
    Group(
        "dpo reference before",
        (ours("float32", "dpo"),),
        (trl("precomputed", "dpo", "--precompute"),),
        "dpo",
        targets={"float32, TRL, precomputed": "3 / 4.5"},
    ),
    rollout("uniform", "qwen2_25m", "uniform", "1.5 / 2", "3 / 5"),
    rollout("skewed", "qwen2_25m", "skewed", "2.5 / 4", "3 / 5"),
    rollout("of 64 at once, uniform", "qwen2_25m", "uniform", at_once=64),
    rollout("of 64 at once, skewed", "qwen2_25m", "skewed", at_once=64),
    rollout("of a small model, uniform", "qwen2", "uniform"),
    rollout("of a small model, skewed", "qwen2", "skewed"),
    ppo("ppo equal lengths", ("--epochs", "1"), {"TRL, one epoch": ("ppo", "ppo_trl.py")}, {}),
    ppo(
        "ppo default settings",
        ("--epochs", "4", "--varied"),
        {
            "TRL, default": ("ppo", "ppo_trl.py"),
            "TRL, batches of 2": ("ppo", "ppo_trl.py", "--batch", "2"),
            "LLaMA-Factory, default": ("lf-ppo", "ppo_lf.py"),
        },
        {"TRL, default": "4, peak 1/2 / 6, peak 1/3", "LLaMA-Factory, default": "2.7, peak 1/2 / 4, peak 1/3"},
    ),
)


class Unavailable(Exception):
    """A side cannot run; the sentence says why."""


class Runner:
    """A side's process, asked for one reading at a time."""

    def __init__(self, side: Side, place: Path, given: argparse.Namespace):
        python = Path(sys.executable) if not side.environment else given.environments[side.environment] / "bin" / "python"
        if not python.exists():
            raise Unavailable(f"no environment for {side.environment}; name one with --environment {side.environment}=DIR")
        settings = {"OMP_NUM_THREADS": str(given.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        settings |= {"TRL_EXPERIMENTAL_SILENCE": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.errors = tempfile.TemporaryFile("w+")
        arguments = [a.format(place=place, steps=given.steps) for a in side.arguments]
        self.process = subprocess.Popen(
            [str(python), str(HERE / side.script), *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, cwd=place, env=os.environ | settings,
        )  # fmt: skip
        self.readings: list[dict[str, Any]] = []

    def read(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write("run\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.process.wait()
            self.errors.seek(0)
            said = [text for text in self.errors.read().splitlines() if text.strip() and "it/s]" not in text] or ["nothing said"]
            print("\n".join(said[-20:]), file=sys.stderr)
            raise Unavailable(said[-1][:160])
        self.readings.append(json.loads(line))

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait(60)


@dataclass(frozen=True)
class Row:
    """One comparison's result."""

    case: str
    beside: str
    cells: tuple[str, ...]

    def line(self) -> str:
        return f"| {self.case} | {self.beside} | " + " | ".join(self.cells) + " |"


def rates(group: Group, readings: list[dict[str, Any]], records: list[dict[str, list[int]]]) -> list[float]:
    """Real tokens per second of each reading, its first step left out if it has several."""
    found = []
    for reading in readings:
        sides = ("chosen",) if group.stage == "sft" else ("chosen", "rejected")
        per_step = reading.get("tokens") or [
            sum(len(r["prompt"]) + len(r[side]) for r in records[i : i + SIZE] for side in sides) for i in range(0, len(records), SIZE)
        ]
        first = int(len(reading["seconds"]) > 1)
        found.append(sum(per_step[first : len(reading["seconds"])]) / sum(reading["seconds"][first:]))
    return found


def difference(mine: dict[str, Any], peer: dict[str, Any], near: bool) -> str | None:
    """In what the two sides' numbers differ, if they do."""
    if mine.get("answers") != peer.get("answers"):
        return "greedy tokens differ"
    if not mine.get("gap", 0.0) <= NEAR:
        return f"log-probabilities differ by {mine['gap']:.2g}"
    if "columns" in peer:
        apart, bound = mine["apart"].get(peer["columns"]), PPO_NEAR if near else PPO_EQUAL
        if not apart:
            return "the peer's first iteration was not checked"
        if not all(value <= bound for value in apart.values()):
            return f"first iteration differs: {apart}"
    gaps = [abs(a - b) / abs(b) for a, b in zip(mine["losses"][:2], peer["losses"][:2], strict=True)]
    if any(gap > (NEAR if near else EQUAL) for gap in gaps):
        return f"losses differ by {max(gaps):.2g}"
    return None


def measure(group: Group, place: Path, given: argparse.Namespace) -> list[Row]:
    """Readings in turns, and a row for each pair of sides."""
    runners: dict[Side, Runner] = {}
    slow = [side for side in (*group.theirs, *group.ours) if side.near or side.autocast] if not fast_bfloat16() else []
    reasons = dict.fromkeys(slow, NO_BFLOAT16)
    try:
        for turn in range(given.runs):
            sides = [*group.theirs, *group.ours]  # PPO's peer first: ours checks its tokens
            for side in sides if turn % 2 == 0 else reversed(sides):
                if side in reasons:
                    continue
                try:
                    if side not in runners:
                        runners[side] = Runner(side, place, given)
                    runners[side].read()
                except Unavailable as error:
                    reasons[side] = str(error)
                    continue
                line = {"bench": "peers", "case": group.name, "side": side.name, "ours": side in group.ours, "run": turn}
                print(json.dumps(line | {"load1": os.getloadavg()[0]} | runners[side].readings[-1]), flush=True)
    finally:
        for runner in runners.values():
            runner.close()
    records = draw_records(given.steps * SIZE, group.vocabulary)
    absent = [Row(f"{group.name}, {side.name}", "-", not_run(reasons[side])) for side in group.ours if side in reasons]
    pairs = [(mine, peer) for mine in group.ours if mine not in reasons for peer in group.theirs]
    return [row(group, mine, peer, runners, reasons, records) for mine, peer in pairs] + absent


def not_run(reason: str, target: str = "-") -> tuple[str, ...]:
    return "-", "-", f"not run: {reason}".replace("|", "/"), "-", "-", target, time.strftime("%Y-%m-%d")


def row(
    group: Group, mine: Side, peer: Side, runners: dict[Side, Runner], reasons: dict[Side, str], records: list[dict[str, list[int]]]
) -> Row:
    case, target, today = f"{group.name}, {mine.name}", group.targets.get(f"{mine.name}, {peer.name}", "-"), time.strftime("%Y-%m-%d")
    if peer in reasons:
        return Row(case, peer.name, not_run(reasons[peer], target))
    ours_read, peer_read = runners[mine].readings, runners[peer].readings
    versions = peer_read[0]["versions"]
    version = next((f" {versions[name]}" for name in ("llamafactory", "trl", "transformers") if name in versions), "")
    program, _, setting = peer.name.partition(", ")
    beside = f"{program}{version}, {setting}"
    if wrong := difference(ours_read[0], peer_read[0], mine.near or peer.near):
        return Row(case, beside, ("-", "-", f"not compared: {wrong}", "-", "-", target, today))
    fast, slow = rates(group, ours_read, records), rates(group, peer_read, records)
    ratio, low, high = statistics.median(fast) / statistics.median(slow), min(fast) / max(slow), max(fast) / min(slow)
    claim = f"{ratio:.2f} ({low:.2f} to {high:.2f})" if not low <= 1 <= high else f"within the spread ({low:.2f} to {high:.2f})"
    peaks = [readings[0]["peak_mb"] for readings in (ours_read, peer_read)]  # of a process that ran once: later readings pile up
    cells = (f"{statistics.median(fast):,.0f}", f"{statistics.median(slow):,.0f}", claim, *(f"{p:,}" for p in peaks), target, today)
    return Row(case, beside, cells)


def machine(threads: int) -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    processor = found.group(1) if found else platform.processor()
    return f"{processor} {'with' if fast_bfloat16() else 'without'} fast bfloat16, {threads} threads"


def merge_tables(old: str, rows: list[Row], measured: list[str], here: str, command: str) -> str:
    """The page's tables, one for each machine, with `rows` of the groups `measured` in place of theirs in the one of `here`; all other
    rows stay. What would be in bfloat16 on a CPU that is slow in it is left out."""
    tables = re.findall(r"^(.*:)\n\n\| case .*\n.*\n((?:\|.*\n)*)", old, re.MULTILINE)
    known = {above: lines.splitlines() for above, lines in tables}
    above = next((x for x in known if f", {here}, " in x), None)
    before = known.get(above or "", [])
    lines = {group.name: [line for line in before if line.startswith(f"| {group.name}, ")] for group in GROUPS}
    lines |= {name: [r.line() for r in rows if r.case.startswith(f"{name}, ") and NO_BFLOAT16 not in r.line()] for name in measured}
    title = f"{command}, {here}, Python {platform.python_version()}:"
    merged = {title if x == above else x: kept for x, kept in known.items()}  # in their order
    merged[title] = [line for found in lines.values() for line in found]
    divider = "|---" * HEAD.count(" | ") + "|---|"
    return "".join(f"\n{title}\n\n" + "\n".join([HEAD, divider, *kept]) + "\n" for title, kept in merged.items())


def write(rows: list[Row], measured: list[str], given: argparse.Namespace, page: Path) -> None:
    """Puts the rows of the measured groups into this machine's table on the page."""
    before, found, rest = page.read_text("utf-8").partition(BEGIN)
    old, end, after = rest.partition(END)
    if not found or not end:
        sys.exit(f"{page} has no lines {BEGIN} and {END}")
    command = f"`python bench/peers/compare.py --runs {given.runs} --steps {given.steps}`"
    tables = merge_tables(old, rows, measured, machine(given.threads), command)
    page.write_text(f"{before}{BEGIN}\n{tables}\n{END}{after}", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser()
    environment = f"a peer's environment: {', '.join(ENVIRONMENTS)}"
    parser.add_argument("--environment", action="append", default=[], metavar="NAME=DIR", help=environment)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", nargs="*", default=[], help="groups whose name starts with one of these")
    parser.add_argument("--write", action="store_true", help="put the rows into docs/benchmarks.md")
    parser.add_argument("--list", action="store_true", help="the groups' names")
    given = parser.parse_args()
    given.environments = {name: Path(path).absolute() for name, path in ENVIRONMENTS.items()}
    for text in given.environment:
        name, _, path = text.partition("=")
        if name not in ENVIRONMENTS or not path:
            parser.error(f"--environment {text}: expected one of {', '.join(f'{n}=DIR' for n in ENVIRONMENTS)}")
        given.environments[name] = Path(path).absolute()
    groups = [g for g in GROUPS if not given.only or any(g.name.startswith(name) for name in given.only)]
    if given.list:
        print("\n".join(g.name for g in groups))
        return
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for name, sizes in {"model": {}, "published": PUBLISHED}.items():
            write_model(place / name, **sizes)
            write_records(place / f"{name}.json", given.steps * SIZE, (SIZES | sizes)["vocab_size"])
        write_ppo(place)
        for count, group in enumerate(groups, 1):
            rows += measure(group, place, given)
            if given.write:  # now, for all of them take an hour
                write(rows, [done.name for done in groups[:count]], given, PAGE)
    print("\n" + HEAD + "\n" + "|---" * HEAD.count(" | ") + "|---|")
    print("\n".join(r.line() for r in rows))


if __name__ == "__main__":
    main()
