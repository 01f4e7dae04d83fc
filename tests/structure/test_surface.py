"""The outer surface changes only on purpose: the difference is printed, and one command accepts it."""

import re
from difflib import unified_diff
from pathlib import Path

import pytest

from tests.structure.surface import PAGE, SURFACE, surface
from tests.structure.tree import ROOT
from trueline.config.describe import describe, reference_page
from trueline.config.load import load_config
from trueline.config.schema import STAGES, Config, GenerateConfig

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def difference(frozen: Path, now: str) -> str:
    before = frozen.read_text(encoding="utf-8") if frozen.exists() else ""
    lines = unified_diff(before.splitlines(), now.splitlines(), f"{frozen.name} (frozen)", "now", lineterm="", n=0)
    return "\n".join(lines)


def test_surface_is_frozen() -> None:
    changed = difference(SURFACE, surface())
    assert not changed, f"the outer surface changed; if it should have, run `make frozen` and say so in CHANGELOG.md:\n{changed}"


def test_configuration_page_is_current() -> None:
    changed = difference(PAGE, reference_page())
    assert not changed, f"docs/configuration.md is not what the schema says; run `make frozen`:\n{changed}"


@pytest.mark.parametrize("schema", [*STAGES.values(), GenerateConfig], ids=lambda schema: schema.__name__)
def test_every_key_has_a_sentence(schema: type[Config]) -> None:
    wordless = [key.name for key in describe(schema).values() if not re.search(r"\w.*[.)]$", key.sentence.strip(), re.DOTALL)]
    assert not wordless, f"no sentence: {wordless}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configuration_loads(path: Path) -> None:
    """The file's name says its command: qwen2_sft_lora.yaml is for `trueline sft`. Loading refuses every key that is not known."""
    stages = [part for part in path.stem.split("_") if part in STAGES]
    assert len(stages) == 1, f"{path.name} names {stages or 'no'} command, expected exactly one of {', '.join(STAGES)}"
    load_config(STAGES[stages[0]], [path])
