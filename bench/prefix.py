"""DPO with prompts run once for both answers beside the plain path, on a random Qwen2 of 25 million weights. One rule: equal first.

The reading is the speed-up over its bound (2P + C + R) / (P + C + R). The two sides take turns in one process; processor time is beside
wall time, for a machine that others use. One JSON line per case, and the plain side's halves against each other as the spread.

`python bench/prefix.py [--rounds N] [--threads N] [--pairs N] [--dtype float32|bfloat16]`
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence

import torch

from trueline.config.schema import DpoConfig, OptimizerConfig
from trueline.data.sample import Pair, Sample
from trueline.data.shared import bound, shared_pairs
from trueline.model.decoder import Decoder, DecoderConfig, init_weights
from trueline.model.heads import LanguageModel
from trueline.parallel.world import World
from trueline.recipes.dpo import Judged, count_items, dpo_objective, pack_judged
from trueline.train.optimizer import make_optimizer
from trueline.train.step import train_step

VOCABULARY = 8192
CASES = {"long prompts": (400, 60, 60), "equal thirds": (170, 170, 170), "CValues with ChatML": (35, 145, 178)}  # P, C, R
EQUAL = {"float32": 1e-4, "bfloat16": 3e-2}  # relative: loss and gradient norm of the first step


def drawn_pairs(prompt: int, chosen: int, rejected: int, count: int) -> list[Pair]:
    draw = torch.Generator().manual_seed(0)
    pairs = []
    for _ in range(count):
        begin, *answers = (torch.randint(0, VOCABULARY, (n,), generator=draw).tolist() for n in (prompt, chosen, rejected))
        pairs.append(Pair(*(Sample(begin + a, [False] * prompt + [True] * len(a)) for a in answers)))
    return pairs


class Side:
    """One model, trained on the same pairs in every step."""

    def __init__(self, dtype: torch.dtype, pairs: Sequence[Pair]):
        sizes = {"hidden_size": 448, "head_dim": 64, "num_heads": 7, "num_kv_heads": 1, "num_layers": 8, "mlp_size": 1536}
        decoder = Decoder(DecoderConfig(vocab_size=VOCABULARY, tied_embeddings=True, **sizes))
        init_weights(decoder, torch.Generator().manual_seed(0))
        decoder.to(dtype)
        self.parameters = sum(p.numel() for p in decoder.parameters())
        self.optimizer = make_optimizer(dict(decoder.named_parameters()), OptimizerConfig())
        self.objective = dpo_objective(LanguageModel(decoder), DpoConfig(sft_weight=1.0))
        self.batch = pack_judged([Judged(pair, torch.tensor([-100.0, -100.0])) for pair in pairs])
        self.wall: list[float] = []
        self.processor: list[float] = []

    def update(self) -> dict[str, float]:
        began, spent = time.perf_counter(), time.process_time()
        settings = {"world": World(), "max_norm": 1.0, "lr": 1e-6, "step": 1, "seed": 0}
        values = train_step(self.optimizer, [self.batch], self.objective, lambda b: count_items(b, DpoConfig(sft_weight=1.0)), **settings)
        self.wall.append(time.perf_counter() - began)
        self.processor.append(time.process_time() - spent)
        return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--dtype", choices=EQUAL, default="float32")
    parser.add_argument("--case", choices=CASES, nargs="+", default=[*CASES])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.case:
        pairs = drawn_pairs(*CASES[name], arguments.pairs)
        shared = shared_pairs(pairs)
        plain, once = (Side(getattr(torch, arguments.dtype), items) for items in (pairs, shared))
        first, second = plain.update(), once.update()  # also the warm-up
        gap = max(abs(first[x] / second[x] - 1) for x in ("loss", "grad_norm"))
        if gap > EQUAL[arguments.dtype]:
            raise SystemExit(f"{name}: the sides differ by {gap:.1e} relative, expected at most {EQUAL[arguments.dtype]}")
        for _ in range(arguments.rounds):
            plain.update()
            once.update()
        wall, busy = (statistics.median(getattr(plain, x)[1:]) / statistics.median(getattr(once, x)[1:]) for x in ("wall", "processor"))
        halves = [statistics.median(plain.processor[start::2]) for start in (1, 2)]
        row = {"bench": "prefix", "case": name, "lengths": CASES[name], "pairs": len(pairs), "dtype": arguments.dtype, "gap": gap}
        row |= {"parameters": plain.parameters, "bound": bound(shared), "ratio": wall, "of_bound": wall / bound(shared)}
        row |= {"processor_ratio": busy, "processor_of_bound": busy / bound(shared), "spread": abs(halves[0] / halves[1] - 1)}
        row |= {"seconds_plain": plain.wall[1:], "seconds_shared": once.wall[1:], "threads": arguments.threads}
        print(json.dumps(row | {"load": os.getloadavg()[0]}), flush=True)


if __name__ == "__main__":
    main()
