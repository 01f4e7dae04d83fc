"""Every stage with every kind of adapter on every family: the folder a run leaves, and that its model is the one that was trained."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GlmConfig, GlmForCausalLM

import trueline as api
from tests.recipes.commands import ROOT, Commands
from tests.recipes.reading import PROBES, metrics, status, trained
from tests.recipes.toys import FAMILIES, KINDS, SIZES, STAGES, WHOLE, Toys
from tests.reference_chatglm import read_reference
from trueline.config.load import load_config
from trueline.config.schema import STAGES as SCHEMAS
from trueline.recipes.actors import PARTS
from trueline.train import checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")

COMMON = {"step", "split", "loss", "tokens", "tokens_per_second", "lr", "grad_norm"}
PREFERENCE = COMMON | {"accuracy", "margin"}
NAMES = {
    "sft": COMMON,
    "reward": PREFERENCE,
    "dpo": PREFERENCE | {"chosen_reward", "rejected_reward"},
    "ppo": COMMON | {"score", "kl", "policy_loss", "value_loss", "clip_fraction", "entropy", "explained_variance", "response_length"}
    | {"generate_seconds", "reward_seconds", "score_seconds", "update_seconds", "save_seconds", "idle_seconds", "peak_memory_mb"}
    | {"reward_overlapped_seconds", "logprob_gap_max", "kl_coefficient", "updates"},
}  # fmt: skip
Finished = Callable[[str, str, str], Path]


@pytest.fixture(scope="module")
def finished(toys: Toys, trueline: Commands, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A finished run of two steps, made at most once."""
    home, made = tmp_path_factory.mktemp("runs"), {}

    def run(stage: str, family: str, kind: str) -> Path:
        folder = home / f"{stage}-{family}-{kind}"
        if folder not in made:
            places = (f"model.path={toys.model(family)}", f"run.output={folder}")
            made[folder] = trueline(stage, toys.config(stage), *places, *KINDS[kind]).ok()
        return folder

    return run


def the_runs() -> list[Any]:
    """Every stage of every family with every kind; by default all of `WHOLE`, and of the other families each stage with one kind."""
    found = []
    for i, family in enumerate(FAMILIES):
        for j, stage in enumerate(STAGES):
            for k, kind in enumerate(KINDS):
                often = family in WHOLE or k == (i + j) % len(KINDS)
                found.append(pytest.param(stage, family, kind, marks=() if often else pytest.mark.slow))
    return found


@pytest.mark.parametrize(("stage", "family", "kind"), the_runs())
def test_a_run_leaves_its_folder_and_its_model(finished: Finished, toys: Toys, stage: str, family: str, kind: str) -> None:
    folder = finished(stage, family, kind)
    names = {"config.yaml", "run.json", "metrics.jsonl", "checkpoints", "model", "report.html"}
    assert names <= {p.name for p in folder.iterdir()}
    logged = metrics(folder)
    assert [line["step"] for line in logged] == [1, 2] and all(NAMES[stage] <= line.keys() for line in logged)
    assert None not in logged[0].values() and None not in logged[1].values()  # what is not finite is written as null
    at_the_start(stage, logged[0])
    assert {p.stat().st_mode & 0o777 for p in (folder / "model").iterdir()} == {(folder / "config.yaml").stat().st_mode & 0o777}
    found = status(folder)
    assert found["status"] == "finished" and found["step"] == found["total"] == 2 and len(found["parents"][str(toys.model(family))]) == 64
    assert checkpoint.steps(folder) == [1, 2] and not any(checkpoint.damage(p) for p in (folder / "checkpoints").iterdir())
    assert load_config(SCHEMAS[stage], [folder / "config.yaml"]).run.output == folder
    page = (folder / "report.html").read_text("utf-8")
    assert page.startswith("<!doctype html>") and "<script" not in page

    expected, loaded = trained(folder, stage), api.load(str(folder / "model"))
    before = api.load(str(toys.model(family)))
    if stage == "reward":
        ours = torch.tensor(loaded.score(PROBES))
        assert ours.abs().max() > 1e-3  # it was zero
    else:
        ours = torch.cat(loaded.logprobs(PROBES))
        assert (ours - torch.cat(before.logprobs(PROBES))).abs().max() > 1e-3
    torch.testing.assert_close(ours, expected, rtol=0, atol=0 if kind == "full" else 1e-5)
    wide = api.load(str(folder / "model"), dtype="float64")
    ours = torch.tensor(wide.score(PROBES), dtype=torch.float64) if stage == "reward" else torch.cat(wide.logprobs(PROBES))
    oracle = the_reference if family == "chatglm" else as_glm if family in ("chatglm2", "chatglm3", "chatglm4") else theirs
    torch.testing.assert_close(ours, oracle(folder / "model", toys.model(family), stage, kind), rtol=0, atol=1e-5)


def at_the_start(stage: str, line: dict[str, Any]) -> None:
    """What the first step must say whatever the model."""
    if stage == "reward":
        assert line["loss"] == pytest.approx(math.log(2), abs=1e-6) and line["accuracy"] == 0.5  # every score is zero
    if stage == "dpo":
        assert line["loss"] == pytest.approx(math.log(2), abs=1e-6) and abs(line["chosen_reward"]) < 1e-5
    if stage == "ppo":
        assert line["kl"] == 0 and line["logprob_gap_max"] < 1e-4 and line["updates"] == 4 and line["value"] == 0


@torch.no_grad()
def theirs(folder: Path, base: Path, stage: str, kind: str) -> Tensor:
    """The probes' log-probabilities (a reward model: scores) by transformers, and by PEFT on its base, in float64."""
    auto: Any = AutoModelForSequenceClassification if stage == "reward" else AutoModelForCausalLM
    labels = {"num_labels": 1} if stage == "reward" and kind != "full" else {}
    model = auto.from_pretrained(folder if kind == "full" else base, dtype=torch.float64, **labels)
    if kind != "full":
        model = PeftModel.from_pretrained(model, folder).double()
    parts = []
    for tokens in PROBES:
        logits = model.eval()(input_ids=torch.tensor([tokens]), attention_mask=torch.ones(1, len(tokens), dtype=torch.int64)).logits[0]
        parts.append(logits if stage == "reward" else of_the_next(logits, tokens))
    return torch.cat(parts)


def of_the_next(logits: Tensor, tokens: list[int]) -> Tensor:
    later = logits[:-1].log_softmax(-1).gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]
    return torch.cat((logits.new_zeros(1), later))


def as_glm(folder: Path, base: Path, stage: str, kind: str) -> Tensor:
    """The same for the original layout, which transformers has not: its GLM is that network, and its names are ours to give here.

    Adapters are merged first; a learned prefix is not comparable (positions start elsewhere), so there it is our own fresh load.
    """
    if kind == "ptuning":
        wide = api.load(str(folder), dtype="float64")
        return torch.tensor(wide.score(PROBES), dtype=torch.float64) if stage == "reward" else torch.cat(wide.logprobs(PROBES))
    held = load_file((folder if kind == "full" else base) / "model.safetensors")
    score = None
    if kind == "lora":
        added = load_file(folder / "adapter_model.safetensors")
        options = json.loads((folder / "adapter_config.json").read_text())
        for name in [name for name in added if name.endswith("lora_A.weight")]:
            up, module = added[name.replace("lora_A", "lora_B")], name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            rank = options["rank_pattern"].get(module, options["r"])
            scale = options["alpha_pattern"].get(module, options["lora_alpha"]) / rank
            held[f"{module}.weight"] = held[f"{module}.weight"].double() + scale * up.double() @ added[name].double()
        score = next((t.double() for name, t in added.items() if "score" in name), None)
    score = held.get("score.weight", score)
    theta = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    sizes = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    config = GlmConfig(
        **sizes,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=1e-5,
        attention_bias=True,
        rope_parameters=theta,
        pad_token_id=0,
        eos_token_id=0,
    )
    model = GlmForCausalLM(config).double().eval()
    named = {}
    for name, tensor in held.items():
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        if "query_key_value" in name:
            parts = tensor.split([32, 16, 16])
            named |= {name.replace("query_key_value", f"{n}_proj"): part for n, part in zip("qkv", parts, strict=True)}
        elif name != "score.weight":
            named[name] = tensor
    if "lm_head.weight" not in named:
        named["lm_head.weight"] = model.lm_head.weight
    model.load_state_dict({name: tensor.double() for name, tensor in named.items()})
    with torch.no_grad():
        states = [model.model(torch.tensor([tokens])).last_hidden_state[0] for tokens in PROBES]
        if score is not None:
            return torch.cat([state[-1:] @ score.double()[0] for state in states])
        return torch.cat([of_the_next(model.lm_head(state), tokens) for state, tokens in zip(states, PROBES, strict=True)])


RENAMED = {
    "transformer.embedding.word_embeddings": "model.embed_tokens",
    "transformer.encoder.final_layernorm": "model.norm",
    "transformer.output_layer": "lm_head",
    "transformer.encoder.layers": "model.layers",
    "self_attention.dense": "self_attn.o_proj",
    "self_attention": "self_attn",
    "dense_h_to_4h": "gate_up_proj",
    "dense_4h_to_h": "down_proj",
}


@torch.no_grad()
def the_reference(folder: Path, base: Path, stage: str, kind: str) -> Tensor:
    """The same for ChatGLM-6B, which transformers does not have: by the network of these tests, with PEFT's LoRA in it."""
    model = read_reference(folder if kind == "full" else base).double()
    saved = load_file(folder / ("model.safetensors" if kind == "full" else "adapter_model.safetensors"))
    score = next((t.double() for name, t in saved.items() if name.endswith("score.weight")), None)
    if kind == "ptuning":
        model.prefix = saved["prompt_embeddings"].double()
    if kind == "lora":
        model = inject_adapter_in_model(LoraConfig.from_pretrained(folder), model).double()
        plain = {n.removeprefix("base_model.model."): t for n, t in saved.items() if "lora" in n}
        found = set_peft_model_state_dict(model, plain)
        assert not found.unexpected_keys and not any("lora" in name for name in found.missing_keys)
        model.eval()
    return torch.cat([of_the_next(model(t), t) if score is None else model.states(t)[-1:] @ score[0] for t in PROBES])


@pytest.mark.parametrize(
    ("stage", "family", "kind"),
    [("sft", "glm", "lora"), ("reward", "qwen2", "full"), ("dpo", "llama", "ptuning"), ("ppo", "qwen2", "lora")],
)
def test_the_resolved_configuration_repeats_the_run(
    finished: Finished, trueline: Commands, tmp_path: Path, stage: str, family: str, kind: str
) -> None:
    first, again = finished(stage, family, kind), tmp_path / "again"
    trueline(stage, first / "config.yaml", f"run.output={again}").ok()
    times = {"seconds", "tokens_per_second", "peak_memory_mb", "reward_overlapped_seconds"} | {f"{part}_seconds" for part in PARTS}
    plain = [[{k: v for k, v in line.items() if k not in times} for line in metrics(folder)] for folder in (first, again)]
    assert plain[0] == plain[1]
    weights = [p.relative_to(first) for p in first.rglob("*.safetensors")]
    assert len(weights) >= 5 and all((first / p).read_bytes() == (again / p).read_bytes() for p in weights)
    if stage == "ppo":
        assert (first / "samples.jsonl").read_bytes() == (again / "samples.jsonl").read_bytes()


def test_a_real_process_does_the_same(finished: Finished, tmp_path: Path) -> None:
    """The other tests fork a process that has imported everything; this one starts Python, as a person does."""
    first, again = finished("sft", "qwen2", "full"), tmp_path / "again"
    command = [sys.executable, "-m", "trueline", "sft", str(first / "config.yaml"), f"run.output={again}"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stderr and done.stdout.startswith(f"sft: 2 steps, {again}\n")
    assert (again / "model" / "model.safetensors").read_bytes() == (first / "model" / "model.safetensors").read_bytes()


def test_random_weights_train_and_publish_their_base(toys: Toys, trueline: Commands, tmp_path: Path) -> None:
    """An adapter on weights that were drawn is of use to nobody without them."""
    folder = tmp_path / "run"
    trueline("sft", toys.config("sft"), "model.init=random", f"run.output={folder}", *KINDS["lora"]).ok()
    assert status(folder)["parents"][str(toys.model())].startswith("random, seed ")
    torch.testing.assert_close(torch.cat(api.load(str(folder / "model")).logprobs(PROBES)), trained(folder, "sft"), rtol=0, atol=1e-5)
    assert (folder / "base" / "model.safetensors").read_bytes() != (toys.model() / "model.safetensors").read_bytes()


def test_dry_run_prints_the_configuration_and_what_follows(toys: Toys, trueline: Commands, tmp_path: Path) -> None:
    for stage in STAGES:
        printed = trueline(stage, toys.config(stage), f"run.output={tmp_path / 'run'}", "--dry-run", *KINDS["lora"]).ok().out
        (tmp_path / "printed.yaml").write_text(printed)
        config = load_config(SCHEMAS[stage], [tmp_path / "printed.yaml"])
        assert config.model.adapter.rank == 4 and not (tmp_path / "run").exists()  # type: ignore[attr-defined]
        facts = dict(line[2:].split(": ", 1) for line in printed.splitlines() if line.startswith("# "))
        if stage == "ppo":
            assert facts["iterations"] == "2" and facts["answers in all"] == "16" and facts["updates, at most"] == "8"
            assert facts["trunks in memory"] == "1"
        else:
            assert facts["records"] == {"sft": "24"}.get(stage, "20") and facts["steps"] == "2"
            rank_4 = 2 * 4 * ((32 + 32) + (32 + 16) + (32 + 48) + (48 + 32))  # q, v, gate, down of two layers
            assert facts["parameters trained"] == f"{rank_4 + (32 if stage == 'reward' else 0):,}"
