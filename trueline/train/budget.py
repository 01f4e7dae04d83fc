"""How many tokens a micro-batch holds, and which layers are recomputed. One rule: memory changes how a step is cut, never its result."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from trueline.errors import RunError, out_of_memory
from trueline.model.batch import Batch
from trueline.model.decoder import Decoder
from trueline.model.heads import chunk_rows
from trueline.parallel.memory import free_memory
from trueline.train.optimizer import Optimizer
from trueline.train.step import OutOfMemory

R = TypeVar("R")
SPARE = 0.05  # of the free memory, for what is not counted: pieces that do not fit together, buffers of libraries


@dataclass
class Budget:
    """`tokens` per micro-batch; halved when they do not fit, and `say` tells.

    Before that `relieve` may make room in another way: it returns what it did, or None when there is nothing left to do.
    """

    tokens: int
    say: Callable[[str], None]
    relieve: Callable[[], str | None] = lambda: None

    def room(self, lengths: Sequence[int]) -> int:
        """Tokens per micro-batch for items of these lengths: an item is never cut."""
        return max(self.tokens, *lengths)

    def fit(self, lengths: Sequence[int], attempt: Callable[[int], R]) -> R:
        """What `attempt` returns for the first budget that it does not run out of memory for.

        RunError when not even single items fit. A step's loss is a sum over one global count, so a smaller budget gives the same gradient.
        """
        while True:
            tried = min(self.room(lengths), sum(lengths))
            try:
                return attempt(self.room(lengths))
            except (OutOfMemory, MemoryError, RuntimeError) as error:
                if not isinstance(error, OutOfMemory) and not out_of_memory(error):
                    raise
            # left before the next attempt, so that nothing of this one is held
            if relief := self.relieve():
                self.say(f"out of memory with {tried} tokens in a micro-batch; {relief}, same loss")
                continue
            self.tokens = max(tried // 2, 1)
            if self.room(lengths) >= tried:
                raise RunError(
                    f"out of memory with a single item of {max(lengths)} tokens in a micro-batch; "
                    "set model.recompute=true, train an adapter (model.adapter.kind=lora), or lower data.max_length"
                )
            smaller = self.room(lengths)
            self.say(f"out of memory with {tried} tokens in a micro-batch; going on with {smaller} (batch.max_tokens), same loss")


def recompute_all(decoders: Sequence[Decoder]) -> str | None:
    """Relief for `model.recompute: auto`: every layer of these is recomputed from now on."""
    if all(decoder.recompute == len(decoder.layers) for decoder in decoders):
        return None
    for decoder in decoders:
        decoder.recompute = len(decoder.layers)
    return "recomputing all layers from now on (model.recompute)"


def choose_recompute(
    decoder: Decoder,
    role: str | None,
    batch: Batch,
    tokens: int,
    optimizers: Iterable[Optimizer],
    memory: int | None,
    several: bool = True,
) -> str:
    """Sets how many layers of `decoder` are recomputed, so that a micro-batch of `tokens` tokens fits `memory`; returns what and why.

    What a layer keeps is measured on `batch`. `memory` None is what the device has free. Gradients and states that are still to come count
    as used, gradients as in steps of one micro-batch or of `several`. Never fewer than were chosen before: another role of the same trunk
    may need more.
    """
    optimizers = list(optimizers)
    free = math.floor(free_memory(batch.tokens.device) * (1 - SPARE)) if memory is None else memory
    wanted = [optimizer.memory(several) for optimizer in optimizers]
    there = sum(x.nbytes for optimizer in optimizers for x in optimizer.state().values())
    kept, again = (-(-n * tokens // len(batch.inputs)) for n in decoder.layer_memory(batch.inputs, batch.layout, role))
    room = free - max(gradients for gradients, _ in wanted) - (sum(states for _, states in wanted) - there) - logits_memory(decoder, tokens)
    layers = len(decoder.layers)
    decoder.recompute = max(decoder.recompute, layers_to_recompute(room, layers, kept, again))
    fits = f"activations of {layers} layers take {layers * kept / 1e9:.2f} GB, there is room for {max(room, 0) / 1e9:.2f} GB"
    return f"model.recompute: auto recomputes {decoder.recompute} of {layers} layers; {fits} ({free / 1e9:.2f} GB of memory less the rest)"


def layers_to_recompute(room: int, layers: int, kept: int, again: int) -> int:
    """How many of `layers` have to be recomputed for activations to take at most `room` bytes; all of them if that is not enough.

    A layer keeps `kept` bytes, or `again` when it is recomputed; one layer more is counted for what a layer's backward pass works with.

    >>> [layers_to_recompute(room, 10, kept=100, again=10) for room in (1100, 1099, 1010, 1009, 290, 0)]
    [0, 1, 1, 2, 9, 10]
    """
    lacking = (layers + 1) * kept - room
    return 0 if lacking <= 0 else min(layers, -(-lacking // max(kept - again, 1)))


def logits_memory(decoder: Decoder, tokens: int) -> int:
    """Bytes of logits at once, in the model's format; none for a scorer."""
    if decoder.head is None:
        return 0
    weight = decoder.embed.weight
    return min(tokens, chunk_rows(weight)) * decoder.config.vocab_size * weight.dtype.itemsize
