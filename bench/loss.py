"""Cross entropy of a vocabulary head, forward and backward: naive, our two, and with `--torch` PyTorch's chunked one where it has it.

One rule: equal first. Ours: the sum, as SFT and PPO use it (`trueline`), and one value for each row, as DPO does (`trueline rows`: slopes
are not known before the backward pass). With `--frozen` the head's weight has no gradient, as under LoRA. Every side runs in a process of
its own, which reads its peak of resident memory above what it held before (Linux), in the first round. Sides take turns by round; processor
time is beside wall time, for a machine that others use. One JSON line per reading, then a table.

`python bench/loss.py [--rounds N] [--threads N] [--tokens N] [--vocabulary N] [--hidden N ...] [--frozen] [--torch]`. `--torch` takes
minutes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from trueline.model.heads import LinearLogProbability, LinearLoss, likelihood

EQUAL = 1e-4  # relative, float32: loss and norms of both gradients

SIDES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "naive": lambda hidden, weight, target: F.cross_entropy(hidden @ weight.T, target),
    "trueline": lambda hidden, weight, target: -LinearLoss.apply(hidden, weight, target, 1.0, likelihood)[0] / len(target),
    "trueline rows": lambda hidden, weight, target: -LinearLogProbability.apply(hidden, weight, target, 1.0).mean(),
}
if hasattr(torch.nn, "LinearCrossEntropyOptions"):
    SIDES["torch"] = partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions())  # without options it is the naive one


def memory(field: str) -> int:
    """MiB of this process: VmRSS now, VmHWM at its peak since it was last reset."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) // 1024


def serve(side: str, tokens: int, vocabulary: int, hidden: int, frozen: bool) -> None:
    """Does a round for each line on standard input, and prints what it read."""
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(tokens, hidden, generator=draw).requires_grad_()
    weight = (torch.randn(vocabulary, hidden, generator=draw) / hidden**0.5).requires_grad_(not frozen)
    target = torch.randint(0, vocabulary, (tokens,), generator=draw)
    SIDES[side](states[:8], weight[:64], target[:8] % 64).backward()  # loads what the first call loads
    for _ in sys.stdin:
        states.grad = weight.grad = None
        Path("/proc/self/clear_refs").write_text("5")
        before, began, spent = memory("VmRSS"), time.perf_counter(), time.process_time()
        loss = SIDES[side](states, weight, target)
        loss.backward()
        seconds, processor = time.perf_counter() - began, time.process_time() - spent
        same = [loss.item(), *(x.grad.norm().item() for x in (states, weight) if x.grad is not None)]
        assert len(same) == 3 - frozen
        print(json.dumps({"seconds": seconds, "processor": processor, "mib": memory("VmHWM") - before, "same": same}), flush=True)


def compare(hidden: int, sides: list[str], arguments: argparse.Namespace) -> list[dict[str, object]]:
    """A row for each side at one hidden size."""
    sizes = ["--tokens", str(arguments.tokens), "--vocabulary", str(arguments.vocabulary), "--hidden", str(hidden)]
    command = [sys.executable, __file__, *sizes, "--threads", str(arguments.threads), *["--frozen"] * arguments.frozen, "--side"]
    children = {side: subprocess.Popen([*command, side], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for side in sides}
    read: dict[str, list[dict[str, float | list[float]]]] = {side: [] for side in sides}
    for _ in range(arguments.rounds + 1):  # the first for equality and memory, not for time
        for side, child in children.items():
            assert child.stdin is not None and child.stdout is not None
            child.stdin.write("\n")
            child.stdin.flush()
            read[side].append(json.loads(child.stdout.readline()))
        naive = read["naive"][0]["same"]
        gaps = {s: max(abs(a / b - 1) for a, b in zip(read[s][0]["same"], naive, strict=True)) for s in sides}  # type: ignore[arg-type]
        if max(gaps.values()) > EQUAL:
            raise SystemExit(f"hidden {hidden}: relative differences from naive {gaps}, expected at most {EQUAL}")
    for child in children.values():
        child.communicate()
    rows = []
    for side in sides:
        seconds = statistics.median(x["seconds"] for x in read[side][1:])  # type: ignore[type-var]
        rows.append({"bench": "loss", "side": side, "hidden": hidden, "seconds_median": seconds, "peak_mib": read[side][0]["mib"]})
        rows[-1] |= {"processor_median": statistics.median(x["processor"] for x in read[side][1:])}  # type: ignore[type-var]
        rows[-1] |= {"gap": gaps[side], "seconds": [x["seconds"] for x in read[side][1:]], "threads": arguments.threads}
        rows[-1] |= {"tokens": arguments.tokens, "vocabulary": arguments.vocabulary, "frozen": arguments.frozen, "load": os.getloadavg()[0]}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=151_552)
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--frozen", action="store_true", help="no gradient for the head's weight")
    parser.add_argument("--torch", action="store_true", help="PyTorch's F.linear_cross_entropy in chunks, too")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.side:
        serve(arguments.side, arguments.tokens, arguments.vocabulary, arguments.hidden[0], arguments.frozen)
        return
    rows = []
    for hidden in arguments.hidden:
        found = compare(hidden, [side for side in SIDES if side != "torch" or arguments.torch], arguments)
        rows += found
        for row in found:
            print(json.dumps(row), flush=True)
    print("| hidden | side | seconds | of naive's | processor time, of naive's | peak MiB | of naive's |\n|---|---|---|---|---|---|---|")
    naive = {row["hidden"]: row for row in rows if row["side"] == "naive"}
    for row in rows:
        base = naive[row["hidden"]]
        wall, busy, peak = (row[x] / base[x] for x in ("seconds_median", "processor_median", "peak_mib"))  # type: ignore[operator]
        shown = f"{row['seconds_median']:.2f} | {wall:.2f} | {busy:.2f} | {row['peak_mib']} | {peak:.3f}"
        print(f"| {row['hidden']} | {row['side']} | {shown} |")


if __name__ == "__main__":
    main()
