"""How many tokens a micro-batch holds. One rule: running out of memory changes how a step is cut, never what it computes."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from trueline.errors import RunError
from trueline.train.step import OutOfMemory

R = TypeVar("R")


@dataclass
class Budget:
    """`tokens` per micro-batch; halved when they do not fit, and `say` tells."""

    tokens: int
    say: Callable[[str], None]

    def room(self, lengths: Sequence[int]) -> int:
        """Tokens per micro-batch for items of these lengths: an item is never cut."""
        return max(self.tokens, *lengths)

    def fit(self, lengths: Sequence[int], attempt: Callable[[int], R]) -> R:
        """What `attempt` returns for the first budget that it does not raise OutOfMemory for.

        RunError when not even single items fit. A step's loss is a sum over one global count, so a smaller budget gives the same gradient.
        """
        while True:
            tried = min(self.room(lengths), sum(lengths))
            with suppress(OutOfMemory):  # left before the next attempt, so that nothing of this one is held
                return attempt(self.room(lengths))
            self.tokens = max(tried // 2, 1)
            if self.room(lengths) >= tried:
                raise RunError(
                    f"out of memory with a single item of {max(lengths)} tokens in a micro-batch; "
                    "set model.recompute=true, train an adapter (model.adapter.kind=lora), or lower data.max_length"
                )
            smaller = self.room(lengths)
            self.say(f"out of memory with {tried} tokens in a micro-batch; going on with {smaller} (batch.max_tokens), same loss")
