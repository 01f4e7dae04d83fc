"""How fast `trueline check` reads a long file, and in how much memory: a million short records by default. Prints JSON lines."""

import argparse
import contextlib
import io
import json
import resource
import tempfile
import time
from pathlib import Path

from trueline.recipes.check import check

LAYOUTS = {
    "columns": lambda i: {"prompt": f"What is {i} plus {i % 7}?", "response": f"The sum is {i + i % 7}."},
    "alpaca": lambda i: {"instruction": f"Add {i} and {i % 7}.", "input": "", "output": f"The sum is {i + i % 7}."},
    "messages": lambda i: {"messages": [{"role": "user", "content": f"{i} + 1?"}, {"role": "assistant", "content": f"It is {i + 1}."}]},
    "chinese": lambda i: {"prompt": f"{i}加{i % 7}等于多少？请直接回答。", "response": f"答案是{i + i % 7}，这是两个数的和。"},
}


def measure(layout: str, count: int, folder: Path) -> dict[str, object]:
    """One file, checked once; seconds are processor seconds of one core."""
    path = folder / f"{layout}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            file.write(json.dumps(LAYOUTS[layout](i), ensure_ascii=False) + "\n")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        check([str(path)], None, None)
    seconds = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = path.stat().st_size
    path.unlink()
    return {
        "layout": layout,
        "records": count,
        "file_mb": round(size / 1e6, 1),
        "seconds": round(seconds, 2),
        "records_per_second": round(count / seconds),
        "peak_mb": round(peak / 1024, 1),
        "peak_before_mb": round(before / 1024, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for layout in arguments.layouts:
            print(json.dumps(measure(layout, arguments.records, Path(folder))), flush=True)


if __name__ == "__main__":
    main()
