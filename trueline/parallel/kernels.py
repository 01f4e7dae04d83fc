"""Kernels in Triton, an optional library. One rule: one that is not right on this machine is left out, and its work is done plainly."""

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import _disable_current_modes as outside  # noqa: PLC2701


def usable(module: str, name: str, right: Callable[[Callable[..., Any]], bool]) -> Callable[..., Any] | None:
    """Function `name` of `module` if Triton is here and `right(function)` says so; imported when first asked for, since it takes seconds.

    Triton compiles its launcher with the machine's C compiler and looks for the driver's library: what can go wrong there has no type of
    its own, so whatever is raised in the trial is told, once.
    """
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
        with outside():  # whoever asks first may have tensors without numbers
            fits = right(found)
        if fits:
            return found
        problem = "it gives other numbers than PyTorch's own operations"
    except Exception as error:  # see above
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
    warnings.warn(f"going on without the Triton kernel {name}: {problem}", stacklevel=2)
    return None
