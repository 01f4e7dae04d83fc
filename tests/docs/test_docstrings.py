"""Every example in a docstring holds."""

import doctest
import importlib

import pytest

from tests.structure.tree import ROOT, modules


def _with_examples() -> list[str]:
    paths = {name: ROOT / f"{name.replace('.', '/')}.py" for name in modules()}
    return [name for name, path in paths.items() if path.is_file() and ">>> " in path.read_text("utf-8")]


@pytest.mark.parametrize("name", _with_examples())
def test_the_examples_hold(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted and not result.failed
