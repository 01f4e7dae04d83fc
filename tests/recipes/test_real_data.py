"""docs/real-data.md does what it says: its own commands, on the real files; shortened in the default suite, whole under `slow`."""

import math
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.docs.pages import blocks
from tests.recipes.commands import ROOT, Commands, Done
from tests.recipes.reading import metrics, records, status

PAGE = "docs/real-data.md"
SECONDS = 3600.0  # patience with a whole command
FEW = ["run.epochs=null", "run.steps=2", "batch.sequences=2", "data.eval_fraction=0.004"]
SHORTER = {
    "sft": FEW,
    "reward": FEW,
    "dpo": [*FEW, "data.limit=4"],
    "ppo": ["run.steps=2", "rollout.prompts=4", "rollout.samples=2", "sampling.max_new_tokens=16"],
    "evaluate": ["sampling.max_new_tokens=16"],
}
Run = Callable[[str], Done]
"""Runs the page's command for the run folder `runs/NAME`, once, after those it builds on."""


def page_commands(shared: Path) -> dict[str, list[str]]:
    """Run folder -> the words of the command that writes it, in the page's order."""
    names = {"DATA": str(shared / "data"), "MODELS": str(shared / "models")}
    found = {}
    for block in blocks(PAGE):
        for line in block.text.replace("\\\n", " ").splitlines() if block.language == "bash" else ():
            words = [re.sub(r"\$(\w+)", lambda name: names[name[1]], word) for word in shlex.split(line, comments=True)]
            output = next((word for word in words if word.startswith("run.output=runs/")), None)
            if output is not None:
                found[output.removeprefix("run.output=runs/")] = words[1:]
            elif words and (given := re.fullmatch(r"([A-Z]+)=(.*)", words[0])) and given[1] not in names:
                names[given[1]] = given[2]
    return found


def runner(folder: Path, shared: Path, trueline: Commands, shorter: dict[str, list[str]]) -> Run:
    for name in ("configs", "examples"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    known = page_commands(shared)
    done: dict[str, Done] = {}

    def run(name: str) -> Done:
        if name not in done:
            for word in known[name]:
                if parent := re.fullmatch(r"model.path=runs/([\w-]+)/model", word):
                    run(parent[1])
            done[name] = trueline.start(*known[name], *shorter.get(known[name][0], []), cwd=folder).wait(SECONDS).ok()
        return done[name]

    return run


@pytest.fixture(scope="module")
def short(shared: Path, trueline: Commands, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """The page's commands with two small steps each, and the folder of their runs."""
    folder = tmp_path_factory.mktemp("short")
    return runner(folder, shared, trueline, SHORTER), folder / "runs"


@pytest.fixture(scope="module")
def whole(shared: Path, trueline: Commands, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """The page's commands as they stand."""
    folder = tmp_path_factory.mktemp("whole")
    return runner(folder, shared, trueline, {}), folder / "runs"


def eval_line(folder: Path) -> dict[str, float]:
    """The last evaluation a run logged."""
    return metrics(folder, "eval")[-1]


def test_every_named_run_is_tested(shared: Path) -> None:
    assert set(page_commands(shared)) == {
        "alpaca-qwen2", "alpaca-glm4", "tools-qwen2", "tools-glm4", "comparison-reward", "comparison-dpo", "demo-dpo",
        "stories-before", "stories-ppo", "stories-after",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["alpaca-qwen2", "tools-glm4"])
def test_fine_tuning_starts_from_an_even_guess(short: tuple[Run, Path], name: str) -> None:
    """A random model gives every token of the real vocabulary about the same chance; the files are read and rendered whole."""
    run, runs = short
    run(name)
    assert status(runs / name)["status"] == "finished"
    vocabulary = 151936 if name.endswith("qwen2") else 151552
    assert metrics(runs / name)[0]["loss"] == pytest.approx(math.log(vocabulary), abs=0.2)
    published = {path.name for path in (runs / name / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer_config.json"} <= published


def test_equal_pairs_are_left_out_and_counted(short: tuple[Run, Path]) -> None:
    run, runs = short
    assert "20 pairs left out, both answers are equal" in run("comparison-reward").out
    assert metrics(runs / "comparison-reward")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_dpo_starts_at_ln_2(short: tuple[Run, Path]) -> None:
    run, runs = short
    run("comparison-dpo")
    first = metrics(runs / "comparison-dpo")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and first["margin"] == 0.0


def test_ppo_runs_on_a_real_pretrained_model(short: tuple[Run, Path]) -> None:
    """What it says is English before training, and rollout and training agree to rounding."""
    run, runs = short
    run("stories-ppo")
    assert all(line["logprob_gap_max"] < 1e-4 for line in metrics(runs / "stories-ppo"))
    said = " ".join(line["response"] for line in records(runs / "stories-ppo" / "samples.jsonl")).split()
    assert {"the", "was", "a", "to"} & set(said)


def test_the_reward_counts_a_sentence_once() -> None:
    friends = runpy.run_path(str(ROOT / "examples" / "stories_reward.py"))["friends"]
    said = ["A friend. Friends, friends! Is he friendly?", "Befriend me.", "", "friend friend friend"]
    assert friends(said) == [3.0, 0.0, 0.0, 1.0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["alpaca-qwen2", "alpaca-glm4", "tools-qwen2", "tools-glm4"])
def test_held_out_loss_falls(whole: tuple[Run, Path], name: str) -> None:
    run, runs = whole
    run(name)
    assert eval_line(runs / name)["loss"] < math.log(151552) - 1  # in 10 steps; the page has the numbers


@pytest.mark.slow
def test_reward_model_is_right_nine_times_in_ten(whole: tuple[Run, Path], monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """And the page's program says what that is worth: how often the longer answer is the better one."""
    run, runs = whole
    run("comparison-reward")
    accuracy = eval_line(runs / "comparison-reward")["accuracy"]
    assert accuracy >= 0.9
    monkeypatch.setattr(sys, "argv", ["longer_wins.py", str(runs / "comparison-reward")])
    runpy.run_path(str(ROOT / "examples" / "longer_wins.py"), run_name="__main__")
    shares = re.findall(r"right\s+([\d.]+) of (\d+)", capsys.readouterr().out)
    assert float(shares[0][0]) == pytest.approx(accuracy, abs=1e-3)
    assert float(shares[1][0]) >= 0.9 and shares[0][1] == shares[1][1] == "238"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["comparison-dpo", "demo-dpo"])
def test_dpo_separates_held_out_pairs(whole: tuple[Run, Path], name: str) -> None:
    run, runs = whole
    run(name)
    assert metrics(runs / name)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    after = eval_line(runs / name)
    assert after["loss"] < math.log(2) and after["margin"] > 0 and after["accuracy"] > 0.5


@pytest.mark.slow
def test_ppo_doubles_the_reward_on_a_short_leash(whole: tuple[Run, Path]) -> None:
    """Within 60 iterations, with a mean KL per token under 0.2, on the prompts it trained on and on others."""
    run, runs = whole
    run("stories-ppo")
    lines = metrics(runs / "stories-ppo")
    assert len(lines) == 60 and sum(line["kl_per_token"] for line in lines) / 60 < 0.2
    assert sum(line["score"] for line in lines[-5:]) >= 2 * sum(line["score"] for line in lines[:5])
    run("stories-before")
    run("stories-after")
    assert eval_line(runs / "stories-after")["score"] >= 2 * eval_line(runs / "stories-before")["score"]
