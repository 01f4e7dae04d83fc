"""`trueline demo`: the whole chain on data it writes itself, by the very recipes a user runs, judged by the data's own ground truth.

Half of the supervised answers are courteous, half brusque; the preference pairs want courtesy. So the fine-tuned model is courteous about
half of the time, and a good alignment makes it so nearly always, without making it wrong more often.
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trueline.config.load import from_any, save_config
from trueline.config.schema import STAGES, Config
from trueline.parallel.memory import peak_memory_mb
from trueline.recipes import dpo, evaluate, ppo, reward, sft
from trueline.recipes.demo_data import DemoFiles, write_demo
from trueline.recipes.demo_grammar import correct, preferred
from trueline.recipes.report import DemoStage, demo_report
from trueline.train.run import write_whole

RECIPES: dict[str, Callable[[Any], Any]] = {"sft": sft.run, "reward": reward.run, "ppo": ppo.run, "dpo": dpo.run}


@dataclass(frozen=True)
class Judged:
    """How a stage's model answers the held-out prompts: shares in percent, and what it said."""

    preferred: float
    correct: float
    samples: list[dict[str, Any]]


def run(out: str, seed: int = 0) -> None:
    """Writes data, runs, summary.json and report.html into the folder `out`, and prints a table."""
    began = time.perf_counter()
    folder, console = Path(out), Console()
    clear_finished(folder)
    files = write_demo(folder, seed)
    records = [json.loads(line) for line in files.prompts_held_out.read_text("utf-8").splitlines()]
    summary: dict[str, Any] = {"seed": seed, "stages": {}}
    judged: dict[str, Judged] = {}
    for name in RECIPES:
        started = time.perf_counter()
        console.rule(name)
        config = from_any(STAGES[name], stage_config(name, folder, files, seed))
        write_config(folder, name, config)
        RECIPES[name](config)
        seconds = time.perf_counter() - started
        if name == "reward":
            summary["reward_accuracy"] = 100 * last_line(folder / name / "metrics.jsonl", "eval")["accuracy"]
            summary["reward_seconds"] = round(seconds, 1)
            continue
        judged[name] = judge(folder, name, files, records, seed)
        summary["stages"][name] = {
            "preferred": round(judged[name].preferred, 1),
            "correct": round(judged[name].correct, 1),
            "seconds": round(seconds, 1),
        }
    summary |= {"seconds": round(time.perf_counter() - began, 1), "peak_memory_mb": round(peak_memory_mb())}
    write_whole(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    stages = [DemoStage(name, folder / name, judged[name].samples if name in judged else ()) for name in RECIPES]
    page = demo_report(folder, summary, stages)
    console.print(table(summary))
    console.print(f"{page}: the curves, and what the model said before and after", markup=False, highlight=False)


def clear_finished(folder: Path) -> None:
    """Takes away the runs of an earlier, finished demo, so that this one is run and timed; one that was killed goes on instead."""
    summary = folder / "summary.json"
    if not summary.is_file():
        return
    for name in (*RECIPES, *(f"{name}-evaluate" for name in RECIPES)):
        if (folder / name / "run.json").is_file():
            shutil.rmtree(folder / name)
    summary.unlink()


def stage_config(name: str, folder: Path, files: DemoFiles, seed: int) -> dict[str, Any]:
    """The configuration of one stage: what a person would write in a YAML file."""
    base = str(folder / "sft" / "model")
    run = {"output": str(folder / name), "seed": seed}
    batch = {"max_tokens": 8192}
    if name == "sft":
        return {
            "model": {"path": str(files.model), "init": "random"},
            "data": {"train": [str(files.sft)], "eval": [str(files.sft_held_out)], "max_length": 128},
            "batch": batch | {"sequences": 64},
            "optimizer": {"lr": 4e-3, "weight_decay": 0.1, "warmup": 0.05, "schedule": "cosine"},
            "run": run | {"steps": 650, "eval_every": 130},
        }
    if name == "reward":
        return {
            "model": {"path": base},
            "data": {"train": [str(files.preferences)], "eval": [str(files.preferences_held_out)], "max_length": 128},
            "batch": batch | {"sequences": 32},
            "optimizer": {"lr": 5e-4, "warmup": 0.1},
            "run": run | {"epochs": 1, "eval_every": 25},
        }
    if name == "dpo":
        return {
            "model": {"path": base},
            "data": {"train": [str(files.preferences)], "eval": [str(files.preferences_held_out)], "max_length": 128},
            "batch": batch | {"sequences": 32},
            "dpo": {"beta": 0.2, "sft_weight": 5.0},
            "optimizer": {"lr": 3e-4, "warmup": 0.1},
            "run": run | {"epochs": 1, "eval_every": 25},
        }
    return {
        "model": {"path": base},
        "data": {"train": [str(files.prompts)], "ptx": [str(files.sft)], "format": "prompt", "max_length": 128},
        "reward": {"model": str(folder / "reward" / "model")},
        "rollout": {"prompts": 64, "samples": 1, "running": 64},
        "sampling": {"max_new_tokens": 40},
        "ppo": {"kl_coefficient": 0.4, "ptx_coefficient": 0.2, "epochs": 2, "minibatches": 2, "no_stop_penalty": 1.0},
        "batch": batch,
        "critic": {"path": str(folder / "reward" / "model")},
        "optimizer": {"lr": 2e-4, "warmup": 0.1},
        "run": run | {"steps": 36},
    }


def write_config(folder: Path, name: str, config: Config) -> None:
    """The stage's config beside the data, for a person who wants to run it again or change it."""
    place = folder / "configs"
    place.mkdir(parents=True, exist_ok=True)
    save_config(config, place / f"{name}.yaml")


def judge(folder: Path, name: str, files: DemoFiles, records: list[dict[str, Any]], seed: int) -> Judged:
    """Lets the stage's model answer every held-out prompt at temperature 1, and holds the answers against the ground truth."""
    config = {
        "model": {"path": str(folder / name / "model")},
        "data": {"eval": [str(files.prompts_held_out)], "format": "prompt", "max_length": 128},
        "sampling": {"temperature": 1.0, "max_new_tokens": 40},
        "run": {"output": str(folder / f"{name}-evaluate"), "seed": seed},
    }
    evaluate.run(from_any(STAGES["evaluate"], config))  # type: ignore[arg-type]
    lines = [json.loads(line) for line in (folder / f"{name}-evaluate" / "samples.jsonl").read_text("utf-8").splitlines()]
    samples = [
        {"prompt": record["prompt"], "response": line["response"], "preferred": preferred(said), "correct": correct(record, said)}
        for record, line in zip(records, lines, strict=True)
        for said in [line["response"].strip()]
    ]
    share = {what: 100 * sum(s[what] for s in samples) / len(samples) for what in ("preferred", "correct")}
    return Judged(share["preferred"], share["correct"], samples)


def last_line(path: Path, split: str) -> dict[str, Any]:
    """The newest line of a log for `split`."""
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    found: dict[str, Any] = [line for line in lines if line["split"] == split][-1]
    return found


def table(summary: dict[str, Any]) -> Table:
    """The result as a person reads it in a terminal."""
    found = Table(title="held-out prompts, judged by the ground truth")
    for column in ("stage", "preferred manner %", "correct %", "seconds"):
        found.add_column(column, justify="left" if column == "stage" else "right")
    for name, row in summary["stages"].items():
        found.add_row(name, f"{row['preferred']:.1f}", f"{row['correct']:.1f}", f"{row['seconds']:.0f}")
    found.caption = (
        f"reward model: {summary['reward_accuracy']:.1f} % of held-out pairs right; "
        f"{summary['seconds']:.0f} s, {summary['peak_memory_mb']} MiB at most"
    )
    return found
