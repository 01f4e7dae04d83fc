"""In which order records are used, and who runs which. One rule: pure functions of (seed, purpose, numbers), no state to save."""

import hashlib
import math
from bisect import bisect_left, insort
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from trueline.errors import UserError


def key(seed: int, purpose: str, *numbers: int) -> int:
    """A 63-bit seed for one random draw: the one way to derive them. Different purposes and numbers give unrelated seeds.

    >>> key(0, "sampling", 3, 1) == key(0, "sampling", 3, 1) != key(0, "sampling", 1, 3)
    True
    """
    text = "\0".join([str(seed), purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def total_samples(count: int, epochs: float) -> int:
    """Samples in `epochs` passes over `count` records; at least one."""
    return max(1, round(count * epochs))


def total_steps(count: int, per_step: int, steps: int | None, epochs: float | None) -> int:
    """Optimizer steps of a run: `steps` as asked for, or enough for `epochs` passes; the last step may be smaller."""
    if steps is not None:
        return steps
    if epochs is None:
        raise ValueError("give steps or epochs")
    return math.ceil(total_samples(count, epochs) / per_step)


def step_indices(seed: int, step: int, count: int, per_step: int, total_samples: int | None = None) -> list[int]:
    """The records of optimizer step `step` (from 0), whatever ran before it.

    Sample g of the whole run is at place g % count of epoch g // count's permutation, so every record occurs exactly once an epoch, steps
    may straddle epochs, and the world size plays no part. From `total_samples` on there is nothing: the last step may be short.

    >>> sorted(step_indices(7, 0, 4, 3) + step_indices(7, 1, 4, 3)[:1])
    [0, 1, 2, 3]
    """
    first = step * per_step
    last = first + per_step if total_samples is None else min(first + per_step, total_samples)
    return [int(_order(seed, g // count, count)[g % count]) for g in range(first, last)]


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> NDArray[np.intp]:
    """A permutation from the raw counter-based stream: numpy keeps that stable over versions, its `permutation` not."""
    draws = np.random.Philox(key=key(seed, "order", epoch)).random_raw(count)
    return np.argsort(draws, kind="stable")


def plan(lengths: list[int], max_tokens: int, ranks: int = 1) -> list[list[list[int]]]:
    """Which rank runs which items in which micro-batch: `[rank][micro-batch]` -> indices into `lengths`, from lengths alone.

    Best-fit decreasing: the longest first, each into the fullest micro-batch of at most `max_tokens` tokens with room for it. Every rank
    gets the same number of micro-batches (sharded weights are gathered in lockstep); where items are too few, some are empty.
    """
    longest = max(lengths, default=0)
    if longest > max_tokens:
        raise UserError(
            f"an item of {longest} tokens does not fit in a micro-batch of {max_tokens}; raise batch.max_tokens to at least {longest}"
        )
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, micro-batch), ascending
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect_left(rooms, (lengths[i], -1))
        room, home = rooms.pop(place) if place < len(rooms) else (max_tokens, len(bins))
        if home == len(bins):
            bins.append([])
        bins[home].append(i)
        insort(rooms, (room - lengths[i], home))
    while len(bins) % ranks or not bins:
        fullest = max(bins, key=len, default=[])
        bins.append([fullest.pop()] if len(fullest) > 1 else [])
    bins.sort(key=lambda b: -sum(lengths[i] for i in b))
    return [bins[rank::ranks] for rank in range(ranks)]
