"""`trueline evaluate`: the numbers training logs, on files of every use, and what the model says itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import trueline as api
from tests.recipes.commands import Commands
from tests.recipes.reading import metrics, records, status
from tests.recipes.toys import KINDS, Toys, lines
from trueline.data.answers import same_answer
from trueline.data.formats import load_conversations, load_preferences
from trueline.data.sample import Sample
from trueline.recipes.measures import open_text_measure


@pytest.fixture
def config(toys: Toys, tmp_path: Path) -> str:
    """The base model on the conversations, with answers of eight tokens."""
    sections = {
        "model": {"path": str(toys.model()), "dtype": "float32"},
        "data": {"eval": [str(toys.data("messages.jsonl"))]},
        "sampling": {"max_new_tokens": 8},
        "run": {"output": str(tmp_path / "run")},
    }
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump(sections))
    return str(tmp_path / "evaluate.yaml")


def logprob(model: Any, sample: Sample) -> torch.Tensor:
    return model.logprobs([sample.tokens])[0][torch.tensor(sample.trained)]


def test_on_answers(toys: Toys, trueline: Commands, config: str, tmp_path: Path) -> None:
    trueline("evaluate", config).ok()
    (line,) = metrics(tmp_path / "run", "eval")
    model = api.load(str(toys.model()))
    family, tokenizer = model.opened.folder.family, model.opened.text()
    samples = [family.render(found.value, tokenizer) for found in load_conversations([str(toys.data("messages.jsonl"))])]
    assert line["loss"] == pytest.approx(-torch.cat([logprob(model, sample) for sample in samples]).mean().item(), abs=1e-5)
    answers = records(tmp_path / "run" / "samples.jsonl")
    assert len(answers) == 12 and line["response_length"] == sum(len(a["tokens"]) for a in answers) / 12
    assert line["stopped"] == sum(a["finish"] == "stop" for a in answers) / 12 and "score" not in answers[0]
    greedy = model.generate([a["prompt"] for a in answers if a["prompt"].startswith("say red")][:3], max_new_tokens=8)
    assert [r.tokens for r in greedy] == [a["tokens"] for a in answers if a["prompt"].startswith("say red")][:3]
    assert status(tmp_path / "run")["stage"] == "evaluate" and (tmp_path / "run" / "report.html").exists()
    trueline("evaluate", config).ok()  # again in the same place: a measurement takes the older one's
    assert metrics(tmp_path / "run", "eval") == [line]


def test_on_prompts_with_a_reward_function(toys: Toys, trueline: Commands, config: str, tmp_path: Path) -> None:
    trueline("evaluate", config, f"data.eval={toys.data('prompts.jsonl')}", f"reward.function={toys.data('judges.py')}:shorter").ok()
    (line,) = metrics(tmp_path / "run", "eval")
    answers = records(tmp_path / "run" / "samples.jsonl")
    assert "loss" not in line and [a["score"] for a in answers] == [-len(a["response"]) for a in answers]
    assert line["score"] == pytest.approx(sum(a["score"] for a in answers) / len(answers))
    assert not (tmp_path / "run" / "reward.log").exists()  # it printed nothing


def test_with_a_reward_model_and_of_one(toys: Toys, trueline: Commands, config: str, tmp_path: Path) -> None:
    held_out = lines(tmp_path / "held.jsonl", records(toys.data("cvalues.jsonl"))[:6])
    folder = tmp_path / "reward"
    training = [f"run.output={folder}", "run.steps=8", f"data.eval={held_out}"]
    trueline("reward", toys.config("reward"), *training, *KINDS["lora"]).ok()
    trueline("evaluate", config, f"model.path={folder / 'model'}", f"data.eval={held_out}").ok()
    (line,) = metrics(tmp_path / "run", "eval")
    (logged,) = metrics(folder, "eval")
    assert {name: line[name] for name in ("loss", "accuracy", "margin")} == pytest.approx(
        {name: logged[name] for name in ("loss", "accuracy", "margin")}, abs=1e-5
    )
    scorer = api.load(str(folder / "model"))
    pairs = [found.value for found in load_preferences([str(held_out)])]
    render = scorer.opened.folder.family.render
    margins = []
    for pair in pairs:
        sides = [pair.prompt.messages + (answer,) for answer in (pair.chosen, pair.rejected)]
        tokens = [render(type(pair.prompt)(side), scorer.opened.text()).tokens for side in sides]
        margins.append(scorer.score(tokens)[0] - scorer.score(tokens)[1])
    assert line["margin"] == pytest.approx(sum(margins) / len(margins), abs=1e-5)
    assert line["accuracy"] == sum(m > 0 for m in margins) / len(margins)

    trueline("evaluate", config, f"reward.model={folder / 'model'}", f"run.output={tmp_path / 'scored'}").ok()
    model = api.load(str(toys.model()))
    for answer in records(tmp_path / "scored" / "samples.jsonl")[:3]:
        tokens = model.render([{"role": "user", "content": answer["prompt"]}]).tokens + answer["tokens"]
        if answer["prompt"].startswith("say red"):  # one turn
            assert answer["score"] == pytest.approx(scorer.score([tokens])[0], abs=1e-4)
    both = trueline("evaluate", config, f"model.path={folder / 'model'}", f"reward.model={folder / 'model'}", "run.output=x").refused()
    assert "the model is a reward model itself" in both


def test_a_share_of_the_training_files(toys: Toys, trueline: Commands, config: str, tmp_path: Path) -> None:
    """The records held out are those the training run held out."""
    training = [f"run.output={tmp_path / 'sft'}", "run.steps=1", "data.eval_fraction=0.25", "optimizer.lr=1e-12"]
    trueline("sft", toys.config("sft"), *training).ok()
    files = f"data.train=[{toys.data('messages.jsonl')}, {toys.data('alpaca.json')}]"
    trueline("evaluate", config, "data.eval=[]", files, "data.eval_fraction=0.25", "generate=false").ok()
    (line,), (logged,) = metrics(tmp_path / "run", "eval"), metrics(tmp_path / "sft", "eval")
    assert line["loss"] == pytest.approx(logged["loss"], abs=1e-5) and not (tmp_path / "run" / "samples.jsonl").exists()


def test_nothing_is_half_written(toys: Toys, trueline: Commands, config: str, tmp_path: Path) -> None:
    cases = {
        "generate=false": f"data.eval={toys.data('prompts.jsonl')}",
        "data.max_length=20": "data.overlength=drop",
        "sampling.max_new_tokens=5000": "data.max_length=1000",
        "batch.max_tokens=10": "generate=true",
        "reward.function=none.py:f": "generate=true",
        f"reward.model={toys.model()}": "generate=true",
        "data.eval=none.jsonl": "generate=true",
    }
    words = ["nothing to measure", "nothing is left to evaluate on", "leaves no room", "raise batch.max_tokens", "there is no file none.py"]
    words += ["has no score head", "none.jsonl"]
    for (setting, other), said in zip(cases.items(), words, strict=True):
        assert said in trueline("evaluate", config, setting, other).refused()
        assert not (tmp_path / "run").exists(), setting


def test_text_and_answers_beside_references(toys: Toys, trueline: Commands, config: str, tmp_path: Path) -> None:
    questions = [{"question": f"say {word}", "answer": f"so it is\n#### {i}"} for i, word in enumerate(["red", "blue", "one", "two"])]
    held_out = lines(tmp_path / "held.jsonl", questions)
    trueline("evaluate", config, f"data.eval={held_out}", "metrics.text=characters", "metrics.match=true").ok()
    (line,) = metrics(tmp_path / "run", "eval")
    answers = records(tmp_path / "run" / "samples.jsonl")
    said, wanted = [a["response"] for a in answers], [q["answer"] for q in questions]
    means, rows = open_text_measure("characters")(said, wanted)
    assert {name: line[name] for name in means} == pytest.approx(means) and [a["reference"] for a in answers] == wanted
    assert [{name: a[name] for name in row} for a, row in zip(answers, rows, strict=True)] == rows
    assert [a["match"] for a in answers] == [float(same_answer(s, w)) for s, w in zip(said, wanted, strict=True)]
    assert line["match"] == sum(a["match"] for a in answers) / 4
    some = lines(tmp_path / "some.jsonl", [{"prompt": "say red", "gold": 1}, {"prompt": "say blue"}])
    refused = trueline("evaluate", config, f"data.eval={some}", "metrics.match=true", "metrics.reference=gold", "run.output=x").refused()
    assert "metrics.reference: 1 of 2 records have no text or number in gold" in refused
    assert "set generate=true" in trueline("evaluate", config, "metrics.match=true", "generate=false", "run.output=x").refused()


def test_same_answer_is_a_reward(toys: Toys, trueline: Commands, config: str, tmp_path: Path) -> None:
    trained = [f"data.train={lines(tmp_path / 'q.jsonl', [{'question': 'say red', 'answer': '5'}] * 4)}", "reward.function=same_answer"]
    trueline("ppo", toys.config("ppo"), *trained, f"run.output={tmp_path / 'ppo'}", "run.steps=1").ok()
    assert all(0 <= line["score"] <= 1 for line in metrics(tmp_path / "ppo", "train"))
    bare = lines(tmp_path / "bare.jsonl", [{"prompt": "say red"}])
    refused = trueline("evaluate", config, f"data.eval={bare}", "reward.function=same_answer", "run.output=x").refused()
    assert "no record has an answer" in refused


def test_win_rate_over_another_model_or_its_answers(toys: Toys, trueline: Commands, config: str, tmp_path: Path) -> None:
    longer = f"reward.function={toys.data('judges.py')}:shorter"
    other = [f"model.path={toys.model('llama')}", f"run.output={tmp_path / 'other'}"]
    trueline("evaluate", config, *other).ok()
    theirs = records(tmp_path / "other" / "samples.jsonl")
    trueline("evaluate", config, longer, f"metrics.against={tmp_path / 'other' / 'samples.jsonl'}").ok()
    (line,) = metrics(tmp_path / "run", "eval")
    answers = records(tmp_path / "run" / "samples.jsonl")
    assert [a["other_response"] for a in answers] == [t["response"] for t in theirs]
    lengths = [(len(a["response"]), len(t["response"])) for a, t in zip(answers, theirs, strict=True)]
    assert (line["wins"], line["losses"]) == (sum(a < b for a, b in lengths), sum(a > b for a, b in lengths))
    assert line["wins"] + line["ties"] + line["losses"] == 12 and line["win_rate_low"] < line["win_rate"] < line["win_rate_high"]
    trueline("evaluate", config, longer, f"metrics.against={toys.model('llama')}", f"run.output={tmp_path / 'live'}").ok()
    (live,) = metrics(tmp_path / "live", "eval")
    assert {name: live[name] for name in line} == line
    trueline("evaluate", config, longer, f"metrics.against={toys.model()}", f"run.output={tmp_path / 'self'}").ok()
    assert metrics(tmp_path / "self", "eval")[0]["ties"] == 12
    short = lines(tmp_path / "short.jsonl", theirs[:3])
    refused = trueline("evaluate", config, longer, f"metrics.against={short}", "run.output=x").refused()
    assert "holds 3 answers, not to the 12 prompts" in refused
    assert "compares by reward" in trueline("evaluate", config, f"metrics.against={short}", "run.output=x").refused()


def test_win_rate_by_a_reward_model(toys: Toys, trueline: Commands, config: str, tmp_path: Path) -> None:
    """Answers from a file get the scores that the same answers got when the model gave them."""
    training = [f"run.output={tmp_path / 'reward'}", "run.steps=4"]
    trueline("reward", toys.config("reward"), *training, *KINDS["lora"]).ok()
    judged = [f"reward.model={tmp_path / 'reward' / 'model'}", "sampling.max_new_tokens=4"]
    trueline("evaluate", config, *judged, f"metrics.against={toys.model('glm')}").ok()
    live = records(tmp_path / "run" / "samples.jsonl")
    trueline("evaluate", config, f"model.path={toys.model('glm')}", *judged, f"run.output={tmp_path / 'glm'}").ok()
    theirs = records(tmp_path / "glm" / "samples.jsonl")
    assert [a["other_score"] for a in live] == pytest.approx([t["score"] for t in theirs], abs=1e-4)
    assert [a["other_response"] for a in live] == [t["response"] for t in theirs]
