"""What is left of a young LoRA once it is merged into bfloat16, rounded to the nearest and as trueline does it.

A model of 3 million weights learns a made-up language in float32, its weights are rounded to bfloat16, and LoRA on all linears learns a
second language. Everything is computed in float32, so the merge is all that rounds. What is left is told of the held-out loss's fall: one
JSON line for each rate and number of updates.

`python bench/merge.py [--threads N] [--rates R,...]`
"""

import argparse
import copy
import json
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from trueline.config.schema import AdapterConfig
from trueline.model.adapters import add_adapter, halves, low_ranks, merged_weight, trainable
from trueline.model.decoder import MLP, Attention, Decoder, DecoderConfig, LowRank, init_weights
from trueline.model.layout import Packed

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rates", default="1e-5,5e-5,1e-4", help="learning rates")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    base = Decoder(SIZES)
    init_weights(base, torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(1)
    update = learn(list(base.parameters()), 1e-3, lambda: loss(base, first(draw)))
    for _ in range(150):
        update()
    base.to(torch.bfloat16).to(torch.float32)
    for rate in map(float, given.rates.split(",")):
        decoder, draw = copy.deepcopy(base), torch.Generator().manual_seed(5)
        add_adapter(decoder, "policy", LORA, 0)
        parameters = list(trainable(decoder, "policy", "lora").values())
        update = learn(parameters, rate, partial(lambda decoder, draw: loss(decoder, second(draw), "policy"), decoder, draw))
        before = held_out(decoder)
        for step in range(1, READINGS[-1] + 1):
            update()
            if step in READINGS:
                fall = before - held_out(decoder, "policy")
                left = [(before - held_out(merged(decoder, how))) / fall for how in (nearest, merged_weight)]
                line = {"bench": "merge", "rate": rate, "updates": step, "loss_before": before, "fall": fall}
                print(json.dumps(line | {"left_nearest": left[0], "left_ours": left[1]}), flush=True)


if __name__ == "__main__":
    main()
