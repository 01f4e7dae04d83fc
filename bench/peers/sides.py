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

# 18 million parameters: 9.6 in the blocks, 8.4 in embedding and head
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
PPO_ANSWERS, PPO_PROMPT, PPO_ANSWER = 16, 32, 64  # answers an iteration, tokens of each prompt, tokens of each answer
SIZE = 8  # records (or pairs) a step, on every side


def draw_prompts(count: int, vocabulary: int) -> list[list[int]]:
    """PPO's prompts, all of one length, so that nobody pads."""
    return np.random.default_rng(1).integers(2, vocabulary, (count, PPO_PROMPT)).tolist()


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


def serve_ppo(train: Callable[[Path, int], dict[str, Any]]) -> None:
    """`serve` for a PPO side: its arguments are the folder and how many iterations a reading has."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("iterations", type=int)
    given = parser.parse_args()
    serve(lambda: train(given.folder, given.iterations))


def peak_mb() -> int:
    """Most memory so far. Not `ru_maxrss`: that begins at the memory of the process that started this one."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) // 1024
