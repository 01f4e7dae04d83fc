"""SFT steps of a random Qwen2 of 24 million weights in float32 and, where the CPU is fast in it, bfloat16. One rule: equal losses first.

Lengths are log-normal, as in instruction data; tokens are random. The two formats take turns, and the ratio of processor time is reported
beside that of wall time, for a machine that others use. One JSON line per reading.

`python bench/train.py [--rounds N] [--threads N] [--hidden N] [--dtypes float32 bfloat16]`
"""

import argparse
import json
import os
import statistics
import time

import torch

from trueline.config.schema import AdapterConfig, OptimizerConfig
from trueline.data.sample import Sample
from trueline.model.adapters import add_adapter, trainable
from trueline.model.batch import Batch, pack
from trueline.model.decoder import Decoder, DecoderConfig, init_weights
from trueline.model.heads import LanguageModel
from trueline.parallel.world import World, fast_bfloat16
from trueline.recipes.sft import count_tokens, sft_objective
from trueline.train.optimizer import make_optimizer
from trueline.train.step import train_step

VOCABULARY, RECORDS, PER_STEP = 8192, 64, 8
EQUAL = 2e-2  # relative; bfloat16
LORA = AdapterConfig(kind="lora")


def drawn_batches() -> list[Batch]:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randn(RECORDS, generator=draw).mul(0.6).add(4.6).exp().clamp(16, 700).int().tolist()
    tokens = [torch.randint(0, VOCABULARY, (n,), generator=draw).tolist() for n in lengths]
    samples = [Sample(ids, [i > len(ids) // 4 for i in range(len(ids))]) for ids in tokens]
    return [pack(sorted(samples[i : i + PER_STEP], key=len, reverse=True)) for i in range(0, RECORDS, PER_STEP)]


class Side:
    """One model in one number format."""

    def __init__(self, kind: str, dtype: torch.dtype, hidden: int):
        heads = max(1, hidden // 64)
        sizes = {"hidden_size": hidden, "head_dim": hidden // heads, "num_heads": heads, "num_kv_heads": 1, "num_layers": 8}
        decoder = Decoder(DecoderConfig(vocab_size=VOCABULARY, mlp_size=hidden * 24 // 7, tied_embeddings=True, **sizes))
        init_weights(decoder, torch.Generator().manual_seed(0))
        decoder.to(dtype)
        role = None if kind == "full" else "policy"
        if role is not None:
            add_adapter(decoder, role, LORA, 0)
        self.parameters = sum(p.numel() for p in decoder.parameters())
        self.optimizer = make_optimizer(trainable(decoder, role, "full" if role is None else "lora"), OptimizerConfig())
        self.objective = sft_objective(LanguageModel(decoder, role))

    def update(self, batch: Batch) -> float:
        settings = {"world": World(), "max_norm": 1.0, "lr": 1e-5, "step": 1, "seed": 0}
        return train_step(self.optimizer, [batch], self.objective, count_tokens, **settings)["loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--hidden", type=int, default=448)
    known = ["float32", "bfloat16"]
    parser.add_argument("--dtypes", nargs="+", choices=known, default=known if fast_bfloat16() else known[:1], help="float32 among them")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    batches = drawn_batches()
    tokens = sum(len(batch.tokens) for batch in batches)
    for kind in ("full", "lora"):
        sides = {name: Side(kind, getattr(torch, name), arguments.hidden) for name in arguments.dtypes}
        losses = {name: [side.update(batch) for batch in batches] for name, side in sides.items()}  # also the warm-up
        gap = max(abs(a - b) / a for found in losses.values() for a, b in zip(losses["float32"], found, strict=True))
        if gap > EQUAL:
            raise SystemExit(f"{kind}: losses differ by {gap:.1e} relative, expected at most {EQUAL}")
        wall: dict[str, list[float]] = {name: [] for name in sides}
        processor: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(arguments.rounds):
            for name, side in sides.items():
                began, spent = time.perf_counter(), time.process_time()
                for batch in batches:
                    side.update(batch)
                wall[name].append(time.perf_counter() - began)
                processor[name].append(time.process_time() - spent)
        for name, side in sides.items():
            middle, busy = statistics.median(wall[name]), statistics.median(processor[name])
            row = {"bench": "train", "stage": "sft", "kind": kind, "dtype": name, "parameters": side.parameters, "tokens": tokens}
            row |= {"loss_gap": gap, "seconds_median": middle, "seconds_min": min(wall[name]), "seconds_max": max(wall[name])}
            row |= {"tokens_per_second": tokens / middle, "ratio": statistics.median(wall["float32"]) / middle}
            row |= {"processor_ratio": statistics.median(processor["float32"]) / busy, "threads": torch.get_num_threads()}
            print(json.dumps(row | {"rounds": arguments.rounds, "load": os.getloadavg()[0]}), flush=True)


if __name__ == "__main__":
    main()
