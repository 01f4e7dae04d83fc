"""`trueline plan`: its peak is the run's, it fits what is there, and it leaves nothing behind."""

import contextlib
import importlib
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.recipes.commands import Commands
from tests.recipes.reading import records
from tests.recipes.toys import KINDS, STAGES, Toys, lines
from trueline.config.load import load_config
from trueline.config.schema import STAGES as SCHEMAS
from trueline.recipes import plan
from trueline.recipes.calibrate import watched

WIDER = {
    "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "initializer_range": 0.02,
}  # fmt: skip
TRAIN = {"sft": "talks.jsonl", "reward": "pairs.jsonl", "dpo": "pairs.jsonl", "ppo": "prompts.jsonl"}


@pytest.fixture(scope="module")
def home(toys: Toys, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of two million weights, to be drawn, and texts of very different lengths."""
    folder, draw = tmp_path_factory.mktemp("plan"), random.Random(0)
    for family in ("qwen2", "glm"):
        (folder / family).mkdir()
        for file in toys.model(family).iterdir():
            if file.suffix != ".safetensors":
                (folder / family / file.name).write_bytes(file.read_bytes())
        config = folder / family / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | WIDER))

    def text(words: int) -> str:
        return " ".join(draw.choice(("red", "blue", "green", "one", "two")) for _ in range(words))

    sizes = [min(200, max(5, int(draw.lognormvariate(4.0, 0.7)))) for _ in range(48)]
    talks = ([{"role": "user", "content": text(9)}, {"role": "assistant", "content": text(n)}] for n in sizes)
    lines(folder / "talks.jsonl", ({"messages": talk} for talk in talks))
    lines(folder / "pairs.jsonl", ({"prompt": text(9), "chosen": text(n), "rejected": text(n // 2)} for n in sizes))
    lines(folder / "prompts.jsonl", ({"prompt": text(9 + n % 20)} for n in sizes))
    return folder


def settings(home: Path, toys: Toys, stage: str, family: str, kind: str, dtype: str, states: str, recompute: str) -> list[str]:
    found = [f"model.path={home / family}", "model.init=random", f"model.dtype={dtype}", f"optimizer.states={states}"]
    found += [f"model.recompute={recompute}", f"data.train={home / TRAIN[stage]}", "data.cache=off", f"run.output={home / 'run'}-{stage}"]
    found += ["batch.max_tokens=1000", "run.steps=3", "batch.sequences=8", *(["model.adapter.kind=lora"] if kind == "lora" else [])]
    if stage == "ppo":
        found += ["run.steps=2", f"reward.function={toys.data('judges.py')}:shorter", "sampling.max_new_tokens=24"]
        found += ["rollout.prompts=4", "ppo.minibatches=2"]
    return found


def planned(stage: str, given: list[str], calibrate: bool = False) -> dict[str, Any]:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        plan.run(stage, load_config(SCHEMAS[stage], [], given), calibrate, True)
    found: dict[str, Any] = json.loads(out.getvalue())
    return found


CASES = [
    ("sft", "qwen2", "full", "float32", "float32", "false"),
    ("reward", "glm", "full", "float32", "float32", "true"),
    ("dpo", "qwen2", "lora", "float32", "float32", "false"),
    ("ppo", "qwen2", "lora", "float32", "float32", "false"),
]
MORE = [("dpo", "qwen2", "lora", "bfloat16", "float32", "false"), ("reward", "glm", "full", "bfloat16", "int8", "true")]
MORE += [
    (stage, family, kind, dtype, states, recompute)
    for stage in STAGES
    for family, kind in (("qwen2", "full"), ("glm", "lora"), ("glm", "full"))
    for dtype, states, recompute in (("float32", "float32", "true"), ("bfloat16", "float32", "false"), ("bfloat16", "bfloat16", "true"))
    if (stage, family, kind, dtype, states, recompute) not in CASES
]


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE)], ids="-".join)
def test_the_peak_is_within_a_tenth_of_the_run_s(home: Path, toys: Toys, tmp_path: Path, case: tuple[str, ...]) -> None:
    """Of the formulas alone. The run is watched from its first line to its last."""
    stage = case[0]
    given = [*settings(home, toys, *case), f"run.output={tmp_path / 'run'}"]
    expected = planned(stage, given)
    assert not (tmp_path / "run").exists()
    with contextlib.redirect_stdout(io.StringIO()), watched(torch.device("cpu")) as found:
        importlib.import_module(f"trueline.recipes.{stage}").run(load_config(SCHEMAS[stage], [], given))
    assert expected["peak"]["total"] == pytest.approx(found[0], rel=0.1)
    files = [path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert expected["disk"]["kept"] == pytest.approx(sum(files), rel=0.1)


EARLY = [("sft", "qwen2", "full", "float32", "float32", "true")]
EARLY_TOO = [("dpo", "glm", "full", "bfloat16", "int8", "true")]
EARLY_TOO += [("sft", "glm", "full", "bfloat16", "float32", "false"), ("reward", "qwen2", "full", "float32", "float32", "true")]


@pytest.mark.parametrize("case", [*EARLY, *(pytest.param(case, marks=pytest.mark.slow) for case in EARLY_TOO)], ids="-".join)
def test_the_peak_of_updates_inside_the_backward_pass(home: Path, toys: Toys, tmp_path: Path, case: tuple[str, ...]) -> None:
    """Gradients that are used as they are made are never all there; with several micro-batches in a step they are."""
    given = [*settings(home, toys, *case), "optimizer.max_norm=null", "optimizer.in_backward=true", "batch.sequences=4"]
    given += ["batch.max_tokens=4000"]
    expected = planned(case[0], [*given, f"run.output={tmp_path / 'run'}"])
    with contextlib.redirect_stdout(io.StringIO()), watched(torch.device("cpu")) as found:
        run = importlib.import_module(f"trueline.recipes.{case[0]}").run
        run(load_config(SCHEMAS[case[0]], [], [*given, f"run.output={tmp_path / 'run'}"]))
    assert expected["peak"]["total"] == pytest.approx(found[0], rel=0.1)
    if case == EARLY[0]:  # where gradients are most of the peak
        assert planned("sft", [*given, "optimizer.in_backward=false"])["peak"]["total"] > 1.1 * expected["peak"]["total"]
        cut = [planned("sft", [*given, "batch.max_tokens=300", f"optimizer.in_backward={early}"])["peak"] for early in ("true", "false")]
        assert cut[0] == cut[1]


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.slow) for stage in ("sft", "reward")), "dpo"])
def test_tokens_that_are_only_read_are_counted(home: Path, toys: Toys, tmp_path: Path, stage: str) -> None:
    """Held-out records at every evaluation, and DPO's reference of all pairs."""
    given = [*settings(home, toys, stage, "qwen2", "full", "float32", "float32", "false"), "data.eval_fraction=0.25", "run.steps=5"]
    given += ["run.eval_every=2", f"run.output={tmp_path / 'run'}", "batch.max_tokens=2000"]
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        module = importlib.import_module(f"trueline.recipes.{stage}")
        module.run(load_config(SCHEMAS[stage], [], given), dry_run=True)
        module.run(load_config(SCHEMAS[stage], [], given))
    evaluations = sum(line.get("split") == "eval" for line in records(tmp_path / "run" / "metrics.jsonl"))
    work, alone = planned(stage, given)["work"], planned(stage, [*given, "run.eval_every=0"])["work"]
    held_out = (work["tokens only read"] - alone["tokens only read"]) // (evaluations - 1)
    per_pass = int(shown.getvalue().partition("tokens per pass: ")[2].splitlines()[0].replace(",", ""))
    assert evaluations == 3 and alone["tokens only read"] == held_out + (per_pass + held_out) * (stage == "dpo")
    stored = ["reference.kind=stored", "reference.path=x"] if stage == "dpo" else []
    whole = planned(stage, [*given, "data.eval_fraction=0", "run.eval_every=0", *stored])
    assert whole["work"]["tokens only read"] == 0


@pytest.mark.parametrize("stage", STAGES)
def test_calibration_measures_and_leaves_nothing(toys: Toys, tmp_path: Path, stage: str) -> None:
    given = [f"run.output={tmp_path / 'run'}", *KINDS["lora"]]
    loaded = load_config(SCHEMAS[stage], [toys.config(stage)], given)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        plan.run(stage, loaded, True, True)
    found = json.loads(out.getvalue())
    assert found["calibrated"] and found["seconds"] > 0 and found["work"]["steps"] == 2 and found["warnings"] == []
    assert found["peak"]["total"] == pytest.approx(planned(stage, [*given, *flat(toys, stage)])["peak"]["total"], rel=0.1)
    assert not (tmp_path / "run").exists()


def flat(toys: Toys, stage: str) -> list[str]:
    sections = toys.dictionary(stage)
    return [f"{section}.{name}={json.dumps(value)}" for section, keys in sections.items() for name, value in keys.items()]


def test_the_table_says_what_does_not_fit_and_which_key_to_change(toys: Toys, trueline: Commands, tmp_path: Path) -> None:
    done = trueline("plan", toys.config("sft"), "--stage", "sft", "--no-calibration", f"run.output={tmp_path / 'run'}").ok()
    for words in ("weights", "gradients", "states", "activations", "logits", "peak", "disk", "work", "time     not known"):
        assert words in done.out, done.out
    assert "warning" not in done.out and list(tmp_path.iterdir()) == []
    given = [toys.config("sft"), f"run.output={tmp_path / 'run'}"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        plan.run("sft", load_config(SCHEMAS["sft"], given[:1], given[1:]), False, True)
    found = json.loads(out.getvalue())
    short = found | {"free": {"memory": 1000, "disk": 1000}}
    memory, disk = plan.warnings(short, load_config(SCHEMAS["sft"], given[:1], given[1:]))
    assert "do not fit 0.0 MB" in memory and "batch.max_tokens" in memory and "model.adapter.kind=lora" in memory
    assert "run.keep" in disk and plan.warnings(found, load_config(SCHEMAS["sft"], given[:1], given[1:])) == []


def test_auto_recomputes_in_the_plan_as_in_the_run(home: Path, toys: Toys) -> None:
    given = settings(home, toys, *CASES[0])[:-1]
    free = planned("sft", [*given, "model.recompute=auto"])
    short = planned("sft", [*given, "model.recompute=auto", "batch.memory=1"])
    assert free["recompute"] == {"model": 0} and short["recompute"] == {"model": 4}
    assert short["peak"]["activations"] < 0.6 * free["peak"]["activations"]
    assert "auto recomputes 4 of 4 layers" in short["notes"][0]


def test_a_missing_compiler_is_told(home: Path, toys: Toys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where answers are long enough to be made by what it compiles, and nowhere else."""
    given = settings(home, toys, "ppo", "qwen2", "lora", "float32", "float32", "false")
    monkeypatch.setattr(plan, "lacks_compiler", lambda: False)
    assert plan.SLOW_ANSWERS not in planned("ppo", given)["notes"]
    monkeypatch.setattr(plan, "lacks_compiler", lambda: True)
    assert plan.SLOW_ANSWERS in planned("ppo", given)["notes"]
    for other in ("sampling.max_new_tokens=12", "rollout.packed=false"):
        assert plan.SLOW_ANSWERS not in planned("ppo", [*given, other])["notes"]
