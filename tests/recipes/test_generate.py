"""`trueline generate` and `trueline chat`: what goes in, what comes out, and that it is what the model says in training."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import trueline as api
from tests.recipes.commands import ROOT, Commands
from tests.recipes.reading import records
from tests.recipes.toys import KINDS, Toys, lines
from trueline.config.schema import GenerateConfig
from trueline.errors import Interrupted
from trueline.recipes.generate import printable, run
from trueline.recipes.unfinished import Unfinished

SHORT = "max_new_tokens=8"


def test_prompts_messages_and_tokens(toys: Toys, trueline: Commands, tmp_path: Path) -> None:
    model = api.load(str(toys.model()))
    asked = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "say 红"}]
    files = {
        "prompts": [{"prompt": "say red"}, {"prompt": "say 红", "system": "be brief"}],
        "messages": [{"messages": [{"role": "user", "content": "say red"}]}, {"messages": asked}],
        "tokens": [
            {"tokens": model.render([{"role": "user", "content": "say red"}]).tokens},
            {"tokens": model.render(asked).tokens},
        ],
    }
    found = {}
    for name, given in files.items():
        out = tmp_path / "new" / f"{name}.out.jsonl"
        done = trueline("generate", toys.model(), "--prompts", lines(tmp_path / f"{name}.jsonl", given), "--out", out, SHORT).ok()
        assert not done.out and "2 answers in" in done.err
        found[name] = records(out)
        assert [line["prompt"] for line in found[name]] == [next(iter(record.values())) for record in given]
        assert all(line.keys() == {"prompt", "response", "tokens", "logprobs", "finish"} for line in found[name])
        assert [p.name for p in out.parent.iterdir() if p.name.startswith(".")] == []
    answers = [[line["tokens"] for line in found[name]] for name in files]
    assert answers[0] == answers[1] == answers[2]
    for given, line in zip(files["tokens"], found["tokens"], strict=True):
        logprobs = model.logprobs([given["tokens"] + line["tokens"]])[0][len(given["tokens"]) :]
        torch.testing.assert_close(torch.tensor(line["logprobs"]), logprobs, rtol=0, atol=1e-4)
        assert line["response"] == model.opened.text().decode(line["tokens"])
        assert line["finish"] == ("stop" if line["tokens"][-1] in model.opened.stop else "length")


def test_several_samples_each_with_its_seed(toys: Toys, trueline: Commands, tmp_path: Path) -> None:
    prompts = lines(tmp_path / "p.jsonl", [{"prompt": "say red"}, {"prompt": "say blue"}])
    said = {}
    for name, settings in (("a", ["seed=1"]), ("b", ["seed=1"]), ("c", ["seed=2"])):
        trueline("generate", toys.model(), "--prompts", prompts, "--out", tmp_path / name, SHORT, "n=3", "temperature=1", *settings).ok()
        said[name] = [tuple(line["tokens"]) for line in records(tmp_path / name)]
    assert said["a"] == said["b"] != said["c"] and len(set(said["a"])) == 6
    model = api.load(str(toys.model()))
    ours = model.generate(["say red", "say blue"], max_new_tokens=8, temperature=1.0, n=3, seed=1)
    assert [tuple(r.tokens) for r in ours] == said["a"]


def test_an_adapter_speaks_on_its_base(toys: Toys, trueline: Commands, tmp_path: Path) -> None:
    prompts = lines(tmp_path / "p.jsonl", [{"prompt": "say red"}])
    for kind in ("lora", "ptuning"):
        trueline("sft", toys.config("sft"), f"run.output={tmp_path / kind}", "run.steps=3", *KINDS[kind]).ok()
        trueline("generate", tmp_path / kind / "model", "--prompts", prompts, "--out", tmp_path / "out.jsonl", SHORT).ok()
        (line,) = records(tmp_path / "out.jsonl")
        (ours,) = api.load(str(tmp_path / kind / "model")).generate(["say red"], max_new_tokens=8)
        assert line["tokens"] == ours.tokens
        assert ours.tokens != api.load(str(toys.model())).generate(["say red"], max_new_tokens=8)[0].tokens


def test_without_a_tokenizer_token_lists_are_served(toys: Toys, trueline: Commands, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (bare / name).write_bytes((toys.model() / name).read_bytes())
    prompts = lines(tmp_path / "p.jsonl", [{"tokens": [40, 41, 42]}])
    trueline("generate", bare, "--prompts", prompts, "--out", tmp_path / "out.jsonl", SHORT).ok()
    trueline("generate", toys.model(), "--prompts", prompts, "--out", tmp_path / "with.jsonl", SHORT).ok()
    (without,), (with_text,) = records(tmp_path / "out.jsonl"), records(tmp_path / "with.jsonl")
    assert without["response"] is None and without["tokens"] == with_text["tokens"] and with_text["response"]
    text = lines(tmp_path / "t.jsonl", [{"prompt": "a"}])
    message = trueline("generate", bare, "--prompts", text, "--out", tmp_path / "no.jsonl").refused()
    assert "has no tokenizer files" in message
    trueline("generate", bare, "--prompts", text, "--out", tmp_path / "yes.jsonl", SHORT, f"tokenizer={toys.model()}").ok()


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"tokens": [5, 320]}, "p.jsonl:1: tokens: not a list of token ids, expected integers from 0 to 319, at least one"),
        ({"tokens": []}, "p.jsonl:1: tokens: not a list of token ids"),
        ({"prompt": ""}, "p.jsonl:1:12: prompt: empty, expected text"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "p.jsonl:1"),
        ({"question": 3}, "p.jsonl:1"),
    ],
)
def test_bad_lines(toys: Toys, trueline: Commands, tmp_path: Path, record: object, words: str) -> None:
    prompts = lines(tmp_path / "p.jsonl", [record])
    assert words in trueline("generate", toys.model(), "--prompts", prompts, "--out", tmp_path / "out").refused()
    assert not (tmp_path / "out").exists()


def test_places_that_cannot_be_written(toys: Toys, trueline: Commands, tmp_path: Path) -> None:
    prompts = lines(tmp_path / "p.jsonl", [{"prompt": "a"}] * 4)
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    for out, words in ((tmp_path, "is a folder; name a file"), (tmp_path / "file" / "x", "cannot be written")):
        assert words in trueline("generate", toys.model(), "--prompts", prompts, "--out", out).refused()
    for given in (prompts, tmp_path):  # a file's own name, and a folder it is in
        own = trueline("generate", toys.model(), "--prompts", given, "--out", tmp_path / "." / "p.jsonl").refused()
        assert "is a file of --prompts, which it would replace; name another file" in own and len(records(tmp_path / "p.jsonl")) == 4
    assert sorted(tmp_path.rglob("*")) == before
    assert "none.jsonl" in trueline("generate", toys.model(), "--prompts", "none.jsonl", "--out", tmp_path / "out").refused()
    assert "no such folder" in trueline("generate", tmp_path / "none", "--prompts", prompts, "--out", tmp_path / "out").refused()


def test_a_command_that_ended_early_goes_on(toys: Toys, trueline: Commands, tmp_path: Path) -> None:
    prompts = lines(tmp_path / "p.jsonl", [{"prompt": f"say {word}"} for word in ("red", "blue", "green", "红")])
    out, model = tmp_path / "out.jsonl", toys.model()
    command = ("generate", model, "--prompts", prompts, "--out", out, "max_new_tokens=12", "temperature=1", "n=2")
    straight = tmp_path / "straight.jsonl"
    assert "going on" not in trueline(*command[:5], straight, *command[6:]).ok().err
    assert "the disk is full" in trueline(*command, file_limit=2000).refused(1)
    assert not out.exists() and len(kept := list(tmp_path.glob(".out.jsonl.*.unfinished"))) == 1
    done = kept[0].read_bytes().count(b"\n")
    assert 0 < done < 8
    trueline(*command, "seed=1").ok()  # another work: it begins anew, and leaves the first alone
    assert records(out) != records(straight) and kept[0].exists()
    assert f"going on after {done} of 8 answers" in trueline(*command).ok().err
    for ours, theirs in zip(records(out), records(straight), strict=True):
        assert {**ours, "logprobs": None} == {**theirs, "logprobs": None}
        torch.testing.assert_close(torch.tensor(ours["logprobs"]), torch.tensor(theirs["logprobs"]), rtol=0, atol=1e-5)
    assert not list(tmp_path.glob(".*"))


def test_ctrl_c_says_what_is_kept(toys: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, out = lines(tmp_path / "p.jsonl", [{"prompt": "say red"}] * 3), tmp_path / "out.jsonl"
    settings, add = GenerateConfig(max_new_tokens=4), Unfinished.add

    def pressed(self: Unfinished, number: int, line: object) -> None:
        if len(self.lines) == most:
            raise KeyboardInterrupt
        add(self, number, line)

    monkeypatch.setattr(Unfinished, "add", pressed)
    for most, words in ((0, "stopped after 0 of 3 answers$"), (2, "stopped after 2 of 3 answers; the same command goes on from there")):
        with pytest.raises(Interrupted, match=words):
            run(str(toys.model()), str(prompts), str(out), settings)
        assert len(list(tmp_path.glob(".*"))) == bool(most) and not out.exists()
    monkeypatch.undo()
    run(str(toys.model()), str(prompts), str(out), settings)
    assert len(records(out)) == 3 and not list(tmp_path.glob(".*"))


def test_a_reward_model_cannot_answer(toys: Toys, trueline: Commands, tmp_path: Path) -> None:
    trueline("reward", toys.config("reward"), f"run.output={tmp_path / 'reward'}", "run.steps=1").ok()
    prompts = lines(tmp_path / "p.jsonl", [{"prompt": "a"}])
    model = tmp_path / "reward" / "model"
    for command in (["generate", model, "--prompts", prompts, "--out", "o"], ["chat", model]):
        assert "is a reward model: it scores answers and cannot write them" in trueline(*command).refused()


def test_chat_from_a_pipe(toys: Toys, trueline: Commands) -> None:
    """Two rounds, a new conversation, and the end of the input; the answers are the model's own to each history."""
    done = trueline("chat", toys.model(), SHORT, stdin="say red\nsay blue\n/new\nsay red\n").ok()
    answers = [part.split("you>")[0].strip() for part in done.out.split("model>")[1:]]
    model = api.load(str(toys.model()))

    def reply(*messages: tuple[str, str]) -> str:
        tokens = model.render([{"role": role, "content": content} for role, content in messages]).tokens
        return (model.generate([tokens], max_new_tokens=8)[0].text or "").strip()

    first = reply(("user", "say red"))
    second = reply(("user", "say red"), ("assistant", first or " "), ("user", "say blue"))
    assert ["".join(text.split()) for text in answers] == ["".join(printable(text).split()) for text in (first, second, first)]
    assert printable("红 a\n\x1b[2J\u202e") == "红 a\n\ufffd[2J\ufffd"  # a model must not steer the terminal
    assert trueline("chat", toys.model(), SHORT, stdin="\n").ok().out.count("you>") == 1


def test_written_lines_are_readable(toys: Toys, trueline: Commands, tmp_path: Path) -> None:
    prompts = lines(tmp_path / "p.jsonl", [{"prompt": "说 红"}])
    trueline("generate", toys.model(), "--prompts", prompts, "--out", tmp_path / "out.jsonl", SHORT).ok()
    text = (tmp_path / "out.jsonl").read_text("utf-8")
    assert '"prompt": "说 红"' in text and json.loads(text)


def test_code_in_a_model_folder_is_not_run_and_the_user_is_told(toys: Toys, trueline: Commands, tmp_path: Path) -> None:
    folder = shutil.copytree(toys.model("chatglm3"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling_chatglm.Own"}}))
    (folder / "modeling_chatglm.py").write_text(f"open({str(tmp_path / 'witness')!r}, 'w')\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "say red"}\n')
    command = [sys.executable, "-m", "trueline", "generate", str(folder), "--prompts", "p.jsonl", "--out", "a.jsonl", "max_new_tokens=4"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "brings its own code (auto_map), which is never run; the built-in chatglm3 model is used" in done.stderr
    assert not (tmp_path / "witness").exists()


@pytest.mark.parametrize("kind", [pytest.param("full", marks=pytest.mark.slow), "lora"])
def test_a_model_remembers_the_template_it_was_trained_with(toys: Toys, trueline: Commands, tmp_path: Path, kind: str) -> None:
    place = ("model.template=qwen3_no_thinking", f"model.path={toys.model('qwen3')}", f"run.output={tmp_path / 'run'}")
    run = tmp_path / "run"
    trueline("sft", toys.config("sft"), *place, *KINDS[kind]).ok()
    question = [{"role": "user", "content": "say red"}]
    there, base = api.load(str(run / "model")), api.load(str(toys.model("qwen3")))
    chosen = api.load(str(toys.model("qwen3")), template="qwen3_no_thinking")
    assert there.render(question).tokens == chosen.render(question).tokens != base.render(question).tokens
    assert there.opened.folder.family.template == "qwen3_no_thinking"
    trueline("export", run, tmp_path / "out", *(["--merge"] if kind == "lora" else [])).ok()
    assert api.load(str(tmp_path / "out")).render(question).tokens == chosen.render(question).tokens
    wrong = trueline("sft", toys.config("sft"), "model.template=chatlm", f"run.output={tmp_path / 'no'}").refused()
    assert "model.template: 'chatlm' is not known" in wrong
