"""What every side of the comparison trains on: one random model, and records of alpaca-like lengths. Needs torch and transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

# 25 million parameters: 16.9 in the blocks, 8.4 in embedding and head
SIZES: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}


def write_model(folder: Path, **changes: Any) -> Path:
    """A random Qwen2 in float32, as transformers saves it."""
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES | changes)).save_pretrained(folder)
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
