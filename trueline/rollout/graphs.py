"""A decoding step recorded once for each size of batch and replayed. One rule: only while all that a recording points to stays in place.

A step of a large model is thousands of small kernels that take longer to launch than to run; a CUDA graph launches them at once. Weights
that are updated in place keep their addresses, so a recording outlives the update, and also the next `hold()` where keys and values, and
merged matrices, come to lie where they lay. Never run on a GPU yet.
"""

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trueline.rollout.decode import kernel_for

WARM_UPS = 1  # runs on the stream of the recording before it, where libraries make their handles
PATIENCE = 3  # steps of a size that are not recorded: a recording takes as long as some, and the last requests pass through sizes quickly

Step = Callable[..., Tensor]


class Recording(Protocol):
    """What `Graphs` asks of a recording of a step on certain input tensors."""

    def replay(self) -> Tensor:
        """The step's answer to what its inputs hold now; it is overwritten by the next replay of any recording."""


class CudaGraph:
    """One recorded graph. `inputs` are its to read from now on; all recordings with one `pool` share their working memory."""

    def __init__(self, step: Step, inputs: tuple[Tensor, ...], pool: Any):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                step(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.answer = step(*inputs)

    def replay(self) -> Tensor:
        self.graph.replay()
        return self.answer


class Graphs:
    """Recordings of a step by size of batch: powers of two and `rows`, the most there can be. Steps in between are filled up.

    The first `patience` steps of a size are run as they are; kernels are compiled in them.
    """

    def __init__(self, record: Callable[[Step, tuple[Tensor, ...], Any], Recording] = CudaGraph, patience: int = 0):
        self.record, self.patience = record, patience
        self.asked: Counter[int] = Counter()  # size -> steps of it
        self.key: object = None
        self.pool: Any = None
        self.recordings: dict[int, tuple[tuple[Tensor, ...], Recording]] = {}
        self.off = False

    def __call__(self, step: Step, inputs: tuple[Tensor, ...], rows: int, key: object) -> Tensor:
        """`step(*inputs)`, whose tensors have N <= `rows` rows each, as its answer has.

        `key` names all that the step reads and writes beside its inputs, such as addresses. Rows that fill up are zeros: what the step
        does for them must harm nobody.
        """
        if self.off:
            return step(*inputs)
        if key != self.key:
            self.recordings.clear()
            self.asked.clear()
            self.key, self.pool = key, torch.cuda.graph_pool_handle() if inputs[0].is_cuda else None
        count, size = len(inputs[0]), bucket(len(inputs[0]), rows)
        self.asked[size] += 1
        if size not in self.recordings and (self.asked[size] <= self.patience or not self._make(step, inputs, size)):
            return step(*inputs)
        held, recording = self.recordings[size]
        _fill(held, inputs)
        return recording.replay()[:count]

    def _make(self, step: Step, inputs: tuple[Tensor, ...], size: int) -> bool:
        held = tuple(x.new_zeros(size, *x.shape[1:]) for x in inputs)
        _fill(held, inputs)
        try:
            self.recordings[size] = held, self.record(step, held, self.pool)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as problem:  # an operation that cannot be recorded: right all the same, only slower
            warnings.warn(f"generating without CUDA graphs: {problem}", stacklevel=2)
            self.off = True
        return not self.off


def bucket(count: int, rows: int) -> int:
    """The size of batch that `count` requests are filled up to: the next power of two, or `rows` where that is smaller."""
    return min(1 << (count - 1).bit_length(), rows)


def graphs_for(decoder: nn.Module) -> Graphs | None:
    """None where steps cannot be recorded: off CUDA, without the decode kernel, or with weights that are parts of larger ones."""
    weight = next(decoder.parameters())
    return Graphs(patience=PATIENCE) if type(weight.detach()) is Tensor and kernel_for(weight) is not None else None


def _fill(held: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> None:
    for kept, new in zip(held, inputs, strict=True):
        kept[: len(new)] = new
        kept[len(new) :] = 0
