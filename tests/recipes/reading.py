"""What a run left in its folder, read back for a test."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trueline.config.load import load_config
from trueline.config.schema import STAGES
from trueline.data.sample import sample_of
from trueline.model.batch import pack
from trueline.model.heads import LanguageModel
from trueline.recipes.assemble import make_scorer, open_model, train_role
from trueline.train import checkpoint

PROBES = [[40, 41, 42, 43, 44, 45, 46, 47, 48], [60, 61, 2, 3, 62, 63, 4], [90, 91, 300, 92, 280], [100, 17]]  # packed in this order


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def metrics(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    return [line for line in records(folder / "metrics.jsonl") if line["split"] == split]


def status(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text("utf-8"))
    return found


@torch.no_grad()
def trained(folder: Path, stage: str) -> Tensor:
    """Log-probabilities of the probes (a reward model: scores) by the model as the newest checkpoint has it, before it was published."""
    config: Any = load_config(STAGES[stage], [folder / "config.yaml"])
    opened = open_model(config.model, config.run.seed, with_head=stage != "reward")
    role, parameters = train_role(opened, config.model.adapter, "policy", config.run.seed)
    found, _ = checkpoint.newest(folder)
    assert found is not None
    saved = checkpoint.load(found)[0]["policy" if stage == "ppo" else "model"]
    for name, parameter in parameters.items():
        parameter.copy_(saved[name])
    batch = pack([sample_of(tokens, [True] * len(tokens), opened.decoder.config.blocks) for tokens in PROBES])
    if stage == "reward":
        return make_scorer(opened.decoder, role, saved["score.weight"])(batch)[batch.ends()]
    return LanguageModel(opened.decoder, role)(batch)
