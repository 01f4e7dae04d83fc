"""How long a person waits: for `trueline --help`, and from typing `trueline sft` to the first finished step on a small model.

Writes the demo's data and model into a temporary folder. Prints JSON lines. `python bench/startup.py [--rounds N]`
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from trueline.recipes.demo_data import DemoFiles, write_demo

PATIENCE = 120.0  # seconds until a command counts as hanging
COMMAND = [sys.executable, "-m", "trueline"]


def spent() -> float:
    """Processor seconds of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def help_seconds() -> float:
    began = time.perf_counter()
    subprocess.run([*COMMAND, "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def first_step_seconds(files: DemoFiles, output: Path) -> float:
    """Until the first line stands in metrics.jsonl; the run is then ended."""
    settings = {"model.path": files.model, "model.init": "random", "data.train": files.sft, "run.output": output, "run.steps": 100000}
    log = output / "metrics.jsonl"
    began = time.perf_counter()
    command = [*COMMAND, "sft", *(f"{name}={value}" for name, value in settings.items())]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as run:
        while not (log.exists() and log.stat().st_size) and run.poll() is None and time.perf_counter() - began < PATIENCE:
            time.sleep(0.002)
        seconds = time.perf_counter() - began
        run.kill()
    if not (log.exists() and log.stat().st_size):
        raise SystemExit(f"no step within {seconds:.0f} s")
    return seconds


def report(what: str, measure: Callable[[int], float], rounds: int) -> None:
    before = spent()
    seconds = [measure(i) for i in range(rounds)]
    # processor time: says the same on a machine that others use, where the wall clock does not
    processor = (spent() - before) / rounds
    spread = {"seconds_median": statistics.median(seconds), "seconds_min": min(seconds), "seconds_max": max(seconds)}
    row = {"bench": "startup", "what": what, **spread, "processor_seconds_mean": processor, "rounds": rounds, "load": os.getloadavg()[0]}
    print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_demo(folder, 0)
        report("trueline --help", lambda i: help_seconds(), rounds)
        report("trueline sft to its first step", lambda i: first_step_seconds(files, folder / f"run{i}"), rounds)


if __name__ == "__main__":
    main()
