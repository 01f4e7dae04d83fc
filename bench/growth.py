"""SFT as the data grows: speed of a fixed number of steps and memory of the input path, for 1,000, 10,000 and 100,000 records.

Records are `bench/cache.py`'s, the model the demo's with random weights. Every size runs in a process of its own, in turns; the first run
of a size makes its token cache and is not counted. Prints JSON lines; the last one says how flat both are.
`python bench/growth.py [--sizes 1000,10000,100000] [--rounds N] [--steps N]`
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cache import memory, write_records

from trueline.config.schema import AdapterConfig, DataConfig, ModelConfig, OptimizerConfig
from trueline.data.stream import plan, step_indices
from trueline.model.batch import pack
from trueline.model.heads import LanguageModel
from trueline.parallel.world import World
from trueline.recipes.assemble import open_model, train_role
from trueline.recipes.demo_data import write_demo
from trueline.recipes.prepare import sft_samples
from trueline.recipes.sft import count_tokens, sft_objective
from trueline.train.optimizer import make_optimizer
from trueline.train.step import train_step

PER_STEP, MAX_TOKENS = 16, 4096
FLAT, FLAT_MB = 0.05, 8.0  # speed may differ by so much of the smallest size's; memory by so many MB


def child(model: str, data: str, folder: str, steps: int) -> None:
    opened = open_model(ModelConfig(path=model, dtype="float32", init="random"), 0)
    role, parameters = train_role(opened, AdapterConfig(), "policy", 0)
    objective, optimizer = sft_objective(LanguageModel(opened.decoder, role)), make_optimizer(parameters, OptimizerConfig())
    before, began = memory("RssAnon"), time.perf_counter()
    found = sft_samples(DataConfig(train=(data,), cache=folder), opened.folder.family, opened.text(), 0)
    seconds = time.perf_counter() - began
    chosen = [[found.train[i] for i in step_indices(0, step, len(found.train), PER_STEP, None)] for step in range(steps)]
    held = memory("RssAnon")  # mapped files are not counted: the kernel may take their pages back
    tokens, worked = 0, time.process_time()
    began = time.perf_counter()
    for step, items in enumerate(chosen):
        batches = [pack([items[i] for i in part]) for part in plan([len(s) for s in items], MAX_TOKENS)[0] if part]
        settings = {"world": World(), "max_norm": 1.0, "lr": 1e-4, "step": step + 1, "seed": step}
        train_step(optimizer, batches, objective, count_tokens, **settings)
        tokens += sum(map(len, items))
    wall, processor = time.perf_counter() - began, time.process_time() - worked
    row = {"bench": "growth", "records": len(found.train), "made": found.files[data].made, "prepare_seconds": seconds, "steps": steps}
    row |= {"tokens": tokens, "tokens_per_second": tokens / wall, "tokens_per_processor_second": tokens / processor}
    print(json.dumps(row | {"input_mb": (held - before) / 1024, "peak_mb": memory("VmHWM") / 1024, "load": os.getloadavg()[0]}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1000,10000,100000")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(*given.child, given.steps)
        return
    settings = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    readings: dict[int, list[dict[str, float]]] = {int(size): [] for size in given.sizes.split(",")}
    with tempfile.TemporaryDirectory() as home:
        model = str(write_demo(Path(home), 0).model)
        for size in readings:
            write_records(Path(home) / f"{size}.jsonl", size)
        for turn in range(given.rounds + 1):
            for size, found in readings.items():
                command = [sys.executable, __file__, "--steps", str(given.steps), "--child", model, f"{home}/{size}.jsonl", f"{home}/cache"]
                line = subprocess.run(command, check=True, env=settings, stdout=subprocess.PIPE, text=True).stdout.strip().splitlines()[-1]
                print(line, flush=True)
                if turn:
                    found.append(json.loads(line))

    def medians(name: str) -> list[float]:
        return [statistics.median(r[name] for r in found) for found in readings.values()]

    # of processor time: says the same on a machine that others use, where the wall clock does not
    speeds, inputs = medians("tokens_per_processor_second"), medians("input_mb")
    change, growth = speeds[-1] / speeds[0] - 1, inputs[-1] - inputs[0]
    summary = {"bench": "growth", "sizes": list(readings), "tokens_per_processor_second": speeds, "input_mb": inputs}
    summary |= {"tokens_per_second": medians("tokens_per_second"), "speed_change": change, "memory_change_mb": growth}
    print(json.dumps(summary | {"flat": abs(change) <= FLAT and growth <= FLAT_MB}))


if __name__ == "__main__":
    main()
