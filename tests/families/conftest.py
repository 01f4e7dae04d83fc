"""A tokenizer of letters and a tiny model folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


class Letters:
    """Each letter is its code point; control tokens count from 2,000,000."""

    def __init__(self, *specials: str, files: dict[str, Path] | None = None, config: dict[str, Any] | None = None):
        self.specials = {name: 2_000_000 + i for i, name in enumerate(specials)}
        self.files, self.config = files or {}, config or {}

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def show(self, tokens: list[int]) -> str:
        names = {i: name for name, i in self.specials.items()}
        return "".join(names.get(t) or chr(t) for t in tokens)


@pytest.fixture(scope="session")
def letters() -> type[Letters]:
    return Letters


@pytest.fixture
def model_folder(tmp_path: Path) -> Callable[..., Path]:
    """A folder with only a config.json, of sizes that make a model of a few thousand weights."""

    def make(kind: str = "glm", **changes: Any) -> Path:
        sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = {"model_type": kind, **sizes, "num_key_value_heads": 2, "head_dim": 4} | changes
        if kind == "chatglm":
            config |= {"inner_hidden_size": 24, "num_layers": 2}
        folder = tmp_path / f"config_{kind}_{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
        return folder

    return make
