"""Aligns language models. The public names are loaded on first use, so that `import trueline` costs nothing."""

import importlib
from typing import Any

__version__ = "0.1.0"

_API = ("dpo", "evaluate", "load", "ppo", "reward", "sft")

__all__ = ["__version__", "dpo", "evaluate", "load", "ppo", "reward", "sft"]


def __getattr__(name: str) -> Any:
    if name in _API:
        return getattr(importlib.import_module("trueline.api"), name)
    raise AttributeError(f"module 'trueline' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
