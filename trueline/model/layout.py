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
        """Position of each token in its sequence `[T]` int64."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of `q` `[T, H, d]` to `k`, `v` `[T, G, d]` -> `[T, H, d]`; H is a multiple of G."""

    def attend_prefixed(self, layer: int, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The same with `keys`, `values` `[P, G, d]` in front of every sequence, seen by all of its tokens."""


@dataclass(frozen=True)
class Packed:
    """Whole sequences end to end, each causal and blind to the others: training and scoring."""

    lengths: tuple[int, ...]
    positions: Tensor  # [T]
    contexts: tuple[int, ...] = ()  # leading tokens of each sequence seen both ways (prefix-LM); empty: none

    @staticmethod
    def of(lengths: list[int], contexts: list[int] | None = None, device: torch.device | str = "cpu") -> "Packed":
        """Positions count from 0 in each sequence."""
        total = torch.arange(sum(lengths), device=device)
        starts = torch.tensor([0, *accumulate(lengths)][:-1], device=device)
        positions = total - starts.repeat_interleave(torch.tensor(lengths, device=device))
        return Packed(tuple(lengths), positions, tuple(contexts) if contexts and any(contexts) else ())

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(q, k, v, self.lengths, self.contexts)

    def attend_prefixed(self, layer: int, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return packed_attention(q, k, v, self.lengths, self.contexts, keys, values)


@dataclass(frozen=True)
class Prefixed:
    """P-tuning v2 over any layout: the prefix takes the positions before 0, so the tokens' own start at its length, as in PEFT."""

    inner: Layout
    keys: Tensor  # [L, P, G, d]
    values: Tensor

    @property
    def positions(self) -> Tensor:
        return self.inner.positions + self.keys.shape[1]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.inner.attend_prefixed(layer, q, k, v, self.keys[layer], self.values[layer])

    def attend_prefixed(self, layer: int, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        raise TypeError("a layout has one prefix at most")
