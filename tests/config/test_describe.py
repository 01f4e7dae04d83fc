"""Types in words: what the messages and the reference page say a key accepts."""

import pytest

from trueline.config.describe import describe, reference_page
from trueline.config.schema import STAGES, EvaluateConfig, GenerateConfig, PpoStageConfig, SftConfig


@pytest.mark.parametrize(
    ("name", "expected", "default"),
    [
        ("model.path", "text", ""),
        ("model.tokenizer", "text or null", "null"),
        ("model.adapter", "a section", ""),
        ("model.adapter.targets", "a list, each one of q, k, v, o, gate, up or down", "[q, k, v, o]"),
        ("optimizer.lr", "a number above 0", "1e-05"),
        ("optimizer.betas", "a list of 2, each a number from 0 and below 1", "[0.9, 0.95]"),
        ("run.output", "a path", ""),
        ("run.seed", "a whole number from 0 and below 2^63", "0"),
        ("run.steps", "a whole number from 1 or null", "null"),
        ("run.resume", "auto or never or a whole number from 0", "auto"),
        ("critic.adapter", "a section or null", "null"),
        ("critic.optimizer.schedule", "one of constant, linear or cosine", "cosine"),
        ("ppo.whiten", "true or false", "true"),
        ("model.recompute", "auto or true or false", "auto"),
        ("sampling.top_p", "a number above 0 and up to 1", "1.0"),
        ("data.ptx", "a list, each text", "[]"),
    ],
)
def test_keys_in_words(name: str, expected: str, default: str) -> None:
    key = describe(PpoStageConfig)[name]
    assert (key.expected, key.default) == (expected, default)


def test_required_keys_are_few() -> None:
    assert {key.name for key in describe(SftConfig).values() if key.required and not key.section} == {"model.path", "run.output"}


def test_a_default_is_what_loading_gives() -> None:
    """A section's default instance must not differ from what its keys say, or one given key would change the others."""
    for schema in (*STAGES.values(), GenerateConfig):
        for name, field in schema.model_fields.items():
            section = describe(schema)[name].section
            if section and not field.is_required() and field.default is not None:
                assert field.default == section(), f"{schema.__name__}.{name}"
    assert describe(EvaluateConfig)["sampling.temperature"].default == "0.0"


def test_page_names_every_key_and_its_commands() -> None:
    page = reference_page()
    for schema in STAGES.values():
        for key in describe(schema).values():
            assert key.section or f"| `{key.name}` |" in page
    assert "For dpo, ppo." in page.split("## `reference`")[1]
