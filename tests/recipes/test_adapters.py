"""Adapters through the commands: DoRA and rsLoRA in every stage, and a base that was moved."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import trueline as api
from tests.recipes.commands import Commands
from tests.recipes.reading import PROBES, metrics, trained
from tests.recipes.toys import KINDS, STAGES, Toys

DORA = [*KINDS["lora"], "model.adapter.dora=true", "model.adapter.rslora=true"]


@pytest.mark.parametrize(
    ("stage", "family"),
    [
        pytest.param(stage, family, marks=[pytest.mark.slow] if (family == "glm") == (stage in ("sft", "ppo")) else [])
        for stage in STAGES
        for family in ("qwen2", "glm")
    ],
)
def test_dora_in_every_stage(toys: Toys, trueline: Commands, tmp_path: Path, stage: str, family: str) -> None:
    """Trained, saved as PEFT's, and read back: the finished folder is what the newest checkpoint holds."""
    out = tmp_path / "run"
    trueline(stage, toys.config(stage), f"run.output={out}", f"model.path={toys.model(family)}", *DORA).ok()
    options = json.loads((out / "model" / "adapter_config.json").read_text())
    assert options["use_dora"] and options["use_rslora"] and options["lora_alpha"] == 8
    model = api.load(out / "model")
    found = torch.tensor(model.score(PROBES)) if stage == "reward" else torch.cat(model.logprobs(PROBES))
    ours = trained(out, stage)
    if stage != "reward":
        keep = torch.tensor([i > 0 for tokens in PROBES for i in range(len(tokens))])
        found, ours = found[keep], ours[keep]
    torch.testing.assert_close(found, ours, rtol=0, atol=1e-5)
    if stage == "ppo":
        assert abs(metrics(out)[0]["kl"]) < 1e-4  # a fresh DoRA has no effect: the reference is the bare trunk
    again = [stage, toys.config(stage), f"run.output={tmp_path / 'again'}", f"model.path={out / 'model'}"]
    assert "model.adapter asks for" in trueline(*again, *KINDS["lora"]).refused()
    trueline(*again, *DORA, "run.steps=1").ok()


@pytest.fixture
def moved(toys: Toys, trueline: Commands, tmp_path: Path) -> Path:
    """A tree with a base and an adapter on it, moved as a whole."""
    shutil.copytree(toys.model(), tmp_path / "old" / "models" / "base")
    trueline(
        "sft", toys.config("sft"), f"run.output={tmp_path / 'old' / 'run'}", f"model.path={tmp_path / 'old' / 'models' / 'base'}", *DORA
    ).ok()
    (tmp_path / "old").rename(tmp_path / "new")
    return tmp_path / "new"


def test_a_tree_that_was_moved_as_a_whole(moved: Path, toys: Toys, trueline: Commands, tmp_path: Path) -> None:
    model = api.load(moved / "run" / "model")
    assert model.opened.folder.path == moved / "models" / "base"
    assert torch.equal(torch.cat(model.logprobs(PROBES)), torch.cat(api.load(moved / "run" / "model", base=toys.model()).logprobs(PROBES)))
    prompts = toys.data("prompts.jsonl")
    trueline("generate", moved / "run" / "model", "--prompts", prompts, "--out", tmp_path / "answers.jsonl", "max_new_tokens=2").ok()
    (moved / "models" / "base").rename(moved / "elsewhere")
    message = trueline("generate", moved / "run" / "model", "--prompts", prompts, "--out", tmp_path / "answers.jsonl").refused()
    assert "its base is not to be had" in message and "--base DIR, or model.base" in message


def test_a_base_named_by_hand(moved: Path, toys: Toys, trueline: Commands, tmp_path: Path) -> None:
    shutil.move(moved / "models" / "base", tmp_path / "base")
    adapter, base = moved / "run" / "model", tmp_path / "base"
    prompts = ["--prompts", toys.data("prompts.jsonl"), "--out", tmp_path / "answers.jsonl"]
    trueline("generate", adapter, *prompts, "--base", base, "max_new_tokens=2").ok()
    trueline("chat", adapter, "--base", base, "max_new_tokens=2", stdin="Hello\n\n").ok()
    trueline("export", adapter, tmp_path / "out", "--merge", "--base", base).ok()
    trueline("sft", toys.config("sft"), f"run.output={tmp_path / 'more'}", f"model.path={adapter}", f"model.base={base}", *DORA).ok()
    one, two = api.load(base, adapter=str(adapter)), api.load(adapter, base=base)
    assert torch.equal(torch.cat(one.logprobs(PROBES)), torch.cat(two.logprobs(PROBES)))
    other = tmp_path / "other"
    trueline("sft", toys.config("sft"), f"run.output={other}", "run.steps=1").ok()
    assert "was trained on" in trueline("generate", adapter, *prompts, "--base", other / "model").refused()
    message = trueline("generate", base, *prompts, "--base", base).refused()
    assert "is not an adapter folder: it has no adapter_config.json, so it has no base" in message
