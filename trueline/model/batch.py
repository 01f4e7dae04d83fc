"""Packed batches: sequences end to end, no padding. One rule: what describes token t sits at index t."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from trueline.data.sample import Pair, Sample
from trueline.model.layout import Packed


@dataclass(frozen=True)
class Batch:
    """N sequences of T tokens in all.

    >>> batch = pack([Sample([5, 6, 7], [False, False, True]), Sample([8, 9], [False, True])])
    >>> batch.tokens.tolist(), batch.trained.tolist(), batch.ends().tolist()
    ([5, 6, 7, 8, 9], [False, False, True, False, True], [2, 4])
    """

    tokens: Tensor  # [T] int64
    trained: Tensor  # [T] bool
    layout: Packed
    embedded: Tensor | None = None  # [T, D] the tokens' embeddings, where several roles of one trunk share them

    @property
    def inputs(self) -> Tensor:
        """What a decoder reads."""
        return self.tokens if self.embedded is None else self.embedded

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.layout.lengths

    @property
    def num_sequences(self) -> int:
        return len(self.layout.lengths)

    def ends(self) -> Tensor:
        """Index of each sequence's last token `[N]` int64."""
        return torch.tensor(list(accumulate(self.lengths)), device=self.tokens.device) - 1

    def sequence(self) -> Tensor:
        """Index of the sequence each token belongs to `[T]` int64."""
        lengths = torch.tensor(self.lengths, device=self.tokens.device)
        return torch.arange(len(self.lengths), device=self.tokens.device).repeat_interleave(lengths)

    def per_sequence(self, x: Tensor) -> Tensor:
        """Sum of `x` `[T]` over the trained tokens of each sequence `[N]`, in `x`'s dtype."""
        return x.new_zeros(self.num_sequences).index_add(0, self.sequence(), x * self.trained)

    def to(self, device: torch.device | str) -> "Batch":
        layout = replace(self.layout, positions=self.layout.positions.to(device))
        return Batch(self.tokens.to(device), self.trained.to(device), layout)


def pack(samples: Sequence[Sample]) -> Batch:
    """Lays samples end to end. First tokens are never trained: nothing predicts them."""
    if not samples:
        raise ValueError("nothing to pack")
    anchors = [s.anchor for s in samples] if any(s.anchor is not None for s in samples) else None
    layout = Packed.of([len(s.tokens) for s in samples], [s.context for s in samples], anchors=anchors)
    tokens = torch.tensor([t for s in samples for t in s.tokens], dtype=torch.int64)
    trained = torch.tensor([t and i > 0 for s in samples for i, t in enumerate(s.trained)], dtype=torch.bool)
    return Batch(tokens, trained, layout)


def pack_pairs(pairs: Sequence[Pair]) -> Batch:
    """Chosen answers at even indices, rejected ones at odd indices."""
    return pack([side for pair in pairs for side in (pair.chosen, pair.rejected)])
