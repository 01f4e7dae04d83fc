"""What torch.compile does for training. One rule: a graph holds no lengths, so micro-batches of every size run the same one.

Only a layer's arithmetic on both sides of attention is compiled: how packed tokens see one another is told in Python's numbers, which would
be constants of the graph. All layers share two graphs for each role, and what has no gradient runs as it is.
"""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trueline.errors import UserError, first_words


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled when it is first called; for tensors the first dimension of which is packed tokens."""
    inner: Callable[..., Any] = torch.compile(function)

    def call(*given: Any) -> Any:
        for x in given:
            if isinstance(x, Tensor):
                torch._dynamo.maybe_mark_dynamic(x, 0)
        return inner(*given)

    return call


def check_compiler(device: torch.device) -> None:
    """UserError where nothing can be compiled for `device`: found out by compiling a line. What is compiled is kept in the user's own
    folder: torch's default is in the temporary one, where on a shared machine anybody can lay libraries that are loaded."""
    kept = os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path("~/.cache/trueline/compiled").expanduser()))
    try:
        torch.compile(_line)(torch.ones(8, device=device))
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"model.compile: true needs a compiler, and a trial failed ({first_words(error)}); "
            f"install g++ (and Triton for a GPU), delete {kept} if a killed run left a broken file there, or set model.compile=false"
        ) from error


def _line(x: Tensor) -> Tensor:
    return x.sin() * 2
