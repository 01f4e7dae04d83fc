"""trueline's stages on given tokens, through the recipes' own objectives and step. Answers `compare.py` like the other sides.

`python our_side.py STAGE MODEL RECORDS [--lora] [--online] [--compile] [--dtype NAME]`
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from sides import SIZE, serve

from trueline.config.load import from_any
from trueline.config.schema import AdapterConfig, DpoConfig, MeshConfig, ModelConfig, OptimizerConfig, RankingConfig, SftConfig
from trueline.data.sample import Pair, Sample
from trueline.data.stream import plan
from trueline.model.batch import pack, pack_pairs
from trueline.model.heads import LanguageModel
from trueline.parallel.world import start_alone
from trueline.recipes.assemble import make_scorer, open_model, settle_dtype, train_role
from trueline.recipes.dpo import Judged, count_items, dpo_objective, pack_judged
from trueline.recipes.reference import pair_logprobs
from trueline.recipes.reward import count_pairs, ranking_objective
from trueline.recipes.sft import count_tokens, sft_objective
from trueline.train.optimizer import make_optimizer
from trueline.train.step import train_step

MAX_TOKENS = 4096


def sample(record: dict[str, list[int]], side: str = "chosen") -> Sample:
    prompt, answer = record["prompt"], record[side]
    return Sample(prompt + answer, [False] * len(prompt) + [True] * len(answer))


def train(given: argparse.Namespace, records: list[dict[str, list[int]]]) -> dict[str, Any]:
    world = start_alone(MeshConfig())
    sections = {"model": {"path": given.model, "dtype": given.dtype}, "data": {"train": ["none"]}}
    sections |= {"run": {"output": given.records + ".run", "steps": 1}}
    dtype = settle_dtype(from_any(SftConfig, sections)).model.dtype  # what `auto` means is the stages' own rule
    opened = open_model(ModelConfig(path=given.model, dtype=dtype, compile=given.compile), 0, with_head=given.stage != "reward")
    role, parameters = train_role(opened, AdapterConfig(kind="lora" if given.lora else "full"), "policy", 0)
    model = LanguageModel(opened.decoder, role)
    began = time.perf_counter()
    items: Any
    if given.stage == "sft":
        items, packing, objective, count = [sample(r) for r in records], pack, sft_objective(model), count_tokens
    else:
        items = [Pair(sample(r), sample(r, "rejected")) for r in records]
        if given.stage == "reward":
            scorer = make_scorer(opened.decoder, role, None)
            parameters["score.weight"] = scorer.score.get_parameter("weight")
            packing, objective, count = pack_pairs, ranking_objective(scorer, RankingConfig()), count_pairs
        else:
            frozen = LanguageModel(opened.decoder, None if role else role)
            items = [Judged(p, row) for p, row in zip(items, pair_logprobs(frozen.eval(), items, MAX_TOKENS), strict=True)]
            settings = DpoConfig()
            packing, objective, count = pack_judged, dpo_objective(model, settings), lambda b: count_items(b, settings)
    prepared = time.perf_counter() - began
    optimizer = make_optimizer(parameters, OptimizerConfig(lr=1e-4))
    seconds, losses = [], []
    steps = len(items) // SIZE
    for step in range(steps):
        began = time.perf_counter()
        chosen = items[step * SIZE : (step + 1) * SIZE]
        batches = [packing([chosen[i] for i in part]) for part in plan([len(c) for c in chosen], MAX_TOKENS)[0] if part]
        values = train_step(optimizer, batches, objective, count, world=world, max_norm=1.0, lr=1e-4, step=step + 1, seed=step)
        # a reference pass belongs to each step of an online comparison
        seconds.append(time.perf_counter() - began + (prepared / steps if given.online else 0.0))
        losses.append(values["loss"])
    return {"seconds": seconds, "losses": losses, "dtype": dtype, "versions": {"torch": torch.__version__}}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("stage", choices=["sft", "reward", "dpo"])
    parser.add_argument("model")
    parser.add_argument("records")
    parser.add_argument("--dtype", default="float32")
    for flag in ("--lora", "--online", "--compile"):
        parser.add_argument(flag, action="store_true")
    given = parser.parse_args()
    records = json.loads(Path(given.records).read_text())
    serve(lambda: train(given, records))


if __name__ == "__main__":
    main()
