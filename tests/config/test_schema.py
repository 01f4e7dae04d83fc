"""Bad combinations are refused when the configuration is loaded, by name."""

import pytest
from pydantic import ValidationError

from trueline.config.load import from_any
from trueline.config.schema import STAGES, DpoStageConfig, PpoStageConfig, SftConfig
from trueline.errors import UserError

BASE = {"model": {"path": "base"}, "data": {"train": ["a.jsonl"]}, "run": {"output": "out", "steps": 5}}
PPO = {**BASE, "reward": {"model": "judge"}}


@pytest.mark.parametrize(
    ("stage", "change", "words"),
    [
        ("sft", {"data": {}}, "data.train is empty"),
        ("sft", {"run": {"output": "o"}}, "exactly one of run.steps and run.epochs"),
        ("sft", {"run": {"output": "o", "steps": 1, "epochs": 1}}, "exactly one of run.steps and run.epochs"),
        ("sft", {"data": {"train": ["a"], "eval": ["b"], "eval_fraction": 0.1}}, "data.eval and data.eval_fraction exclude"),
        ("sft", {"run": {"output": "o", "steps": 1, "eval_every": 5}}, "run.eval_every needs held-out records"),
        ("dpo", {"dpo": {"loss": "ipo", "label_smoothing": 0.1}}, "dpo.label_smoothing needs dpo.loss: sigmoid"),
        ("dpo", {"reference": {"kind": "stored"}}, "reference.kind: stored needs reference.path"),
        ("dpo", {"reference": {"path": "x"}}, "reference.path is not used with reference.kind: auto"),
        ("dpo", {"reference": {"kind": "adapters_off"}}, "needs an adapter to switch off"),
        ("ppo", {"reference": {"kind": "adapters_off"}}, "needs an adapter to switch off"),
        ("ppo", {"reference": {"kind": "stored", "path": "x"}}, "stored is for dpo"),
        ("ppo", {"reward": {}}, "exactly one of reward.model and reward.function"),
        ("ppo", {"reward": {"model": "m", "function": "f.py:g"}}, "exactly one of reward.model and reward.function"),
        ("ppo", {"ppo": {"ptx_coefficient": 1.0}}, "ppo.ptx_coefficient and data.ptx"),
        ("ppo", {"data": {"train": ["a"], "ptx": ["b"]}}, "ppo.ptx_coefficient and data.ptx"),
        ("ppo", {"ppo": {"kl_target": 1.0, "kl_coefficient": 0}}, "ppo.kl_target adapts"),
        ("ppo", {"sampling": {"temperature": 0}}, "never explores"),
        ("ppo", {"ppo": {"minibatches": 9}}, "ppo.minibatches exceeds"),
        ("sft", {"model": {"path": "b", "dtype": "float32"}, "optimizer": {"states": "int8"}}, "optimizer.states: int8 is for bfloat16"),
        ("ppo", {"model": {"path": "b", "dtype": "float64"}, "critic": {"optimizer": {"states": "int8"}}}, "critic.optimizer.states: int8"),
        ("evaluate", {}, "data.eval is empty"),
    ],
)
def test_conflicts(stage: str, change: dict[str, object], words: str) -> None:
    whole = {**(PPO if stage == "ppo" else BASE), **change}
    with pytest.raises(UserError) as caught:
        from_any(STAGES[stage], whole)
    assert words in str(caught.value)


def test_sound_configurations_pass() -> None:
    assert from_any(SftConfig, BASE).run.steps == 5
    assert from_any(PpoStageConfig, {**PPO, "data": {"train": "a", "ptx": "b"}, "ppo": {"ptx_coefficient": 0.5}}).data.ptx == ("b",)
    with_adapter = {**BASE, "model": {"path": "b", "adapter": {"kind": "lora"}}, "reference": {"kind": "adapters_off"}}
    assert from_any(DpoStageConfig, with_adapter).reference.kind == "adapters_off"


def test_configurations_are_frozen() -> None:
    config = from_any(SftConfig, BASE)
    with pytest.raises(ValidationError):
        config.run.steps = 6  # type: ignore[misc]


def test_schema_classes_check_themselves() -> None:
    with pytest.raises(ValidationError):
        SftConfig.model_validate({**BASE, "run": {"output": "o"}})
