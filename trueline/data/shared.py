"""Pairs whose prompts are run once for both answers. One rule: what is shared changes how a pair is run, never what it is."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from trueline.data.cache import Items, in_memory, lengths
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
    return SharedPairs(pairs, items.common())


def bound(pairs: SharedPairs) -> float:
    """How many times the tokens are run without sharing: (2P + C + R) / (P + C + R) for prompts of P and answers of C and R tokens."""
    return float(lengths(pairs.pairs).sum() / max(lengths(pairs).sum(), 1))
