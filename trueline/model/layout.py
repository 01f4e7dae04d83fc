"""How packed tokens attend to one another. The decoder knows only `Layout`; training, prompts and decoding differ here and nowhere else."""

from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from trueline.model.attention import packed_attention


class Layout(Protocol):
    """What `Decoder.forward` asks of a layout."""

    @property
    def positions(self) -> Tensor:
        """Position of each token in its sequence `[T]` int64; `[2, T]` for rotary embeddings in two dimensions."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        """Attention of `q` `[T, H, d]` to `k`, `v` `[T, G, d]` -> `[T, H, d]`; H is a multiple of G.

        `window`: a token sees so many of the newest up to itself, a prefix counted with them; None is all.
        """

    def attend_prefixed(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, window: int | None = None
    ) -> Tensor:
        """The same with `keys`, `values` `[P, G, d]` in front of every sequence, seen by all of its tokens."""


def count_up(lengths: list[int], device: torch.device | str = "cpu") -> Tensor:
    """Index of each token in its own sequence `[T]` int64, for sequences laid end to end."""
    starts, total = torch.tensor([0, *accumulate(lengths)][:-1], device=device), sum(lengths)
    # a device that has to say how many come out is waited for
    return torch.arange(total, device=device) - starts.repeat_interleave(torch.tensor(lengths, device=device), output_size=total)


def places_of(contexts: list[int], anchors: list[int | None], device: torch.device | str) -> Tensor:
    """Where each sequence's answer starts and what it fills `[N, 2]`; without an anchor it never starts."""
    never = torch.iinfo(torch.int64).max
    rows = [(never, 0) if anchor is None else (context, anchor) for context, anchor in zip(contexts, anchors, strict=True)]
    return torch.tensor(rows, dtype=torch.int64, device=device).view(-1, 2)


def block_positions(index: Tensor, places: Tensor) -> Tensor:
    """ChatGLM-6B's two positions `[2, T]` of tokens `index` `[T]` of sequences with `places` `[T, 2]`.

    The first counts in the context and is the anchor in all of the answer; the second is 0 in the context and counts from 1 in the answer
    (arXiv:2103.10360 sect. 2.3, as published: the answer begins with <sop>).
    """
    start, anchor = places.unbind(1)
    inside = index >= start
    return torch.stack((torch.where(inside, anchor, index), torch.where(inside, index - start + 1, 0)))


@dataclass(frozen=True)
class Packed:
    """Whole sequences end to end, each causal and blind to the others: training and scoring.

    With `shared`, of each pair of sequences the second has so many leading tokens from the first and is laid down without them: its other
    tokens attend to the first one's keys and values of those, and gradients reach them from both.
    """

    lengths: tuple[int, ...]
    positions: Tensor  # [T] or [2, T]
    contexts: tuple[int, ...] = ()  # leading tokens of each sequence seen both ways (prefix-LM); empty: none
    shared: tuple[int, ...] = ()  # one for each two sequences; empty: nothing is

    @staticmethod
    def of(
        lengths: list[int],
        contexts: list[int] | None = None,
        device: torch.device | str = "cpu",
        anchors: list[int | None] | None = None,
    ) -> "Packed":
        """Positions count from 0 in each sequence; with `anchors`, they are ChatGLM-6B's two rows (`block_positions`)."""
        positions = count_up(lengths, device)
        if anchors is not None:
            places = places_of(contexts or [0] * len(lengths), anchors, device)
            positions = block_positions(positions, places.repeat_interleave(torch.tensor(lengths, device=device), dim=0))
        return Packed(tuple(lengths), positions, tuple(contexts) if contexts and any(contexts) else ())

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        return packed_attention(q, self._seen(k), self._seen(v), self._own, self.contexts, None, None, window, self.lengths)

    def attend_prefixed(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, window: int | None = None
    ) -> Tensor:
        return packed_attention(q, self._seen(k), self._seen(v), self._own, self.contexts, keys, values, window, self.lengths)

    @property
    def _own(self) -> tuple[int, ...]:
        """Tokens of each sequence that are laid down."""
        if not self.shared:
            return self.lengths
        return tuple(n - self.shared[i // 2] * (i % 2) for i, n in enumerate(self.lengths))

    def _seen(self, x: Tensor) -> Tensor:
        """`x` of every token `[S, ...]` for whole sequences `[T, ...]`.

        By one split and one concatenation: their backward adds in a fixed order, that of an index does not on an accelerator.
        """
        if not self.shared:
            return x
        own = self._own
        cuts = [n for i, p in enumerate(self.shared) for n in (p, own[2 * i] - p, own[2 * i + 1])]
        parts = x.split(cuts)
        return torch.cat([part for i in range(0, len(parts), 3) for part in (parts[i], parts[i + 1], parts[i], parts[i + 2])])


@dataclass(frozen=True)
class Prefixed:
    """P-tuning v2 over any layout.

    `shifts`: the prefix takes the positions before 0, so the tokens' own start at its length, as PEFT has it on transformers' classes.
    Without, they start at 0, as in the code that was published with the ChatGLM models.
    """

    inner: Layout
    keys: Tensor  # [L, P, G, d]
    values: Tensor
    shifts: bool = True

    @property
    def positions(self) -> Tensor:
        return self.inner.positions + self.keys.shape[1] if self.shifts else self.inner.positions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        return self.inner.attend_prefixed(layer, q, k, v, self.keys[layer], self.values[layer], window)

    def attend_prefixed(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, window: int | None = None
    ) -> Tensor:
        raise TypeError("a layout has one prefix at most")
