"""Each case is made once in a session."""

from collections.abc import Callable

import pytest

from tests.parity.cases import Made, make


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    found: dict[str, Made] = {}

    def give(name: str) -> Made:
        if name not in found:
            found[name] = make(name, tmp_path_factory.mktemp(name))
        return found[name]

    return give
