"""A peer's first PPO iteration on disk: what its own functions said of its answers. One rule: real tokens only, end to end."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Columns = dict[str, torch.Tensor]
"""`logprobs`, `ref_logprobs`, `values` over all answers' tokens, and one of `scores` for each answer."""


def write_columns(path: Path, prompts: list[list[int]], answers: list[list[int]], columns: Columns) -> None:
    tokens = [t for pair in zip(prompts, answers, strict=True) for part in pair for t in part]
    lengths = [[len(p), len(a)] for p, a in zip(prompts, answers, strict=True)]
    save_file({"tokens": torch.tensor(tokens), "lengths": torch.tensor(lengths)} | {n: c.contiguous() for n, c in columns.items()}, path)


def read_columns(path: Path) -> tuple[list[list[int]], list[list[int]], Columns]:
    """Prompts, answers and columns."""
    columns = load_file(path)
    lengths = columns.pop("lengths").flatten().tolist()
    parts = [part.tolist() for part in columns.pop("tokens").split(lengths)]
    return parts[0::2], parts[1::2], columns
