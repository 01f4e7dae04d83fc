"""The stages from Python: a path, a dictionary or the schema's own class, and the folder of the model back."""

from pathlib import Path

import pytest
import torch

import trueline as api
from tests.recipes.commands import Commands
from tests.recipes.toys import Toys
from trueline.config.load import load_config
from trueline.config.schema import SftConfig
from trueline.errors import UserError


def test_every_stage_from_a_dictionary(toys: Toys, tmp_path: Path) -> None:
    run = {"steps": 1}
    sft = api.sft(toys.dictionary("sft", run=run | {"output": str(tmp_path / "sft")}))
    reward = api.reward(toys.dictionary("reward", run=run | {"output": str(tmp_path / "reward")}))
    dpo = api.dpo(toys.dictionary("dpo", run=run | {"output": tmp_path / "dpo"}))
    ppo = api.ppo(toys.dictionary("ppo", run=run | {"output": str(tmp_path / "ppo")}, reward={"function": None, "model": str(reward)}))
    assert [sft, reward, dpo, ppo] == [tmp_path / stage / "model" for stage in ("sft", "reward", "dpo", "ppo")]
    data, output = {"eval": str(toys.data("messages.jsonl"))}, {"output": str(tmp_path / "evaluation")}
    assert api.evaluate({"model": {"path": str(ppo)}, "data": data, "generate": False, "run": output})["loss"] > 0
    assert api.load(ppo).generate(["say red"], max_new_tokens=3)[0].text is not None
    assert len(api.load(reward).score([[40, 41]])) == 1


def test_a_path_a_dictionary_and_the_class_are_the_same(toys: Toys, trueline: Commands, tmp_path: Path) -> None:
    given = toys.dictionary("sft", run={"output": str(tmp_path / "from-dictionary"), "steps": 2})
    config = load_config(SftConfig, [toys.config("sft")], [f"run.output={tmp_path / 'from-class'}", "run.steps=2"])
    trueline("sft", toys.config("sft"), f"run.output={tmp_path / 'shell'}").ok()
    file = tmp_path / "file.yaml"
    file.write_text((tmp_path / "shell" / "config.yaml").read_text().replace("shell", "from-path"))
    folders = [api.sft(given), api.sft(config), api.sft(file), api.sft(str(file)), tmp_path / "shell" / "model"]
    assert len({(folder / "model.safetensors").read_bytes() for folder in folders}) == 1


def test_mistakes_are_the_command_lines(toys: Toys, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown key"):
        api.sft({"modle": {}})
    with pytest.raises(UserError, match="expected a YAML file, a dictionary or a SftConfig, found a int"):
        api.sft(3)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="none.yaml"):
        api.dpo(tmp_path / "none.yaml")


def test_what_a_model_cannot_do(toys: Toys) -> None:
    model = api.load(toys.model("llama"))
    with pytest.raises(UserError, match="is not a reward model: it has no score head"):
        model.score([[1, 2]])
    with pytest.raises(UserError, match="an empty list of tokens"):
        model.logprobs([[]])
    with pytest.raises(UserError, match="first turn must be the user's"):
        model.render([{"role": "assistant", "content": "a"}])
    assert [float(row[0]) for row in model.logprobs([[5, 6, 7], [8]])] == [0.0, 0.0]
    torch.testing.assert_close(model.logprobs([[5, 6, 7], [5, 6]])[0][:2], model.logprobs([[5, 6]])[0])
