"""What every side of the comparison needs: sizes, PPO's prompts, and how it answers `compare.py`. It imports little: memory counts."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# 20 million parameters: 11.3 in the blocks, 8.4 in embedding and head
SIZES: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
SMALL: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4}
PUBLISHED = SMALL | {"vocab_size": 151_936}  # Qwen2's vocabulary
PPO = SMALL | {"vocab_size": 32_000}
PPO_ANSWERS, PPO_PROMPT, PPO_ANSWER = 16, 32, 64  # answers an iteration, tokens of a prompt, most tokens of an answer
STOP, STOP_RATE = 1, 1 / 32  # the token that ends an answer, and how probable it is after any other
SIZE = 8  # records (or pairs) a step, on every side


def draw_prompts(count: int, varied: bool) -> list[list[int]]:
    """PPO's prompts: all of one length, so that nobody pads, or log-normal around that, as `draw_records` has them."""
    draw = np.random.default_rng(1)
    lengths = np.exp(draw.normal(np.log(PPO_PROMPT), 0.25, count)) if varied else np.full(count, PPO_PROMPT)
    return [draw.integers(2, PPO["vocab_size"], max(2, int(length))).tolist() for length in lengths]


def serve(run: Callable[[], dict[str, Any]]) -> None:
    """Runs once for each line on the standard input, and answers with a line of JSON. What else is printed goes to standard error."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    base = peak_mb()  # Python and the libraries
    for _ in sys.stdin:
        began = time.perf_counter()
        found = run()
        found |= {"peak_mb": peak_mb(), "base_mb": base, "whole": time.perf_counter() - began}
        replies.write(json.dumps(found) + "\n")
        replies.flush()


def serve_ppo(train: Callable[[argparse.Namespace], dict[str, Any]]) -> None:
    """`serve` for a PPO side."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("iterations", type=int, help="of a reading")
    parser.add_argument("--epochs", type=int, default=1, help="passes over an iteration's answers, each of one update")
    parser.add_argument("--varied", action="store_true", help="lengths as people have them: prompts differ, and a stop token ends answers")
    parser.add_argument("--columns", type=Path, nargs="+", required=True, help="peers' first iterations: each writes its own")
    parser.add_argument("--dtype", default="float32", help="ours: of the weights and the arithmetic")
    parser.add_argument("--batch", type=int, default=PPO_ANSWERS, help="TRL's: answers of a micro-batch")
    given = parser.parse_args()
    serve(lambda: train(given))


def peak_mb() -> int:
    """Most memory so far. Not `ru_maxrss`: that begins at the memory of the process that started this one."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) // 1024
