"""Numbers that a change must not move unseen, and the whole chain from SFT to an answer."""

import math
import shutil
from pathlib import Path

import pytest
import torch

import trueline as api
from tests.recipes.commands import Commands
from tests.recipes.reading import PROBES, metrics, records, status
from tests.recipes.toys import KINDS, Toys, lines

LN_2 = math.log(2)


def test_sft_falls_to_its_pinned_loss(toys: Toys, trueline: Commands, tmp_path: Path) -> None:
    """In float64, so that no processor's rounding grows into a difference; by then the model does what the data shows, and more."""
    settings = ["model.dtype=float64", "optimizer.lr=0.005", "run.steps=80", "run.save_every=0"]
    trueline("sft", toys.config("sft"), f"run.output={tmp_path / 'run'}", *settings).ok()
    losses = {line["step"]: line["loss"] for line in metrics(tmp_path / "run")}
    pinned = {1: 7.157700, 40: 0.308538, 80: 0.105457}
    assert {step: losses[step] for step in pinned} == pytest.approx(pinned, abs=1e-4)
    answers = api.load(str(tmp_path / "run" / "model")).generate(["say red 绿", "say blue one", "say red one"], max_new_tokens=8)
    assert [answer.text for answer in answers] == ["绿 red", "one blue", "one red"]


def test_dpo_starts_at_ln_2_from_any_adapter(toys: Toys, trueline: Commands, tmp_path: Path) -> None:
    """Also where the policy goes on from a trained adapter: the reference is the policy as it was then, not the bare base."""
    for kind in ("lora", "ptuning"):
        trueline("sft", toys.config("sft"), f"run.output={tmp_path / kind}", *KINDS[kind]).ok()
    starts = {"full on lora": ("lora", "full"), "lora on lora": ("lora", "lora"), "ptuning on ptuning": ("ptuning", "ptuning")}
    for name, (found, kind) in starts.items():
        folder = tmp_path / name
        trueline("dpo", toys.config("dpo"), f"model.path={tmp_path / found / 'model'}", f"run.output={folder}", *KINDS[kind]).ok()
        line = metrics(folder)[0]
        assert line["loss"] == pytest.approx(LN_2, abs=1e-6) and abs(line["margin"]) < 1e-5, name
        assert abs(metrics(folder)[1]["loss"] - LN_2) > 1e-5
    bare = ["reference.kind=adapters_off", f"model.path={tmp_path / 'lora' / 'model'}", f"run.output={tmp_path / 'bare'}"]
    trueline("dpo", toys.config("dpo"), *bare, *KINDS["lora"]).ok()
    assert abs(metrics(tmp_path / "bare")[0]["loss"] - LN_2) > 1e-3  # measured against the bare base, the adapter has moved already


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        (["dpo.loss=ipo", "dpo.beta=0.5"], (0 - 1 / (2 * 0.5)) ** 2),
        (["dpo.loss=hinge"], 1.0),
        (["dpo.label_smoothing=0.1", "dpo.beta=3"], LN_2),
    ],
)
def test_other_preference_losses_at_the_start(toys: Toys, trueline: Commands, tmp_path: Path, settings: list[str], first: float) -> None:
    trueline("dpo", toys.config("dpo"), f"run.output={tmp_path / 'run'}", *settings).ok()
    logged = metrics(tmp_path / "run")
    assert logged[0]["loss"] == pytest.approx(first, abs=1e-5) and abs(logged[1]["loss"] - first) > 1e-3


def test_references_are_the_same_however_they_are_had(toys: Toys, trueline: Commands, tmp_path: Path) -> None:
    """Adapters off, a frozen copy, another folder with the same weights, and stored ones: the same run to the last bit."""
    stored = tmp_path / "reference.safetensors"
    ways = {
        "off": ["reference.kind=adapters_off"],
        "frozen": ["reference.kind=frozen"],
        "folder": ["reference.kind=frozen", f"reference.path={toys.model()}"],
        "stored": ["reference.kind=stored", f"reference.path={stored}"],
    }
    trueline("prepare", toys.config("dpo"), f"run.output={tmp_path / 'x'}", *KINDS["lora"], *ways["stored"], "model.adapter.rank=8").ok()
    for name, settings in ways.items():
        trueline("dpo", toys.config("dpo"), f"run.output={tmp_path / name}", *KINDS["lora"], *settings).ok()
    weights = {(tmp_path / name / "model" / "adapter_model.safetensors").read_bytes() for name in ways}
    assert len(weights) == 1 and not (tmp_path / "stored" / "reference.safetensors").exists()


def test_a_weight_on_the_chosen_answers_likelihood(toys: Toys, trueline: Commands, tmp_path: Path) -> None:
    trueline("dpo", toys.config("dpo"), f"run.output={tmp_path / 'plain'}").ok()
    trueline("dpo", toys.config("dpo"), f"run.output={tmp_path / 'mixed'}", "dpo.sft_weight=0.5").ok()
    plain, mixed = (metrics(tmp_path / name)[0]["loss"] for name in ("plain", "mixed"))
    assert mixed > plain + 1.0  # half of the several nats per token of an untrained model


@pytest.mark.parametrize("stage", ["sft", pytest.param("ppo", marks=pytest.mark.slow)])
def test_recompute_changes_nothing_but_memory(toys: Toys, trueline: Commands, tmp_path: Path, stage: str) -> None:
    """None, all, and what `auto` chooses with little memory; also when a run goes on with less memory than it began with."""
    dropout = ["model.adapter.dropout=0.2"] if stage == "sft" else []
    ways = {"none": ["false"], "all": ["true"], "auto": ["auto"], "short": ["auto", "batch.memory=1"]}
    said = {}
    for name, (recompute, *memory) in ways.items():
        settings = [f"run.output={tmp_path / name}", f"model.recompute={recompute}", *memory, *KINDS["lora"], *dropout]
        said[name] = trueline(stage, toys.config(stage), *settings).ok().out
    assert "auto recomputes 0 of 2 layers" in said["auto"] and "auto recomputes 2 of 2 layers" in said["short"]
    shutil.rmtree(tmp_path / "auto" / "checkpoints" / "step-000002")
    again = trueline(stage, toys.config(stage), f"run.output={tmp_path / 'auto'}", "batch.memory=1", *KINDS["lora"], *dropout).ok().out
    assert "going on from" in again and "auto recomputes 2 of 2 layers" in again
    weights = {(tmp_path / name / "model" / "adapter_model.safetensors").read_bytes() for name in ways}
    assert len(weights) == 1


def test_the_whole_chain(toys: Toys, trueline: Commands, tmp_path: Path) -> None:
    """SFT, a reward model from it, PPO of the one by the other on one trunk, export, and an answer."""
    adapter = ["model.path={sft}", *KINDS["lora"]]
    trueline("sft", toys.config("sft"), f"run.output={tmp_path / 'sft'}", "run.steps=12", *KINDS["lora"], "model.adapter.dropout=0.1").ok()
    start = [text.format(sft=tmp_path / "sft" / "model") for text in adapter]
    held_out = ["data.eval_fraction=0.2", "run.steps=20"]
    trueline("reward", toys.config("reward"), f"run.output={tmp_path / 'reward'}", *start, *held_out).ok()
    assert metrics(tmp_path / "reward", "eval")[-1]["accuracy"] == 1.0
    judged = ["reward.function=null", f"reward.model={tmp_path / 'reward' / 'model'}"]
    planned = trueline("ppo", toys.config("ppo"), f"run.output={tmp_path / 'ppo'}", *start, *judged, "--dry-run").ok().out
    assert "# trunks in memory: 1\n" in planned
    trueline("ppo", toys.config("ppo"), f"run.output={tmp_path / 'ppo'}", *start, *judged, "run.steps=3").ok()
    first = metrics(tmp_path / "ppo")[0]
    assert first["kl"] == 0 and first["logprob_gap_max"] < 1e-4
    parents = status(tmp_path / "ppo")["parents"]
    assert set(parents) == {str(tmp_path / "sft" / "model"), str(tmp_path / "reward" / "model")} and len(set(parents.values())) == 2
    printed = trueline("export", tmp_path / "ppo", tmp_path / "out", "--merge").ok().out
    assert "merged model, read back and equal" in printed
    torch.testing.assert_close(
        torch.cat(api.load(str(tmp_path / "out")).logprobs(PROBES)),
        torch.cat(api.load(str(tmp_path / "ppo" / "model")).logprobs(PROBES)),
        rtol=0,
        atol=1e-4,
    )
    prompts = lines(tmp_path / "prompts.jsonl", [{"prompt": "say red 绿"}, {"prompt": "say blue one"}])
    trueline("generate", tmp_path / "out", "--prompts", prompts, "--out", tmp_path / "answers.jsonl", "max_new_tokens=8").ok()
    answers = records(tmp_path / "answers.jsonl")
    assert [a["prompt"] for a in answers] == ["say red 绿", "say blue one"] and all(a["tokens"] for a in answers)


@pytest.mark.parametrize(("stage", "section"), [("dpo", "dpo"), ("reward", "ranking")])
def test_shared_prompts_are_the_same_run(toys: Toys, trueline: Commands, tmp_path: Path, stage: str, section: str) -> None:
    """Every number but how many tokens were run; `auto` shares where it saves more than a tenth, and says so."""
    held_out = ["model.dtype=float64", "data.eval_fraction=0.2", f"data.cache={tmp_path / 'cache'}"]
    long = lines(tmp_path / "long.jsonl", [{"prompt": "say red one " * 8, "chosen": f"{i} red", "rejected": f"no {i}"} for i in range(12)])
    short = lines(tmp_path / "short.jsonl", [{"prompt": "a", "chosen": f"{i} red " * 50, "rejected": f"no {i} " * 50} for i in range(12)])
    for name, file in (("long", long), ("short", short)):
        found, said = {}, {}
        for wanted in ("true", "false", "auto"):
            folder = tmp_path / f"{name}-{wanted}"
            settings = [f"data.train={file}", f"{section}.share_prefix={wanted}", "batch.max_tokens=3000", "data.max_length=512", *held_out]
            said[wanted] = trueline(stage, toys.config(stage), f"run.output={folder}", *settings).ok().out
            found[wanted] = metrics(folder)
        other = {"tokens", "tokens_per_second", "seconds"}
        for shared, plain, chosen in zip(*(found[x] for x in ("true", "false", "auto")), strict=True):
            assert {k: v for k, v in shared.items() if k not in other} == pytest.approx({k: v for k, v in plain.items() if k not in other})
            if "tokens" in plain:
                assert shared["tokens"] < plain["tokens"]
                assert chosen["tokens"] == (shared if name == "long" else plain)["tokens"]
        assert ["times fewer tokens" in said[x] for x in ("true", "false", "auto")] == [True, False, name == "long"]


def test_updates_in_the_backward_pass_are_the_same_run(toys: Toys, trueline: Commands, tmp_path: Path) -> None:
    written, told = {}, {}
    for name, settings in {
        "plain": ["batch.max_tokens=1000"],
        "inside": ["batch.max_tokens=1000", "optimizer.in_backward=true"],
        "cut": ["batch.max_tokens=70", "optimizer.in_backward=true"],
    }.items():
        folder = tmp_path / name
        told[name] = trueline("sft", toys.config("sft"), f"run.output={folder}", "optimizer.max_norm=null", *settings).ok().out
        written[name] = (folder / "model" / "model.safetensors").read_bytes()
    assert written["inside"] == written["plain"]
    assert told["cut"].count("holds all gradients") == 1 and "holds all gradients" not in told["inside"]
    refused = trueline("sft", toys.config("sft"), f"run.output={tmp_path / 'no'}", "optimizer.in_backward=true").refused()
    assert "set optimizer.max_norm=null too" in refused
