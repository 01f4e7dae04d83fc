"""A step of DPO with a supervised term on a toy model; run as a program it is one of two ranks and prints its gradients as JSON."""

import json
import random
from dataclasses import replace

import torch
from torch import Tensor

from trueline.config.schema import MeshConfig, OptimizerConfig
from trueline.data.sample import Pair, Sample
from trueline.model.adapters import trainable
from trueline.model.batch import Batch, pack_pairs
from trueline.model.decoder import Decoder, DecoderConfig, init_weights
from trueline.model.heads import LanguageModel
from trueline.parallel.world import World, start, stop
from trueline.train.losses import dpo_loss
from trueline.train.optimizer import Optimizer
from trueline.train.step import Losses, Totals, train_step

SIZES = DecoderConfig(vocab_size=31, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, mlp_size=24)
SHARES = [[[0, 5], [1, 2]], [[3], [4]]]  # [rank][micro-batch] -> pairs


class Kept(Optimizer):
    """Remembers the gradients it was stepped with, before they were scaled down."""

    last: dict[str, Tensor]

    def step(self, lr: float, only: str | None = None, scale: Tensor | None = None) -> None:
        self.last = {name: g.to_dense().clone() for name, g in self.gradients().items()}
        super().step(lr, only, scale)


def pairs() -> list[Pair]:
    draw = random.Random(5)

    def side() -> Sample:
        prompt, answer = draw.randint(1, 6), draw.randint(1, 9)
        return Sample([draw.randrange(31) for _ in range(prompt + answer)], [False] * prompt + [True] * answer)

    return [Pair(side(), side()) for _ in range(6)]


def partition(items: list[Pair], homes: list[int]) -> list[list[Pair]]:
    """Items by the micro-batch they are at home in; empty ones left out."""
    parts = [[item for item, home in zip(items, homes, strict=True) if home == wanted] for wanted in range(max(homes) + 1)]
    return [part for part in parts if part]


def gradients(
    batches: list[list[Pair]], world: World, sparse: bool = True, tied: bool = False
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The gradient of a fresh float64 model's first step, and the step's metrics. `sparse`: the embedding's is made by rows."""
    decoder = Decoder(replace(SIZES, tied_embeddings=tied)).double()
    init_weights(decoder, torch.Generator().manual_seed(3))
    model = LanguageModel(decoder)

    def objective(batch: Batch) -> tuple[Losses, Totals]:
        logprobs = model(batch)
        sums = batch.per_sequence(logprobs)
        losses = dpo_loss(sums[0::2], sums[1::2], torch.full_like(sums[0::2], -9.0), torch.full_like(sums[1::2], -8.0), beta=0.3)
        chosen = torch.tensor([True, False]).repeat(batch.num_sequences // 2)[batch.sequence()]
        supervised = -logprobs * (batch.trained & chosen)
        accuracy = (sums[0::2] > sums[1::2]).double().sum()
        return {"pairs": losses.sum(), "tokens": 0.5 * supervised.sum()}, {"accuracy": (accuracy, len(losses))}

    def count(batch: Batch) -> dict[str, Tensor | int]:
        chosen = torch.tensor([True, False]).repeat(batch.num_sequences // 2)[batch.sequence()]
        return {"pairs": batch.num_sequences // 2, "tokens": (batch.trained & chosen).sum()}

    optimizer = Kept(trainable(decoder, None, "full"), OptimizerConfig())
    assert decoder.embed.sparse
    decoder.embed.sparse = sparse
    packed = [pack_pairs(part) for part in batches]
    values = train_step(optimizer, packed, objective, count, world=world, max_norm=1e9, lr=1e-3, step=1, seed=0)
    return optimizer.last, values


if __name__ == "__main__":
    here = start(MeshConfig(data=2))
    everything = pairs()
    found, metrics = gradients([[everything[i] for i in indices] for indices in SHARES[here.rank]], here)
    stop(here)
    print(json.dumps([{name: g.tolist() for name, g in found.items()}, metrics]))
