"""Kernels that a machine may have or not. One rule: one that is not right on this machine is left out, and its work is done plainly."""

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from torch.utils._python_dispatch import _disable_current_modes as outside  # noqa: PLC2701

T = TypeVar("T")


def usable(module: str, name: str, right: Callable[[Callable[..., Any]], bool]) -> Callable[..., Any] | None:
    """Function `name` of `module`, if Triton is here and `tried` finds it right; imported when first asked for, since it takes seconds."""
    if importlib.util.find_spec("triton") is None:
        return None
    return tried(f"the Triton kernel {name}", lambda: getattr(importlib.import_module(module), name), right)


def tried(what: str, load: Callable[[], T | None], right: Callable[[T], bool]) -> T | None:
    """What `load()` gives if `right` of it; else None and, unless `load` gave None, a warning with the reason.

    Compilers are called (Triton compiles its launcher with the machine's C compiler) and libraries loaded: what can go wrong there has no
    type of its own, so whatever is raised is told.
    """
    try:
        with outside():  # whoever asks first may have tensors without numbers
            found = load()
            if found is None or right(found):
                return found
        problem = "it gives other numbers than PyTorch's own operations"
    except Exception as error:  # see above
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
    warnings.warn(f"going on without {what}: {problem}", stacklevel=3)
    return None
