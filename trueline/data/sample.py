"""Token sequences, and which of their tokens are trained. One rule everywhere: what describes token t sits at index t."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """A rendered conversation, one side of a pair, or a finished rollout.

    >>> Sample(tokens=[5, 6, 7, 2], trained=[False, False, True, True])  # prompt 5 6, answer 7, stop token 2
    Sample(tokens=[5, 6, 7, 2], trained=[False, False, True, True], context=0)
    """

    tokens: list[int]
    trained: list[bool]  # the tokens a loss may look at; positional, never inferred from an id
    context: int = 0  # ChatGLM-6B: leading tokens seen both ways

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Pair:
    """The same prompt answered twice, the first answer preferred."""

    chosen: Sample
    rejected: Sample

    def __len__(self) -> int:
        return len(self.chosen) + len(self.rejected)
