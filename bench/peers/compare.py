"""trueline beside TRL on the same model, records and step size. One rule: equal losses first, then alternating runs.

`python bench/peers/compare.py --environment DIR [--rounds N] [--steps N] [--threads N] [--only NAME]`; `make bench-peers` makes the
environment (TRL 1.16) and calls this. Prints a JSON line for each reading and ends with a table: tokens per second of the steps after the
first, the median and the spread over rounds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from material import SIZES, draw_records, write_model, write_records

HERE = Path(__file__).parent
SIZE = 8
EQUAL = 2e-5  # relative, on the losses of the first two steps, float32


@dataclass(frozen=True)
class Case:
    """One comparison: what each side is called with. `exact`: both compute in float32, so the losses must be equal."""

    name: str
    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    exact: bool = True


CASES = (
    Case("sft full", ("sft",), ("sft",)),
    Case("sft lora", ("sft", "--lora"), ("sft", "--lora")),
    Case("sft full, batches of 1", ("sft",), ("sft", "--batch", "1", "--no-checkpointing")),
    Case("reward", ("reward",), ("reward",)),
    Case("reward, batches of 1", ("reward",), ("reward", "--batch", "1", "--no-checkpointing")),
    Case("dpo, reference in every step", ("dpo", "--online"), ("dpo",)),
    Case("dpo, reference before", ("dpo",), ("dpo", "--precompute")),
    Case("dpo, reference in every step, batches of 1", ("dpo", "--online"), ("dpo", "--batch", "1", "--no-checkpointing")),
    Case("sft full, ours in auto", ("sft", "--dtype", "auto"), ("sft",), exact=False),
    Case("sft full, both in bfloat16", ("sft", "--dtype", "bfloat16"), ("sft", "--bfloat16"), exact=False),
)


def tokens_of(stage: str, records: list[dict[str, list[int]]], step: int) -> int:
    """Real tokens of a step."""
    sides = ("chosen",) if stage == "sft" else ("chosen", "rejected")
    return sum(len(r["prompt"]) + len(r[side]) for r in records[step * SIZE : (step + 1) * SIZE] for side in sides)


def read(command: list[str], threads: int) -> dict[str, Any]:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def rate(case: Case, reading: dict[str, Any], records: list[dict[str, list[int]]]) -> float:
    """Real tokens per second, the first step left out."""
    steps = range(1, len(reading["seconds"]))
    return sum(tokens_of(case.ours[0], records, s) for s in steps) / sum(reading["seconds"][s] for s in steps)


def compare(case: Case, place: Path, theirs: Path, given: argparse.Namespace, records: list[dict[str, list[int]]]) -> dict[str, Any]:
    sides: dict[str, list[float]] = {"ours": [], "theirs": []}
    peaks: dict[str, int] = {}
    for turn in range(given.rounds):
        losses: dict[str, list[float]] = {}
        for side in ("ours", "theirs") if turn % 2 == 0 else ("theirs", "ours"):
            script = "our_side.py" if side == "ours" else "trl_side.py"
            python = sys.executable if side == "ours" else str(theirs / "bin" / "python")
            reading = read([python, str(HERE / script), *getattr(case, side)[:1], str(place / "model"), str(place / "records.json"),
                            *getattr(case, side)[1:]], given.threads)  # fmt: skip
            sides[side].append(rate(case, reading, records))
            losses[side], peaks[side] = reading["losses"], reading["peak_mb"]
            line = {"bench": "peers", "case": case.name, "side": side, "tokens_per_second": sides[side][-1], "load1": os.getloadavg()[0]}
            print(json.dumps(line | {k: reading[k] for k in ("peak_mb", "losses", "versions")}), flush=True)
        apart = max(abs(a - b) / abs(b) for a, b in zip(losses["ours"][:2], losses["theirs"][:2], strict=True))
        if case.exact and apart > EQUAL:
            sys.exit(f"{case.name}: losses differ by {apart:.2g}, so nothing is compared: {losses}")
    ours, peer = (statistics.median(sides[side]) for side in ("ours", "theirs"))
    spread = max((max(v) - min(v)) / statistics.median(v) for v in sides.values())
    return {"case": case.name, "ours": ours, "theirs": peer, "ratio": ours / peer, "spread": spread, "peaks": peaks}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--environment", type=Path, required=True, help="a virtual environment with TRL 1.16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_model(place / "model")
        count, vocabulary = given.steps * SIZE, SIZES["vocab_size"]
        write_records(place / "records.json", count, vocabulary)
        records = draw_records(count, vocabulary)
        rows = [compare(case, place, given.environment, given, records) for case in CASES if given.only in case.name]
    print("\n| case | trueline, tokens/s | TRL, tokens/s | ratio | spread | peak MB, trueline | peak MB, TRL |")
    print("|---|---|---|---|---|---|---|")
    for r in rows:
        print(f"| {r['case']} | {r['ours']:,.0f} | {r['theirs']:,.0f} | {r['ratio']:.2f} | {r['spread']:.0%} "
              f"| {r['peaks']['ours']:,} | {r['peaks']['theirs']:,} |")  # fmt: skip


if __name__ == "__main__":
    main()
