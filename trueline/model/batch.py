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
    """N sequences of T tokens in all. Where pairs share prompts, fewer than T are run; every token still has its index here.

    >>> batch = pack([Sample([5, 6, 7], [False, False, True]), Sample([8, 9], [False, True])])
    >>> batch.tokens.tolist(), batch.trained.tolist(), batch.ends().tolist()
    ([5, 6, 7, 8, 9], [False, False, True, False, True], [2, 4])
    """

    tokens: Tensor  # [T] int64
    trained: Tensor  # [T] bool
    layout: Packed
    kept: Tensor | None = None  # [S] the tokens that are run, in order, where prompts are shared; None: all
    rows: Tensor | None = None  # [T] then: where among those each token's state is
    embedded: Tensor | None = None  # [S, D] the inputs' embeddings, where several roles of one trunk share them

    @property
    def inputs(self) -> Tensor:
        """What a decoder reads, as `layout` lays it: the tokens that are run `[S]`, or their embeddings."""
        if self.embedded is not None:
            return self.embedded
        return self.tokens if self.kept is None else self.tokens[self.kept]

    def states(self, run: Tensor, index: Tensor | None = None) -> Tensor:
        """Of what was computed for `inputs` `[S, ...]`, that of the tokens at `index` (all of them)."""
        rows = index if self.rows is None else self.rows if index is None else self.rows[index]
        return run if rows is None else run[rows]

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
        return torch.arange(len(self.lengths), device=self.tokens.device).repeat_interleave(lengths, output_size=len(self.tokens))

    def per_sequence(self, x: Tensor) -> Tensor:
        """Sum of `x` `[T]` over the trained tokens of each sequence `[N]`, in `x`'s dtype."""
        return x.new_zeros(self.num_sequences).index_add(0, self.sequence(), x * self.trained)

    def to(self, device: torch.device | str) -> "Batch":
        layout = replace(self.layout, positions=self.layout.positions.to(device))
        kept, rows = (None if x is None else x.to(device) for x in (self.kept, self.rows))
        return Batch(self.tokens.to(device), self.trained.to(device), layout, kept, rows)


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
    """Chosen answers at even indices, rejected ones at odd indices; what a pair shares is run with the chosen one only."""
    batch = pack([side for pair in pairs for side in (pair.chosen, pair.rejected)])
    shared = tuple(pair.shared for pair in pairs)
    if not any(shared):
        return batch
    starts = torch.tensor([0, *accumulate(batch.lengths)])
    kept, rows, total = torch.ones(len(batch.tokens), dtype=torch.bool), torch.arange(len(batch.tokens)), 0
    for first, second, end, n in zip(starts[0:-1:2].tolist(), starts[1::2].tolist(), starts[2::2].tolist(), shared, strict=True):
        kept[second : second + n] = False
        rows[first:second] -= total
        rows[second : second + n] = rows[first : first + n]
        total += n
        rows[second + n : end] -= total
    layout = replace(batch.layout, positions=batch.layout.positions[..., kept], shared=shared)
    return replace(batch, layout=layout, kept=kept.nonzero()[:, 0], rows=rows)
