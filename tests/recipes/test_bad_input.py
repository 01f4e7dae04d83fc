"""What a person gets wrong: one clear sentence, exit code 2 (1 for a full disk), and nothing half-written."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.recipes.commands import Commands
from tests.recipes.reading import metrics, status
from tests.recipes.toys import KINDS, STAGES, Toys, lines, turns
from trueline.train import checkpoint

GOOD = {
    "sft": {"messages": [{"role": "user", "content": "say a"}, {"role": "assistant", "content": "a"}]},
    "reward": {"prompt": "say a", "chosen": "a", "rejected": "b"},
    "dpo": {"prompt": "say a", "pos_resp": "a", "neg_resp": "b"},
    "ppo": {"prompt": "say a"},
}


@pytest.fixture
def refused(trueline: Commands, toys: Toys, tmp_path: Path) -> Any:
    """Runs a stage that must be refused, and gives its message; the run's folder must not have come to be."""

    def run(stage: str, *settings: str | Path) -> str:
        before = set(tmp_path.rglob("*"))
        message = trueline(stage, toys.config(stage), f"run.output={tmp_path / 'run'}", *settings).refused()
        assert set(tmp_path.rglob("*")) == before
        return message

    return run


@pytest.mark.parametrize("stage", STAGES)
def test_files(refused: Any, tmp_path: Path, stage: str) -> None:
    missing = tmp_path / "none.jsonl"
    assert f"{missing}: " in refused(stage, f"data.train={missing}")
    empty = lines(tmp_path / "empty.jsonl", [])
    assert f"{empty}: empty file, expected at least one record" in refused(stage, f"data.train={empty}")
    assert f"{empty}: empty file" in refused(stage, f"data.eval={empty}")
    (tmp_path / "empty.json").write_text("[]")
    assert f"no records in {tmp_path / 'empty.json'}" in refused(stage, f"data.train={tmp_path / 'empty.json'}")
    (tmp_path / "folder.jsonl").mkdir()
    assert str(tmp_path / "folder.jsonl") in refused(stage, f"data.train={tmp_path / 'folder.jsonl'}")
    garbage = tmp_path / "garbage.jsonl"
    garbage.write_bytes(json.dumps(GOOD[stage]).encode() + b"\n{not json}\n" + b"\xff\xfe\n")
    message = refused(stage, f"data.train={garbage}")
    assert f"{garbage}:2" in message and f"{garbage}:3" in message


def test_an_unreadable_file_names_itself(refused: Any, tmp_path: Path) -> None:
    target = tmp_path / "loop.jsonl"
    target.symlink_to(target)  # permissions do not stop the superuser
    assert str(target) in refused("sft", f"data.train={target}")


@pytest.mark.parametrize(
    ("stage", "bad", "what"),
    [
        ("sft", {"messages": [{"role": "assistant", "content": "a"}]}, "messages[0]: first turn must be the user's, found assistant"),
        ("sft", {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}, "empty"),
        ("reward", {"prompt": "a", "chosen": "b"}, "rejected: missing, expected text"),
        ("reward", {"prompt": "a", "chosen": "b", "rejected": ""}, "rejected: empty, expected text"),
        ("dpo", {"prompt": "a", "neg_resp": "b"}, "pos_resp: missing, expected text"),
        ("ppo", {"prompt": ""}, "prompt: empty, expected text"),
    ],
)
def test_every_bad_record_is_named(refused: Any, tmp_path: Path, stage: str, bad: dict[str, Any], what: str) -> None:
    file = lines(tmp_path / "bad.jsonl", [GOOD[stage], bad, GOOD[stage], bad])
    message = refused(stage, f"data.train={file}")
    assert f"{file}:2" in message and f"{file}:4" in message and message.count(what) == 2 and f"{file}:3" not in message


def test_data_of_another_kind(refused: Any, toys: Toys) -> None:
    assert "expected two answers to each prompt" in refused("dpo", f"data.train={toys.data('messages.jsonl')}")
    assert "expected conversations with the assistant's answers" in refused("sft", f"data.train={toys.data('prompts.jsonl')}")


def test_a_record_the_family_cannot_render_is_named(refused: Any, toys: Toys, tmp_path: Path) -> None:
    tools = {"tools": [{"type": "function", "function": {"name": "f"}}]}
    file = lines(tmp_path / "tools.jsonl", [GOOD["sft"], GOOD["sft"] | tools])
    message = refused("sft", f"data.train={file}", f"model.path={toys.model('llama')}")
    assert f"{file}:2: this llama model has no format for tools" in message


def long_records(stage: str) -> list[dict[str, Any]]:
    """A good one; one whose prompt alone is too long; and, where there are answers, one whose answer is."""
    prompt, answer = "say " + "a b " * 60, "a b " * 60
    made: dict[str, list[dict[str, Any]]] = {
        "sft": [turns("say a", "a"), turns(prompt, "a"), turns("say ab", answer)],
        "reward": [{"prompt": q, "chosen": c, "rejected": "no"} for q, c in (("say a", "a"), (prompt, "a"), ("say a", answer))],
        "ppo": [{"prompt": q} for q in ("say a", prompt)],
    }
    return made["reward" if stage == "dpo" else stage]


@pytest.mark.parametrize("stage", STAGES)
def test_a_record_longer_than_the_window(refused: Any, trueline: Commands, toys: Toys, tmp_path: Path, stage: str) -> None:
    file = lines(tmp_path / "long.jsonl", long_records(stage))
    short, steps = ["data.max_length=100", f"data.train={file}"], ["batch.sequences=1", "run.steps=1"]
    message = refused(stage, *short)
    assert f"{file}:2: " in message and f"{file}:1" not in message and (stage == "ppo" or f"{file}:3: " in message)
    assert "raise data.max_length, or set data.overlength to drop or truncate" in message
    for overlength, said in (("drop", "left out: longer than"), ("truncate", "cut at 100 tokens")):
        folder = tmp_path / overlength
        done = trueline(stage, toys.config(stage), f"run.output={folder}", *short, *steps, f"data.overlength={overlength}").ok()
        dropped, cut = (1, 1) if overlength == "truncate" and stage != "ppo" else (len(long_records(stage)) - 1, 0)
        assert f"{dropped} of {len(long_records(stage))} records left out: longer than" in done.out
        assert (f"{cut} of 3 records {said}" in done.out) == bool(cut)
        assert metrics(folder)[0]["tokens"] > 0
    only = lines(tmp_path / "only.jsonl", long_records(stage)[1:2])
    message = refused(stage, *short, f"data.train={only}", "data.overlength=truncate")
    assert f"nothing is left to train on in {only}: 1 of 1 records left out" in message


@pytest.mark.parametrize("stage", STAGES)
def test_a_micro_batch_too_small_for_a_record(refused: Any, stage: str) -> None:
    assert "raise batch.max_tokens to at least" in refused(stage, "batch.max_tokens=20")


def test_answers_that_leave_no_room_for_a_prompt(refused: Any) -> None:
    assert "sampling.max_new_tokens (200) leaves no room for a prompt" in refused("ppo", "sampling.max_new_tokens=200")


# models


def broken(toys: Toys, folder: Path, how: str) -> Path:
    shutil.copytree(toys.model(), folder)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    if how == "without weights":
        weights.unlink()
    elif how == "pickled":
        weights.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    elif how == "cut short":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "without config":
        (folder / "config.json").unlink()
    elif how == "without tokenizer":
        (folder / "tokenizer.json").unlink()
    elif how == "unknown family":
        (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | {"model_type": "qwen3"}))
    else:
        if how == "missing tensor":
            del tensors["model.layers.1.mlp.up_proj.weight"]
        if how == "extra tensor":
            tensors["model.layers.2.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].clone()
        if how == "other shape":
            tensors["model.norm.weight"] = torch.ones(31)
        save_file(tensors, weights)
    return folder


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("without weights", "no weights, expected model.safetensors"),
        ("pickled", "pytorch_model.bin"),
        ("cut short", "model.safetensors"),
        ("missing tensor", "model.layers.1.mlp.up_proj.weight: missing"),
        ("extra tensor", "model.layers.2.mlp.up_proj.weight: no part of this qwen2 model"),
        ("other shape", "model.norm.weight: shape [31], expected [32]"),
        ("without config", "no config.json, so not a model folder"),
        ("without tokenizer", "has no tokenizer files; set model.tokenizer"),
        ("unknown family", "qwen3"),
    ],
)
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_model_folders(refused: Any, toys: Toys, tmp_path: Path, stage: str, how: str, words: str) -> None:
    folder = broken(toys, tmp_path / "model", how)
    message = refused(stage, f"model.path={folder}")
    assert words in message and str(folder) in message


def test_a_model_that_is_not_there(refused: Any, tmp_path: Path) -> None:
    for stage in STAGES:
        assert f"{tmp_path / 'none'}: no such folder" in refused(stage, f"model.path={tmp_path / 'none'}")


@pytest.fixture(scope="module")
def adapters(trueline: Commands, toys: Toys, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """SFT adapters of both kinds, and a reward model's."""
    home = tmp_path_factory.mktemp("adapters")
    for kind in ("lora", "ptuning"):
        trueline("sft", toys.config("sft"), f"run.output={home / kind}", "run.steps=1", *KINDS[kind]).ok()
    trueline("reward", toys.config("reward"), f"run.output={home / 'reward'}", "run.steps=1", *KINDS["lora"]).ok()
    return {name: home / name / "model" for name in ("lora", "ptuning", "reward")}


def test_an_adapter_of_another_base(refused: Any, toys: Toys, adapters: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(toys.model(), other)
    tensors = load_file(other / "model.safetensors")
    save_file({name: tensor + 0.01 for name, tensor in tensors.items()}, other / "model.safetensors")
    moved = tmp_path / "adapter"
    for base, words in ((other, "fingerprint"), (toys.model("glm"), "fingerprint"), (tmp_path / "gone", "its base is not to be had")):
        shutil.copytree(adapters["lora"], moved, dirs_exist_ok=True)
        written = json.loads((moved / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(base)}
        (moved / "adapter_config.json").write_text(json.dumps(written))
        message = refused("sft", f"model.path={moved}", *KINDS["lora"])
        assert words in message and str(moved) in message
    (moved / "trueline.json").unlink()  # PEFT's own adapters carry no fingerprint; their names and shapes speak
    written["base_model_name_or_path"] = str(toys.model("glm"))
    (moved / "adapter_config.json").write_text(json.dumps(written))
    assert "does not fit" in refused("sft", f"model.path={moved}", *KINDS["lora"])


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo"])
def test_the_adapter_that_is_there_and_the_one_that_is_wanted(refused: Any, adapters: dict[str, Path], stage: str) -> None:
    lora, ptuning = (f"model.path={adapters[kind]}" for kind in ("lora", "ptuning"))
    message = refused(stage, lora, *KINDS["lora"], "model.adapter.rank=2")
    assert "holds a lora adapter with rank: 4, and model.adapter asks for rank: 2" in message
    assert "holds a lora adapter with kind: lora" in refused(stage, lora, *KINDS["ptuning"])
    assert "holds a ptuning adapter with kind: ptuning" in refused(stage, ptuning, *KINDS["lora"])
    assert "holds a ptuning adapter, which cannot be merged into weights" in refused(stage, ptuning, *KINDS["full"])
    assert "model.init: random makes no sense for the adapter folder" in refused(stage, lora, "model.init=random")


def test_the_critics_adapter_is_named_as_the_critics(refused: Any, adapters: dict[str, Path]) -> None:
    message = refused("ppo", f"model.path={adapters['lora']}", *KINDS["lora"], "critic.adapter.kind=lora", "critic.adapter.rank=2")
    assert "and critic.adapter asks for" in message


@pytest.mark.parametrize("stage", ["sft", "dpo", "ppo"])
def test_a_reward_model_cannot_speak(refused: Any, adapters: dict[str, Path], stage: str) -> None:
    assert "is a reward model: it scores answers and cannot write them" in refused(stage, f"model.path={adapters['reward']}")
    if stage != "sft":
        frozen = ["reference.kind=frozen", f"reference.path={adapters['reward']}"]
        assert "is a reward model" in refused(stage, *frozen)


# rewards and references


def test_rewards(refused: Any, toys: Toys, adapters: dict[str, Path], tmp_path: Path) -> None:
    judges = toys.data("judges.py")
    model = ["reward.function=null", f"reward.model={toys.model()}"]
    assert f"reward.model: {toys.model()} has no score head, so it is no reward model" in refused("ppo", *model)
    model[1] = f"reward.model={adapters['lora']}"
    assert "has no score head, so it is no reward model" in refused("ppo", *model)
    assert "has no score head, so it is no reward model" in refused("ppo", *model, *KINDS["lora"])
    assert "give exactly one of reward.model and reward.function" in refused("ppo", f"reward.model={toys.model()}")
    assert "there is no file nowhere.py" in refused("ppo", "reward.function=nowhere.py:f")
    assert "is not of the form file.py:function" in refused("ppo", f"reward.function={judges}")
    assert "has no function shortest; did you mean shorter?" in refused("ppo", f"reward.function={judges}:shortest")
    (tmp_path / "broken.py").write_text("def f(answers:\n")
    assert "cannot be loaded: SyntaxError" in refused("ppo", f"reward.function={tmp_path / 'broken.py'}:f")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("raises", "failed: ZeroDivisionError: division by zero at "),
        ("too_few", "returned 1 numbers for 8 answers; expected one for each"),
        ("not_finite", "returned nan for answer 1 of 8; expected a finite number"),
        ("slow", "took longer than 0.5 s for 8 answers and was killed; raise reward.timeout"),
    ],
)
def test_a_reward_function_that_fails_stops_the_run(trueline: Commands, toys: Toys, tmp_path: Path, function: str, words: str) -> None:
    settings = [f"reward.function={toys.data('judges.py')}:{function}", "reward.timeout=0.5", "reward.overlap=false"]
    settings += [f"run.output={tmp_path / 'run'}"]
    message = trueline("ppo", toys.config("ppo"), *settings).refused(1)
    assert words in message and len(message.splitlines()) == 1
    assert status(tmp_path / "run")["status"] == "failed" and words in status(tmp_path / "run")["error"]
    assert not (tmp_path / "run" / "model").exists() and not (tmp_path / "run" / "checkpoints").exists()


def test_dropout_in_ppo(refused: Any) -> None:
    sentence = "model.adapter.dropout and critic.adapter.dropout must be 0 in ppo, or rollout and training would differ"
    for setting in ("model.adapter.dropout=0.1", "critic.adapter.dropout=0.1"):
        assert sentence in refused("ppo", *KINDS["lora"], setting)


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_numbers_that_run_away_stop_the_run(trueline: Commands, toys: Toys, tmp_path: Path, stage: str) -> None:
    """Before the update that would spoil the weights, and with what the step was made of."""
    message = trueline(stage, toys.config(stage), f"run.output={tmp_path / 'run'}", "optimizer.lr=1e30").refused(1)
    assert "is not finite; stopped before the update, the last checkpoint is sound. Lower optimizer.lr" in message
    bad = json.loads((tmp_path / "run" / "bad-batch.json").read_text())
    assert bad["tensor"] in message and bad["sequences"] and len(bad["sequences"][0]["tokens"]) == len(bad["sequences"][0]["trained"])
    assert status(tmp_path / "run")["status"] == "failed" and not (tmp_path / "run" / "model").exists()


def test_stored_references(trueline: Commands, toys: Toys, refused: Any, tmp_path: Path) -> None:
    stored = tmp_path / "reference.safetensors"
    settings = ["reference.kind=stored", f"reference.path={stored}"]
    assert f"reference.path: {stored} does not exist; write it with `trueline prepare`" in refused("dpo", *settings)
    done = trueline("prepare", toys.config("dpo"), f"run.output={tmp_path / 'run'}", *settings).ok()
    assert str(stored) in done.out and not (tmp_path / "run").exists()
    assert "was made for other model" in refused("dpo", *settings, f"model.path={toys.model('llama')}", f"model.tokenizer={toys.model()}")
    assert "was made for other pairs" in refused("dpo", *settings, "data.limit=10")
    stored.write_bytes(stored.read_bytes()[:50])
    assert f"reference.path: {stored} cannot be read" in refused("dpo", *settings)


# folders and disks


def test_an_output_folder_that_is_taken(trueline: Commands, toys: Toys, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    trueline("sft", toys.config("sft"), f"run.output={folder}").ok()
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    for stage in ("reward", "dpo", "ppo"):
        message = trueline(stage, toys.config(stage), f"run.output={folder}").refused()
        assert f"run.output: {folder} holds another stage's run (sft); choose another folder" in message
    evaluation = [toys.config("sft"), "batch.sequences=4"]
    assert trueline("evaluate", *evaluation, f"run.output={folder}").code == 2
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    own = tmp_path / "own"
    own.mkdir()
    (own / "samples.jsonl").write_text("a person's own\n")
    message = trueline("sft", toys.config("sft"), f"run.output={own}").refused()
    assert f"run.output: {own} has a samples.jsonl that no run left there" in message
    assert [p.name for p in own.iterdir()] == ["samples.jsonl"] and (own / "samples.jsonl").read_text() == "a person's own\n"
    assert "cannot be used as a folder" in trueline("sft", toys.config("sft"), f"run.output={own / 'samples.jsonl'}").refused()


@pytest.mark.parametrize("limit", [350, 600, 1500])
@pytest.mark.parametrize("stage", ["dpo", "ppo"])
def test_a_full_disk_from_the_start(trueline: Commands, toys: Toys, tmp_path: Path, stage: str, limit: int) -> None:
    """Already the reference, the status, the configuration or the log does not fit."""
    folder = tmp_path / "run"
    message = trueline(stage, toys.config(stage), f"run.output={folder}", file_limit=limit).refused(1)
    assert len(message.splitlines()) == 1 and ("disk full" in message or "disk is full" in message)
    assert [p for p in folder.rglob("*") if ".tmp" in p.name] == []


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk(trueline: Commands, toys: Toys, tmp_path: Path, stage: str) -> None:
    """A limit on a file's size stands for the disk's end; here it comes with the first checkpoint."""
    folder = tmp_path / "run"
    message = trueline(stage, toys.config(stage), f"run.output={folder}", file_limit=60_000).refused(1)
    assert message.startswith("disk full: ") and len(message.splitlines()) == 1, message
    assert status(folder)["status"] == "failed" and checkpoint.steps(folder) == []
    left = [p for p in folder.rglob("*") if p.suffix == ".tmp" or p.name.startswith(".model")]
    assert left == [] and not (folder / "model").exists()
    trueline(stage, toys.config(stage), f"run.output={folder}").ok()  # room was made


def test_a_disk_that_is_full_when_the_model_is_written(trueline: Commands, toys: Toys, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    largest = ["sft", toys.config("sft"), f"run.output={folder}", *KINDS["lora"], "model.init=random"]
    message = trueline(*largest, file_limit=60_000).refused(1)  # the adapter's checkpoint fits, the base does not
    assert f"{folder / 'base'}: could not be written (the disk is full; free some space and start the same command again)" in message
    assert checkpoint.steps(folder) == [1, 2] and not (folder / "model").exists() and not (folder / "base").exists()
    trueline(*largest).ok()
    assert (folder / "base" / "model.safetensors").exists() and status(folder)["resumed_from"] == 2
