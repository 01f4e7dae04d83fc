"""The comparison with other programs, on tiny models: what it draws, and that it finds out when numbers differ."""

import argparse
import importlib
import statistics
import sys

import pytest
import torch
import transformers

from tests.structure.tree import ROOT

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 512}


@pytest.fixture
def load(monkeypatch):
    """Imports modules of `bench/peers` as their scripts do, with sizes for tests."""
    monkeypatch.syspath_prepend(str(ROOT / "bench" / "peers"))
    before = set(sys.modules)
    sides = importlib.import_module("sides")
    for name, value in {"PPO": SMALL, "PPO_ANSWERS": 4, "PPO_ANSWER": 8, "STOP_RATE": 1 / 8}.items():
        monkeypatch.setattr(sides, name, value)
    yield importlib.import_module
    for name in ("sides", "material", "columns", "words", "compare", "ppo_ours"):
        if name not in before:
            sys.modules.pop(name, None)


def test_answers_end_about_as_often_as_meant(load):
    material, rate = load("material"), 1 / 16
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**material.SIZES | SMALL)).eval()
    prompts = torch.randint(2, 512, (200, 16))

    def stopped() -> list[int]:
        settings = transformers.GenerationConfig(max_new_tokens=96, do_sample=True, top_k=0, eos_token_id=1, pad_token_id=0)
        rows = model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=settings)[:, 16:].tolist()
        return [row.index(1) + 1 for row in rows if 1 in row]

    assert len(stopped()) < 60  # random weights hardly ever do
    material.make_it_stop(model, 1, rate)
    lengths = stopped()
    assert len(lengths) > 180
    assert 0.75 / rate < statistics.mean(lengths) < 1.33 / rate
    assert 0.6 / rate < statistics.stdev(lengths)  # a geometric distribution's is nearly its mean


def test_prompts_are_of_one_length_or_of_many(load):
    sides = load("sides")
    assert {len(p) for p in sides.draw_prompts(50, False)} == {32}
    varied = sides.draw_prompts(400, True)
    lengths = [len(p) for p in varied]
    assert 29 < statistics.median(lengths) < 35 and 6 < statistics.stdev(lengths) < 11
    assert varied == sides.draw_prompts(400, True) and min(min(p) for p in varied) > sides.STOP


def test_our_side_finds_the_numbers_of_a_first_iteration_and_its_errors(load, tmp_path):
    load("material").write_ppo(tmp_path)
    ours, columns = load("ppo_ours"), load("columns")
    policy = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path / "ppo")
    critic, reward = (transformers.Qwen2ForSequenceClassification.from_pretrained(tmp_path / name) for name in ("critic", "reward"))
    prompts, answers = [[5, 9, 200, 30], [7, 8]], [[40, 41, 1], [50, 51, 52, 53]]
    found: dict[str, list] = {"logprobs": [], "values": [], "scores": []}
    with torch.no_grad():
        for prompt, answer in zip(prompts, answers, strict=True):
            tokens, first = torch.tensor([prompt + answer]), len(prompt)
            logprobs = policy(tokens).logits[0, first - 1 : -1].log_softmax(-1)
            found["logprobs"].append(logprobs.gather(-1, tokens[0, first:, None])[:, 0])
            found["values"].append(critic.score(critic.model(tokens).last_hidden_state)[0, first - 1 : -1, 0])
            found["scores"].append(reward.score(reward.model(tokens).last_hidden_state)[0, -1])
    right = {name: torch.cat(rows) for name, rows in found.items()}
    right["ref_logprobs"] = right["logprobs"].clone()
    places = {name: tmp_path / f"{name}.safetensors" for name in ("right", "wrong")}
    columns.write_columns(places["right"], prompts, answers, right)
    assert columns.read_columns(places["right"])[:2] == (prompts, answers)
    columns.write_columns(places["wrong"], prompts, answers, right | {"values": right["values"].roll(1)})
    given = argparse.Namespace(folder=tmp_path, iterations=2, epochs=2, varied=True, dtype="float32", columns=list(places.values()))
    reading = ours.train(given)
    compare = load("compare")
    peers = {name: {"columns": str(path), "losses": []} for name, path in places.items()}
    assert len(reading["seconds"]) == len(reading["tokens"]) == 2
    assert compare.difference(reading, peers["right"], near=False) is None
    assert "values" in compare.difference(reading, peers["wrong"], near=False)
    assert "not checked" in compare.difference(reading, {"columns": "another", "losses": []}, near=False)
    reading["apart"][str(places["right"])]["scores"] = float("nan")
    assert compare.difference(reading, peers["right"], near=True)


def test_words_become_the_tokens_they_stand_for(load, tmp_path):
    words = load("words")
    words.write_tokenizer(tmp_path, 300)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokens = [2, 11, 1, 299, 0, 29]
    assert tokenizer(words.text(tokens))["input_ids"] == tokens
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)


def test_every_ppo_side_leaves_its_own_file_and_ours_checks_them_all(load):
    compare = load("compare")
    groups = [g for g in compare.GROUPS if g.name.startswith("ppo ")]
    assert len(groups) == 2
    for group in groups:
        files = [next(a for a in side.arguments if a.endswith(".safetensors")) for side in group.theirs]
        assert len(set(files)) == len(files)
        for side in group.ours:
            assert [a for a in side.arguments if a.endswith(".safetensors")] == files
            assert side.arguments[2 : side.arguments.index("--columns")] == group.theirs[0].arguments[2 : side.arguments.index("--columns")]
        assert set(group.targets) <= {f"{mine.name}, {peer.name}" for mine in group.ours for peer in group.theirs}


def test_each_machine_has_a_table_and_only_measured_groups_change(load):
    compare = load("compare")
    cells = ("1", "2", "0.5", "3", "4", "-", "2026-01-01")
    first = [compare.Row("reward, float32", "A", cells), compare.Row("rollout uniform, float32", "B", cells)]
    missing = compare.Row("rollout uniform, auto", "-", compare.not_run(compare.NO_BFLOAT16))
    page = compare.merge_tables("\n", [*first, missing], ["reward", "rollout uniform"], "Chip X, 2 threads", "`run`")
    assert page.count("| case |") == 1 and page.count("\n| r") == 2 and compare.NO_BFLOAT16 not in page
    both = compare.merge_tables(page, first[:1], ["reward"], "Chip Y, 2 threads", "`run`")
    assert both.startswith(page) and both.count("| case |") == 2
    newer = compare.Row("reward, float32", "A", ("9", *cells[1:]))
    again = compare.merge_tables(both, [newer], ["reward"], "Chip X, 2 threads", "`run again`")
    lines = again.splitlines()
    assert lines.index(newer.line()) < lines.index(first[1].line()) < lines.index(first[0].line())  # Y's comes last, as it was
    assert again.count("`run again`, Chip X, 2 threads, Python") == 1 and "`run`, Chip X" not in again
