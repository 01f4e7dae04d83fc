"""Tokenising and caching short records: records a second, memory at growing sizes, an epoch of reading, and the time of a cache hit.

Writes instruction records of 20 to 60 common words and runs every size in a process of its own, in one thread. Prints JSON lines.
`python bench/cache.py [MODEL_FOLDER] [--sizes 1000,10000,100000]`; the folder has config.json and tokenizer files (default: the demo's).
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from trueline.config.schema import DataConfig, ModelConfig
from trueline.data.cache import items_fingerprint
from trueline.recipes.assemble import open_text
from trueline.recipes.demo_data import write_demo
from trueline.recipes.prepare import sft_samples

WORDS = (
    "the of and to in is that for it as with was on be by this are from or an at which have not you they their has more we can one will"
    " about when people other how what some time each make would into them many water world explain write example sentence describe give"
    " list short story number difference between data system good help important health energy language change different information"
    " process include such also should using provide create following"
).split()


def write_records(path: Path, count: int) -> None:
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            asked, answered = (" ".join(draw.choices(WORDS, k=draw.randint(*size))) for size in ((5, 15), (15, 45)))
            file.write(json.dumps({"instruction": f"{asked.capitalize()}.", "input": "", "output": f"{answered.capitalize()}."}) + "\n")


def memory(name: str) -> int:
    """kB: `VmHWM` most in memory so far; now `RssAnon` of its own, `RssFile` of mapped files, which the kernel may take back."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def child(model: str, data: str, folder: str) -> None:
    family, tokenizer = open_text(ModelConfig(path=model))
    start = {name: memory(name) for name in ("VmHWM", "RssAnon")}
    config = DataConfig(train=(data,), cache=folder)
    began, worked = time.perf_counter(), time.process_time()
    found = sft_samples(config, family, tokenizer, 0)
    seconds, processor = time.perf_counter() - began, time.process_time() - worked
    after = {name: memory(name) for name in ("VmHWM", "RssAnon", "RssFile")}
    began = time.perf_counter()
    tokens = sum(len(found.train[i]) for i in range(len(found.train)))
    epoch = time.perf_counter() - began
    began = time.perf_counter()
    items_fingerprint(found.train)
    row = {"records": len(found.train), "tokens": tokens, "made": found.files[data].made}
    row |= {"seconds": seconds, "processor_seconds": processor}
    row |= {"records_per_second": len(found.train) / seconds, "records_per_processor_second": len(found.train) / processor}
    row |= {"epoch_tokens_per_second": tokens / epoch, "fingerprint_seconds": time.perf_counter() - began}
    row |= {"kb_before": start, "kb_prepared": after, "kb_after_epoch": {name: memory(name) for name in after}, "load": os.getloadavg()[0]}
    print(json.dumps({"bench": "cache", **row}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--sizes", default="1000,10000,100000")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.model, *given.child)
        return
    settings = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as home:
        model = given.model or str(write_demo(Path(home), 0).model)
        for size in map(int, given.sizes.split(",")):
            data = Path(home) / f"{size}.jsonl"
            write_records(data, size)
            command = [sys.executable, __file__, model, "--child", str(data), f"{home}/cache"]
            for _ in range(2):  # made, then found
                subprocess.run(command, check=True, env=settings)


if __name__ == "__main__":
    main()
