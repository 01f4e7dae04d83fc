"""What is left of a few small updates once they are in bfloat16 weights, rounded to the nearest and as trueline does it.

A model of 3 million weights learns a made-up language in float32, its weights are rounded to bfloat16, and it learns a second language:
LoRA on all linears, which is then merged; or all weights, each with a float32 number behind it, of which the forward pass sees bfloat16.
All else is computed in float32, so nothing else rounds. What is left is told of the held-out loss's fall, for all weights of that with
float32 weights. One JSON line for each rate and number of updates.

`python bench/rounding.py [--threads N] [--only merge|update] [--rates R,...]`
"""

import argparse
import copy
import json
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from trueline.config.schema import AdapterConfig, OptimizerConfig
from trueline.model.adapters import add_adapter, low_ranks, merged_weight, trainable
from trueline.model.decoder import MLP, Attention, Decoder, DecoderConfig, LowRank, halves, init_weights
from trueline.model.layout import Packed
from trueline.train.optimizer import Optimizer

SIZES = DecoderConfig(vocab_size=512, hidden_size=256, num_layers=4, num_heads=8, num_kv_heads=2, head_dim=32, mlp_size=704)
LORA = AdapterConfig(kind="lora", rank=8, alpha=16.0, dropout=0.0, targets=("q", "k", "v", "o", "gate", "up", "down"))
ROWS, LENGTH, WORDS = 16, 48, 97
READINGS = (3, 10, 30, 100)


def first(draw: torch.Generator) -> Tensor:
    """Sequences in which most tokens follow from the one before."""
    tokens = torch.randint(0, WORDS, (ROWS, LENGTH), generator=draw)
    for i in range(1, LENGTH):
        follows = torch.rand(ROWS, generator=draw) < 0.8
        tokens[:, i] = torch.where(follows, (tokens[:, i - 1] * 7 + 3) % WORDS, tokens[:, i])
    return tokens


def second(draw: torch.Generator) -> Tensor:
    """The same, but every third token follows from its neighbour by another rule."""
    tokens = first(draw)
    tokens[:, 1::3] = (tokens[:, 0::3] * 5 + 11) % WORDS
    return tokens


def loss(decoder: Decoder, tokens: Tensor, role: str | None = None) -> Tensor:
    logits = decoder.head(decoder(tokens.flatten(), Packed.of([LENGTH] * ROWS), role))  # type: ignore[misc]
    return nn.functional.cross_entropy(logits.view(ROWS, LENGTH, -1)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def held_out(decoder: Decoder, role: str | None = None) -> float:
    return sum(float(loss(decoder, second(torch.Generator().manual_seed(900 + i)), role)) for i in range(8)) / 8


def learn(parameters: list[nn.Parameter], rate: float, step: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)

    def update() -> None:
        optimizer.zero_grad()
        step().backward()
        optimizer.step()

    return update


def nearest(half: Attention | MLP, name: str, adapter: LowRank) -> Tensor:
    return adapter.merged(getattr(half, name).weight.float()).bfloat16()


@torch.no_grad()
def merged(decoder: Decoder, how: Callable[[Attention | MLP, str, LowRank], Tensor]) -> Decoder:
    """A copy with bfloat16 numbers in its (float32) matrices, the adapter in them."""
    decoder = copy.deepcopy(decoder)
    for half in halves(decoder):
        for name, adapter in low_ranks(half, "policy").items():
            linear = getattr(half, name)
            linear.weight.data = linear.weight.data.bfloat16()
            linear.weight.data = how(half, name, adapter).float()
    return decoder


def merging(base: Decoder, rate: float) -> Iterator[tuple[int, float, float, float]]:
    """(updates, fall, left to the nearest, left by ours)."""
    decoder, draw = copy.deepcopy(base), torch.Generator().manual_seed(5)
    add_adapter(decoder, "policy", LORA, 0)
    update = learn(list(trainable(decoder, "policy", "lora").values()), rate, lambda: loss(decoder, second(draw), "policy"))
    before = held_out(decoder)
    for step in range(1, READINGS[-1] + 1):
        update()
        if step in READINGS:
            fall = before - held_out(decoder, "policy")
            found = [(before - held_out(merged(decoder, how))) / fall for how in (nearest, merged_weight)]
            yield step, fall, found[0], found[1]


def falls(base: Decoder, rate: float, how: str) -> list[float]:
    """The held-out loss's fall after each of `READINGS` updates of all weights."""
    seen, draw, found = copy.deepcopy(base), torch.Generator().manual_seed(5), []  # what the forward pass sees
    kept = copy.deepcopy(base).to(torch.bfloat16 if how == "ours" else torch.float32)  # what is updated
    optimizer = Optimizer(dict(kept.named_parameters()), OptimizerConfig(weight_decay=0.0))
    before = held_out(seen)
    for step in range(1, READINGS[-1] + 1):
        loss(seen, second(draw)).backward()
        for ours, theirs in zip(kept.parameters(), seen.parameters(), strict=True):
            ours.grad, theirs.grad = theirs.grad.to(ours.dtype), None  # type: ignore[union-attr]
        optimizer.collect()
        optimizer.step(rate)
        with torch.no_grad():
            for ours, theirs in zip(kept.parameters(), seen.parameters(), strict=True):
                theirs.copy_(ours.bfloat16() if how == "nearest" else ours)
        if step in READINGS:
            found.append(before - held_out(seen))
    return found


def updating(base: Decoder, rate: float) -> Iterator[tuple[int, float, float, float]]:
    exact, near, ours = (falls(base, rate, how) for how in ("exact", "nearest", "ours"))
    for i, step in enumerate(READINGS):
        yield step, exact[i], near[i] / exact[i], ours[i] / exact[i]


PARTS = {"merge": (merging, "1e-5,5e-5,1e-4"), "update": (updating, "1e-6,1e-5")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--rates", help="learning rates")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    base = Decoder(SIZES)
    init_weights(base, torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(1)
    update = learn(list(base.parameters()), 1e-3, lambda: loss(base, first(draw)))
    for _ in range(150):
        update()
    base.to(torch.bfloat16).to(torch.float32)
    for name, (part, rates) in PARTS.items():
        for rate in map(float, (given.rates or rates).split(",")) if given.only in (None, name) else ():
            for step, fall, near, ours in part(base, rate):
                line = {"bench": "rounding", "part": name, "rate": rate, "updates": step, "fall": fall}
                print(json.dumps(line | {"left_nearest": near, "left_ours": ours}), flush=True)


if __name__ == "__main__":
    main()
