"""Where the shared reference material lies, when it is there at all; tiny models, and the command line to run them with."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported, by whomever

import torch  # noqa: E402

from tests.recipes.commands import Commands
from tests.recipes.toys import Toys, make_toys

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data sets, tokenizers, a small pretrained model and golden tensors; tests that need it skip without it."""
    if not (SHARED / "data").is_dir():
        pytest.skip("the shared reference material (../shared) is not here")
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tokens are not kept where the person who runs the tests keeps theirs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRUELINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    """A tiny model of each family, data files, and a configuration for every stage."""
    return make_toys(tmp_path_factory.mktemp("toys"))


@pytest.fixture(scope="session")
def trueline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """The command line: `trueline("sft", "config.yaml").ok()`. It computes in one thread, and so from here on do the tests beside it."""
    torch.set_num_threads(1)
    commands = Commands(tmp_path_factory.mktemp("commands"))
    yield commands
    commands.close()
