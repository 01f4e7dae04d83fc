"""Where the shared reference material lies, when it is there at all."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data sets, tokenizers, a small pretrained model and golden tensors; tests that need it skip without it."""
    if not (SHARED / "data").is_dir():
        pytest.skip("the shared reference material (../shared) is not here")
    return SHARED
