"""Pairs whose prompts are run once for both answers. One rule: what is shared changes how a pair is run, never what it is."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from trueline.data.cache import Block, Items, in_memory, lengths
from trueline.data.sample import Pair


class SharedPairs(Sequence[Pair]):
    """`pairs`, each with the number of leading tokens its sides share; made when asked for."""

    def __init__(self, pairs: Sequence[Pair], shared: NDArray[np.int64]):
        self.pairs, self.shared = pairs, shared
        self.sides = (lengths(pairs) - shared)[:, None]

    def __len__(self) -> int:
        return len(self.pairs)

    @overload
    def __getitem__(self, i: int) -> Pair: ...

    @overload
    def __getitem__(self, i: slice) -> "SharedPairs": ...

    def __getitem__(self, i: int | slice) -> "Pair | SharedPairs":
        if isinstance(i, slice):
            return SharedPairs(self.pairs[i], self.shared[i])
        return replace(self.pairs[i], shared=int(self.shared[i]))

    def digests(self) -> NDArray[np.void]:
        """`cache.digest` of every pair: that of the pair itself."""
        found: Any = self.pairs
        return found.digests()


def shared_pairs(pairs: Sequence[Pair]) -> SharedPairs:
    """Told from the arrays of `Items`; what are other pairs is laid into such first."""
    items = pairs if isinstance(pairs, Items) else Items(in_memory("pair", lambda _: iter([pairs])).blocks)
    return SharedPairs(pairs, items.told(common, np.int64))


def common(block: Block) -> NDArray[np.int64]:
    """Leading tokens of each pair whose states are the same on both sides: equal, before anything is trained, no context reaching beyond
    them. Both sides keep a token of their own."""
    (starts, ids, *_), (other_starts, other_ids, *_) = block.sides
    trained = (np.flatnonzero(np.unpackbits(side[2], count=int(side[0][-1]), bitorder="little")) for side in block.sides)
    count = np.min([_first(x, side[0], np.diff(side[0]) - 1) for x, side in zip(trained, block.sides, strict=True)], axis=0)
    ends = np.concatenate([[0], count.cumsum()])
    inside = np.arange(ends[-1]) - ends[:-1].repeat(count)
    unequal = ids[starts[:-1].repeat(count) + inside] != other_ids[other_starts[:-1].repeat(count) + inside]
    same = _first(np.flatnonzero(unequal), ends, count)
    places, others = (np.stack(side[3:]) for side in block.sides)
    alike: NDArray[np.int64] = np.where((places == others).all(axis=0) & (same >= places[0]), same, 0)
    return alike


def _first(places: NDArray[np.int64], starts: NDArray[np.int64], most: NDArray[np.int64]) -> NDArray[np.int64]:
    """How far the first of `places` (sorted) stands behind each start but the last one, which is an end; `most` at the most."""
    found = np.append(places, np.iinfo(np.int64).max)[np.searchsorted(places, starts[:-1])]
    return np.minimum(found - starts[:-1], most)


def bound(pairs: SharedPairs) -> float:
    """How many times the tokens are run without sharing: (2P + C + R) / (P + C + R) for prompts of P and answers of C and R tokens."""
    return float(lengths(pairs.pairs).sum() / max(lengths(pairs).sum(), 1))
