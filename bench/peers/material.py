"""The models and records that every side of the comparison runs on. Needs torch, transformers and numpy."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from sides import SIZES


def write_model(folder: Path, **changes: Any) -> Path:
    """A random Qwen2 in float32, as transformers saves it."""
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES | changes)).save_pretrained(folder)
    return folder


def write_scorer(folder: Path, seed: int, **changes: Any) -> Path:
    """A random sequence classifier of one score, whose head is not zero."""
    torch.manual_seed(seed)
    transformers.Qwen2ForSequenceClassification(transformers.Qwen2Config(**SIZES | changes, num_labels=1)).save_pretrained(folder)
    return folder


def draw_records(count: int, vocabulary: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Prompts of about 30 tokens, answers log-normal around 95 and at most 530: the lengths of a published Chinese alpaca sample.

    `rejected` is a second answer, of its own length.
    """
    draw = np.random.default_rng(seed)

    def tokens(length: float) -> list[int]:
        return draw.integers(2, vocabulary, max(2, int(length))).tolist()

    def answer() -> list[int]:
        return tokens(np.clip(np.exp(draw.normal(np.log(95), 1.0)), 4, 530)) + [1]

    return [{"prompt": tokens(np.exp(draw.normal(np.log(30), 0.25))), "chosen": answer(), "rejected": answer()} for _ in range(count)]


def write_records(path: Path, count: int, vocabulary: int) -> Path:
    path.write_text(json.dumps(draw_records(count, vocabulary)), encoding="utf-8")
    return path
