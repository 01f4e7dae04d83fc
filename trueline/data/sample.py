"""Token sequences, and which of their tokens are trained. One rule everywhere: what describes token t sits at index t."""

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Sample:
    """A rendered conversation, one side of a pair, or a finished rollout.

    >>> Sample(tokens=[5, 6, 7, 2], trained=[False, False, True, True])  # prompt 5 6, answer 7, stop token 2
    Sample(tokens=[5, 6, 7, 2], trained=[False, False, True, True], context=0, anchor=None)
    """

    tokens: list[int]
    trained: list[bool]  # the tokens a loss may look at; positional, never inferred from an id
    context: int = 0  # ChatGLM-6B: leading tokens seen both ways
    anchor: int | None = None  # ChatGLM-6B: the place in the context that the answer fills; None: positions just count

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Pair:
    """The same prompt answered twice, the first answer preferred. With `shared`, so many leading tokens of both are run once."""

    chosen: Sample
    rejected: Sample
    shared: int = 0

    def __len__(self) -> int:
        return len(self.chosen) + len(self.rejected) - self.shared


@dataclass(frozen=True)
class Blocks:
    """The tokens by which ChatGLM-6B tells a context, seen both ways, from the answer. Everything about it follows from the ids."""

    start: int  # <sop>, the answer's first token
    masks: tuple[int, ...]  # [gMASK], [MASK]: the first of these that occurs anywhere is the place the answer fills

    def place(self, tokens: Sequence[int]) -> tuple[int, int | None]:
        """`context` and `anchor`, as the authors' get_masks and get_position_ids find them.

        Tokens without a start are an ordinary causal sequence; a start without any mask token fills the place before it.
        """
        if self.start not in tokens:
            return 0, None
        context = tokens.index(self.start)
        return context, next((tokens.index(mask) for mask in self.masks if mask in tokens), max(context - 1, 0))


def sample_of(tokens: Sequence[int], trained: Sequence[bool], blocks: Blocks | None) -> Sample:
    """Bare tokens as a sample: the one place where these get their context."""
    return Sample(list(tokens), list(trained), *(blocks.place(tokens) if blocks else ()))


def answered(prompt: Sequence[int], answer: Sequence[int], blocks: Blocks | None) -> Sample:
    """A prompt and the answer a model gave, which is trained. The context is the prompt's, whatever tokens the answer has."""
    whole = sample_of(prompt, [False] * len(prompt), blocks)
    return replace(whole, tokens=[*prompt, *answer], trained=[*whole.trained, *[True] * len(answer)])
