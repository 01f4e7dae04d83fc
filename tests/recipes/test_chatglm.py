"""The verbs around the stages on ChatGLM-6B, whose context has to be found again wherever there are bare tokens."""

import json
from pathlib import Path

import pytest
import torch

import trueline as api
from tests.recipes.commands import Commands
from tests.recipes.reading import PROBES, records
from tests.recipes.toys import KINDS, Toys, lines
from trueline.config.load import from_any
from trueline.config.schema import SftConfig
from trueline.model.batch import pack
from trueline.recipes.assemble import open_text
from trueline.recipes.prepare import sft_samples


@pytest.fixture(scope="module")
def run(toys: Toys, trueline: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "sft"
    trueline("sft", toys.config("sft"), f"model.path={toys.model('chatglm')}", f"run.output={folder}", *KINDS["lora"]).ok()
    return folder


def test_training_sees_the_place_that_an_answer_fills(toys: Toys, tmp_path: Path) -> None:
    """From the cache and without one, as the conversation is rendered."""
    sections = toys.dictionary("sft", model={"path": str(toys.model("chatglm"))}, data={"cache": str(tmp_path)}, run={"output": "none"})
    config = from_any(SftConfig, sections)
    family, tokenizer = open_text(config.model)
    for cache in ("off", str(tmp_path), str(tmp_path)):
        for sample in sft_samples(config.data.model_copy(update={"cache": cache}), family, tokenizer, 0).train:
            assert (sample.context, sample.anchor) == (sample.tokens.index(3), sample.tokens.index(2))
            assert pack([sample]).layout.positions.shape == (2, len(sample))


def test_export_merges_and_proves_it(run: Path, trueline: Commands, tmp_path: Path) -> None:
    wanted = torch.cat(api.load(str(run / "model")).logprobs(PROBES))
    for option, name in (("--merge", "merged"), ("--adapter", "adapter")):
        trueline("export", run, tmp_path / name, option).ok()
        torch.testing.assert_close(torch.cat(api.load(str(tmp_path / name)).logprobs(PROBES)), wanted, rtol=0, atol=1e-4)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["model_type"] == "chatglm" and config["architectures"] == ["ChatGLMForConditionalGeneration"]


def test_generate_reads_a_context_in_texts_and_in_tokens(run: Path, trueline: Commands, tmp_path: Path) -> None:
    model = api.load(str(run / "model"))
    prompt = model.render([{"role": "user", "content": "say red blue"}])
    assert prompt.context == len(prompt) - 1 and prompt.anchor == len(prompt) - 2
    given = lines(tmp_path / "texts.jsonl", [{"prompt": "say red blue"}]), lines(tmp_path / "ids.jsonl", [{"tokens": prompt.tokens}])
    answers = []
    for path in given:
        trueline("generate", run / "model", "--prompts", path, "--out", tmp_path / "out.jsonl", "max_new_tokens=6", "temperature=0").ok()
        answers.append(records(tmp_path / "out.jsonl")[0])
    assert answers[0]["tokens"] == answers[1]["tokens"] == model.generate(["say red blue"], max_new_tokens=6)[0].tokens
    again = model.logprobs([prompt.tokens + answers[0]["tokens"]])[0][len(prompt) :]
    torch.testing.assert_close(again, torch.tensor(answers[0]["logprobs"], dtype=again.dtype), rtol=0, atol=1e-4)


def test_evaluate_and_check(run: Path, toys: Toys, trueline: Commands, tmp_path: Path) -> None:
    data, output = toys.data("messages.jsonl"), tmp_path / "evaluation"
    settings = ("sampling.max_new_tokens=8", f"run.output={output}", f"data.eval={data}")
    trueline("evaluate", f"model.path={run / 'model'}", *settings).ok()
    assert records(output / "metrics.jsonl")[0]["loss"] > 0
    shown = trueline("check", data, "--model", toys.model("chatglm"), "--show", "1").ok().out
    assert "[gMASK]" in shown and "<sop>⟦" in shown and "<eop>⟧" in shown
