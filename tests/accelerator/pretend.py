"""Makes this process believe in a CUDA device: device.cpp, and what torch.cuda, flash attention and Triton need in Python.

Imported before torch is. What is refused here would be refused, or be wrong, on a GPU; what passes may still be slow or differ there.
`PRETEND_DEVICE` names the built device.cpp.
"""

import contextlib
import ctypes
import importlib.util
import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

DEVICE = ctypes.CDLL(os.environ["PRETEND_DEVICE"])
DEVICE.pretend_limit.argtypes = [ctypes.c_int64]
for _name in ("now", "peak", "waits"):
    getattr(DEVICE, f"pretend_{_name}").restype = ctypes.c_int64

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.library import Library  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402

counts = {"flash": 0, "launches": 0, "graphs": 0, "replays": 0}
_memory = [140 << 30]  # bytes


def limit(size: int) -> None:
    """The device has so many bytes from now on."""
    _memory[0] = size
    DEVICE.pretend_limit(size)


def report() -> dict[str, int]:
    """What was counted so far, and the most memory that was taken."""
    return counts | {"waits": DEVICE.pretend_waits(), "peak": DEVICE.pretend_peak()}


class Stream:
    """All work is done when it is asked for, so that one stream is as good as another."""

    def wait_stream(self, other: "Stream") -> None:
        pass

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *error: object) -> None:
        pass


class Recorder(TorchDispatchMode):
    """Notes operations while they run; what a capture on a GPU would not survive is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Callable[[], object], object]] = []  # what to do again, and what it gave
        self.made: dict[int, Tensor] = {}  # by storage: the graph's own memory

    def held(self, tree: Any) -> Any:
        """As a graph has it: its own tensors, and of others nothing but the address."""

        def hold(x: object) -> object:
            others = isinstance(x, Tensor) and x.is_cuda and x.untyped_storage()._cdata not in self.made
            return torch.ops.pretend.address(x) if others else x

        return tree_map(hold, tree)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name, waits = kwargs or {}, func._schema.name, DEVICE.pretend_waits()
        out = func(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        moved = name in ("aten::copy_", "aten::_to_copy")  # other operations may have numbers of the host
        if DEVICE.pretend_waits() > waits or any(x.is_cpu and (moved or x.dim() > 0) for x in tensors):
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({name})")
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (key := x.untyped_storage()._cdata) not in given:
                self.made[key] = x
        args, kwargs, kept = self.held((args, kwargs, out))
        self.done.append((lambda: func(*args, **kwargs), kept))
        return out


class CUDAGraph:
    """Operations that were recorded, done again with their tensors where they were."""

    def __init__(self) -> None:
        self.recorder = Recorder()

    def replay(self) -> None:
        counts["replays"] += 1
        for again, out in self.recorder.done:
            for new, old in zip(tree_leaves(again()), tree_leaves(out), strict=True):
                if isinstance(new, Tensor) and new.data_ptr() != old.data_ptr():
                    old.copy_(new)


@contextlib.contextmanager
def graph(recorded: CUDAGraph, pool: object = None) -> Iterator[None]:
    with recorded.recorder:
        yield
    counts["graphs"] += 1


# each a function of its own: TorchDynamo keeps a table of them by identity
for _name, _value in {
    "_lazy_init": lambda: None,
    "_is_in_bad_fork": lambda: False,
    "is_initialized": lambda: True,
    "is_available": lambda: os.environ.get("CUDA_VISIBLE_DEVICES") != "",
    "device_count": lambda: 1,
    "synchronize": lambda device=None: None,
    "mem_get_info": lambda device=None: (_memory[0] - DEVICE.pretend_now(), _memory[0]),
    "memory_allocated": lambda device=None: DEVICE.pretend_now(),
    "memory_reserved": lambda device=None: DEVICE.pretend_now(),
    "max_memory_allocated": lambda device=None: DEVICE.pretend_peak(),
    "reset_peak_memory_stats": lambda device=None: DEVICE.pretend_reset_peak(),
    "default_generators": (torch.Generator("cuda"),),
    "Stream": Stream,
    "stream": lambda stream: stream,
    "current_stream": Stream,
    "CUDAGraph": CUDAGraph,
    "graph": graph,
    "graph_pool_handle": lambda: (0, 1),
}.items():
    setattr(torch.cuda, _name, _value)
torch.accelerator.max_memory_reserved = torch.cuda.max_memory_allocated
torch.accelerator.synchronize = torch.cuda.synchronize


class Attention:
    """torch's variable-length attention in float64, a sequence at a time, as its flash kernels are called."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, cum_q: Tensor, cum_k: Tensor, max_q: int, max_k: int, causal: bool,
        scale: float | None = None, window_size_left: int | None = None, window_size_right: int | None = None, **more: object,
    ):  # fmt: skip
        assert query.dtype in (torch.bfloat16, torch.float16) and cum_q.dtype == cum_k.dtype == torch.int32
        assert (max_q, max_k) == (int(cum_q.diff().max()), int(cum_k.diff().max()))
        assert (int(cum_q[-1]), int(cum_k[-1])) == (len(query), len(key)) and not set(more.values()) - {None}
        self.given, self.ends = (query, key, value), (cum_q.tolist(), cum_k.tolist())
        self.scale = query.shape[-1] ** -0.5 if scale is None else scale
        left, right = (-1 if x is None else x for x in (window_size_left, window_size_right))
        self.before, self.after = left if left >= 0 else 1 << 62, 0 if causal else right if right >= 0 else 1 << 62

    def sequences(self) -> Iterator[tuple[slice, slice, list[Tensor], Tensor]]:
        """Where its queries and keys are; query, key and value of each query head; scores `[heads, queries, keys]`."""
        shared = self.given[0].shape[1] // self.given[1].shape[1]
        for queries, keys in zip(*([slice(*pair) for pair in pairwise(ends)] for ends in self.ends), strict=True):
            parts = [x[at].double() for x, at in zip(self.given, (queries, keys, keys), strict=True)]
            q, k, v = parts[0], *(x.repeat_interleave(shared, 1) for x in parts[1:])
            ahead = torch.arange(len(k)) - torch.arange(len(q))[:, None] - (len(k) - len(q))
            scores = torch.einsum("thd,shd->hts", q, k) * self.scale
            yield queries, keys, [q, k, v], scores.masked_fill((ahead > self.after) | (ahead < -self.before), -torch.inf)


def flash_forward(query, key, value, cum_q, cum_k, max_q, max_k, dropout, causal, debug, **options):
    assert not dropout and not debug
    counts["flash"] += len(query) > 2  # not the program's trial
    attention = Attention(query, key, value, cum_q, cum_k, max_q, max_k, causal, **options)
    found = [(torch.einsum("hts,shd->thd", s.softmax(-1), v), s.logsumexp(-1)) for _, _, (_, _, v), s in attention.sequences()]
    unused = torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64), query.new_empty(0)
    return torch.cat([out for out, _ in found]).to(query.dtype), torch.cat([total for _, total in found], -1).float(), *unused


def flash_backward(grad, query, key, value, out, total, cum_q, cum_k, max_q, max_k, dropout, causal, rng, unused, **options):
    slopes: list[list[Tensor]] = [[], [], []]
    attention = Attention(query, key, value, cum_q, cum_k, max_q, max_k, causal, **options)
    for queries, _, (q, k, v), scores in attention.sequences():
        own, weights = grad[queries].double(), scores.softmax(-1)
        slope = torch.einsum("thd,shd->hts", own, v)
        slope = weights * (slope - (slope * weights).sum(-1, keepdim=True)) * attention.scale
        slopes[0].append(torch.einsum("hts,shd->thd", slope, k))
        for to, (left, right) in zip(slopes[1:], ((slope, q), (weights, own)), strict=True):
            to.append(torch.einsum("hts,thd->shd", left, right).unflatten(1, (key.shape[1], -1)).sum(2))
    return tuple(torch.cat(parts).to(query.dtype) for parts in slopes)


ATEN = Library("aten", "IMPL")  # on copies that the device's fallback has made
ATEN.impl("_flash_attention_forward", flash_forward, "CPU")
ATEN.impl("_flash_attention_backward", flash_backward, "CPU")

if importlib.util.find_spec("triton"):
    from triton.runtime.interpreter import GridExecutor

    _launch = GridExecutor.__call__

    def launch(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        """The interpreter copies what a kernel is given to the host and back, which the program does not wait for."""
        counts["launches"] += 1

        def run(args: Any, kwargs: Any) -> None:
            DEVICE.pretend_uncounted(1)
            with _disable_current_modes():
                _launch(self, *args, **kwargs)
            DEVICE.pretend_uncounted(-1)

        run(args, kwargs)
        recorder = _get_current_dispatch_mode()
        if isinstance(recorder, Recorder):
            with _disable_current_modes():
                held = recorder.held((args, kwargs))
            recorder.done.append((lambda: run(*held), None))

    GridExecutor.__call__ = launch
