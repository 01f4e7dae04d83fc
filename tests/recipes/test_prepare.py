"""What is left to train on when records are too long, what is said when nothing is, and that the token cache changes none of it."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.recipes.commands import Commands
from tests.recipes.toys import Toys, lines
from trueline.config.load import from_any
from trueline.config.schema import DataConfig, SftConfig
from trueline.data.cache import items_fingerprint
from trueline.data.formats import load_conversations
from trueline.data.sample import Sample
from trueline.data.tokenizer import load_tokenizer
from trueline.errors import UserError
from trueline.families.chatglm import CHATGLM
from trueline.families.family import Family
from trueline.families.glm4 import GLM4
from trueline.families.llama import LLAMA
from trueline.families.qwen2 import QWEN2
from trueline.recipes.prepare import Prepared, cache_folder, preference_pairs, prompt_tokens, sft_samples


def prepared(toys: Toys, **settings: object) -> Prepared:
    data = DataConfig.model_validate({"train": str(toys.data("messages.jsonl")), **settings})
    return sft_samples(data, QWEN2, load_tokenizer(toys.model()), seed=0)


@pytest.mark.parametrize("fraction", [0.0, 0.1])
def test_files_of_which_all_records_are_too_long_say_so(toys: Toys, fraction: float) -> None:
    sentence = f"nothing is left to train on in {toys.data('messages.jsonl')}: 12 of 12 records left out: longer than 8 tokens"
    with pytest.raises(UserError, match=re.escape(sentence)):
        prepared(toys, max_length=8, overlength="drop", eval_fraction=fraction)


def test_every_record_is_trained_on_or_held_out(toys: Toys) -> None:
    whole, split = prepared(toys), prepared(toys, eval_fraction=0.25)
    assert (len(split.train), len(split.held_out)) == (9, 3)
    assert sorted(s.tokens for s in [*split.train, *split.held_out]) == sorted(s.tokens for s in whole.train)


def test_one_record_cannot_be_divided(toys: Toys, tmp_path: Path) -> None:
    single = tmp_path / "single.jsonl"
    single.write_text(toys.data("messages.jsonl").read_text("utf-8").splitlines()[0] + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="data.eval_fraction needs at least 2 records, found 1"):
        prepared(toys, train=str(single), eval_fraction=0.5)


SPEECH = {"qwen2": QWEN2, "glm": GLM4, "llama": LLAMA, "chatglm": CHATGLM}
USES: dict[str, tuple[list[str], Any]] = {
    "sft": (["messages.jsonl", "alpaca.json", "cvalues.jsonl"], sft_samples),
    "pairs": (["cvalues.jsonl", "preference.json"], preference_pairs),
    "prompts": (["prompts.jsonl", "messages.jsonl"], lambda data, family, tokenizer, seed: prompt_tokens(data, family, tokenizer, 8, seed)),
}


@pytest.mark.parametrize("use", list(USES))
@pytest.mark.parametrize("family", list(SPEECH))
def test_cached_items_are_the_rendered_ones(family: str, use: str, toys: Toys, tmp_path: Path) -> None:
    names, prepare = USES[use]
    data = {"train": [str(toys.data(name)) for name in names], "eval_fraction": 0.2, "limit": 9}
    tokenizer = load_tokenizer(toys.model(family))
    found = [
        prepare(DataConfig.model_validate(data | {"cache": cache}), SPEECH[family], tokenizer, 3)
        for cache in ("off", str(tmp_path), str(tmp_path))
    ]
    fresh = found[0]
    assert len(fresh.train) == 9 and fresh.held_out
    for other, made in zip(found[1:], (True, False), strict=True):
        assert {kept.made for kept in other.files.values()} == {made}
        assert list(other.train) == list(fresh.train) and list(other.held_out) == list(fresh.held_out) and other.notes == fresh.notes
        assert items_fingerprint(other.train) == items_fingerprint(list(fresh.train))
    if use == "sft":
        assert any(item.context for item in fresh.train) == (family == "chatglm")


def test_samples_are_what_the_renderer_gives(toys: Toys) -> None:
    tokenizer = load_tokenizer(toys.model())
    expected = [QWEN2.render(found.value, tokenizer) for found in load_conversations([str(toys.data("messages.jsonl"))])]
    assert list(prepared(toys).train) == expected


def made(toys: Toys, family: Family = QWEN2, tokenizer: str = "qwen2", use: Any = sft_samples, **settings: object) -> list[bool]:
    data = DataConfig.model_validate(settings)
    return [kept.made for kept in use(data, family, load_tokenizer(toys.model(tokenizer)), 0).files.values()]


def test_whatever_tokens_depend_on_is_part_of_their_key(toys: Toys, tmp_path: Path) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    two.write_bytes(toys.data("cvalues.jsonl").read_bytes())
    one.write_bytes(toys.data("messages.jsonl").read_bytes())
    base: dict[str, Any] = {"train": [str(one)], "cache": str(tmp_path / "cache")}
    assert made(toys, **base) == [True] and made(toys, **base) == [False]
    assert made(toys, **base | {"train": [str(one), str(two)]}) == [False, True]  # a file more is that file's work
    for changed in ({"max_length": 900}, {"overlength": "drop"}, {"train_on": "last"}, {"format": "messages"}):
        assert made(toys, **base | changed) == [True], changed
    assert made(toys, family=replace(QWEN2, name="other"), **base) == [True]
    assert made(toys, family=LLAMA, tokenizer="llama", **base) == [True]
    assert made(toys, family=replace(QWEN2, render=LLAMA.render), tokenizer="llama", **base) == [True]
    pairs = base | {"train": [str(two)]}
    assert made(toys, use=preference_pairs, **pairs) == [True] and made(toys, use=preference_pairs, **pairs, ranked="best") == [True]
    for unchanged in ({"limit": 3}, {"eval_fraction": 0.3}):  # chosen of what is stored
        assert made(toys, **base | unchanged) == [False], unchanged
    one.write_bytes(one.read_bytes().replace(b"red", b"rod", 1))
    assert made(toys, **base) == [True]


def test_another_version_of_the_source_is_another_key(toys: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"train": [str(toys.data("messages.jsonl"))], "cache": str(tmp_path)}
    assert made(toys, **settings) == [True]
    monkeypatch.setattr("trueline.recipes.prepare.source_hash", lambda: "of a changed renderer")
    assert made(toys, **settings) == [True]


def test_counts_survive_in_the_cache(toys: Toys, tmp_path: Path) -> None:
    equal = tmp_path / "equal.jsonl"
    lines = toys.data("cvalues.jsonl").read_text("utf-8").splitlines()
    equal.write_text("\n".join([*lines[:3], '{"prompt": "a", "pos_resp": "b", "neg_resp": "b"}', lines[3]]) + "\n", encoding="utf-8")
    data = DataConfig(train=(str(equal),), cache=str(tmp_path / "cache"))
    first, again = (preference_pairs(data, QWEN2, load_tokenizer(toys.model()), 0) for _ in range(2))
    assert first.notes == again.notes == [f"1 pair left out, both answers are equal: {equal}:4"] and len(again.train) == 4
    for overlength in ("drop", "truncate"):
        notes = [prepared(toys, max_length=40, overlength=overlength, cache=str(tmp_path / "cache")).notes for _ in range(2)]
        assert notes[0] == notes[1] and "of 12 records" in notes[0][0]


def test_refused_records_are_told_every_time_and_never_stored(toys: Toys, tmp_path: Path) -> None:
    said = []
    for cache in ("off", str(tmp_path / "cache"), str(tmp_path / "cache")):
        with pytest.raises(UserError) as refused:
            prepared(toys, max_length=40, cache=cache)
        said.append(str(refused.value))
    assert said[0] == said[1] == said[2] and "longer than data.max_length allows" in said[0]
    assert f"{toys.data('messages.jsonl')}:" in said[0]
    assert not list((tmp_path / "cache").iterdir())


def test_a_broken_file_stores_nothing_of_those_after_it(toys: Toys, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{\n")
    with pytest.raises(UserError, match="broken.jsonl:1"):
        prepared(toys, train=[str(broken), str(toys.data("messages.jsonl"))], cache=str(tmp_path / "cache"))
    assert made(toys, train=[str(toys.data("messages.jsonl"))], cache=str(tmp_path / "cache")) == [True]
    assert len(prepared(toys, train=[str(toys.data("messages.jsonl"))], cache=str(tmp_path / "cache")).train) == 12


def test_where_tokens_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder("off") is None and cache_folder(str(tmp_path)) == tmp_path
    monkeypatch.setenv("TRUELINE_CACHE", "/a")
    assert cache_folder(None) == Path("/a/tokens")
    monkeypatch.delenv("TRUELINE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_folder(None) == Path("/b/trueline/tokens")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder(None) == Path.home() / ".cache/trueline/tokens"


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo"])
def test_prepare_does_a_stages_work_and_the_stage_finds_it(stage: str, trueline: Commands, toys: Toys, tmp_path: Path) -> None:
    settings = [toys.config(stage), f"data.cache={tmp_path / 'cache'}"]
    told = ["--stage", stage] if stage != "ppo" else []
    done = trueline("prepare", *settings, *told, f"run.output={tmp_path / 'x'}").ok()
    assert ", made, in " in done.out and "records/s" in done.out and not (tmp_path / "x").exists()
    kept = sorted(path.name for path in (tmp_path / "cache").iterdir())
    weights = []
    for cache in (tmp_path / "cache", "off"):
        output = tmp_path / f"run-{cache == 'off'}"
        trueline(stage, *settings, f"data.cache={cache}", f"run.output={output}").ok()
        weights.append((output / "model/model.safetensors").read_bytes())
    assert weights[0] == weights[1] and sorted(path.name for path in (tmp_path / "cache").iterdir()) == kept
    assert ", there already, in " in trueline("prepare", *settings, *told, f"run.output={tmp_path / 'x'}").ok().out


def test_prepare_says_when_it_cannot_tell_the_stage(trueline: Commands, toys: Toys) -> None:
    said = trueline("prepare", toys.config("sft"), "run.output=x").refused()
    assert "has no section of one stage alone" in said and "--stage sft, reward, dpo or ppo" in said
    assert "has sections of reward and dpo" in trueline("prepare", toys.config("dpo"), "ranking.loss=last", "dpo.beta=1").refused()
    assert "--stage rm: expected sft" in trueline("prepare", toys.config("sft"), "--stage", "rm", "run.output=x").refused()
    off = ("prepare", toys.config("sft"), "--stage=sft", "run.output=x", "data.cache=off")
    assert "there is nothing to prepare" in trueline(*off).refused()


def test_files_mix_by_weight(toys: Toys) -> None:
    files = [str(toys.data("messages.jsonl")), str(toys.data("alpaca.json"))]
    first, second = (prepared(toys, train=file).train for file in files)
    mixed = prepared(toys, train=files, weights=[2.0, 0.5]).train
    count = {tuple(s.tokens): 0 for s in mixed}
    for sample in mixed:
        count[tuple(sample.tokens)] += 1
    once = {tuple(s.tokens) for s in second}
    assert len(mixed) == 2 * len(first) + round(len(second) / 2)
    assert [count[tuple(s.tokens)] for s in first] == [2 * sum(tuple(o.tokens) == tuple(s.tokens) for o in first) for s in first]
    assert {n for tokens, n in count.items() if tokens in once} == {1}
    assert prepared(toys, train=files, weights=[1, 1]).train[5].tokens == prepared(toys, train=files).train[5].tokens


def test_a_weighted_record_is_never_in_both_parts(toys: Toys) -> None:
    found = prepared(toys, train=[str(toys.data("alpaca.json"))], weights=[3.0], eval_fraction=0.5)
    assert len(found.train) == 3 * len(found.held_out) == 18
    assert not {tuple(s.tokens) for s in found.train} & {tuple(s.tokens) for s in found.held_out}


def test_weights_are_one_for_each_entry(toys: Toys) -> None:
    with pytest.raises(UserError, match="data.weights has 2 numbers for 1 entries of data.train"):
        from_any(SftConfig, toys.dictionary("sft", data={"train": "a.jsonl", "weights": [1, 2]}, run={"output": "out"}))


def test_a_folder_means_the_files_in_it(toys: Toys, tmp_path: Path) -> None:
    for name in ("messages.jsonl", "cvalues.jsonl"):
        (tmp_path / name).write_bytes(toys.data(name).read_bytes())
    both = prepared(toys, train=[str(tmp_path / "cvalues.jsonl"), str(tmp_path / "messages.jsonl")])
    for path in (str(tmp_path), str(tmp_path / "*.jsonl")):
        assert items_fingerprint(prepared(toys, train=path).train) == items_fingerprint(both.train)


def rounds(toys: Toys, path: Path, **settings: object) -> Prepared:
    """20 records with one to four answers each (`q3.2` asks for the third record's second, `a3.2` is it), for ChatGLM-6B."""
    talks = []
    for i in range(20):
        pairs = [{"role": role, "content": f"{role[0]}{i}.{k}"} for k in range(i % 4 + 1) for role in ("user", "assistant")]
        talks.append({"messages": pairs})
    lines(path, talks)
    data = DataConfig.model_validate({"train": str(path), "cache": "off", **settings})
    return sft_samples(data, CHATGLM, load_tokenizer(toys.model("chatglm")), seed=1)


def answers(toys: Toys, samples: Sequence[Sample]) -> list[str]:
    tokenizer = load_tokenizer(toys.model("chatglm"))
    return [tokenizer.decode([t for t, on in zip(s.tokens, s.trained, strict=True) if on][:-1]) for s in samples]


ANSWERS = [f"a{i}.{k}" for i in range(20) for k in range(i % 4 + 1)]


def test_a_record_is_as_many_samples_as_it_has_answers(toys: Toys, tmp_path: Path) -> None:
    whole = rounds(toys, tmp_path / "talks.jsonl")
    assert answers(toys, whole.train) == ANSWERS and len(ANSWERS) == 50 and all(sample.context for sample in whole.train)
    assert whole.notes == ["50 samples of 20 records, one for each trained answer"]
    last = rounds(toys, tmp_path / "talks.jsonl", train_on="last")
    assert last.notes == [] and answers(toys, last.train) == [f"a{i}.{i % 4}" for i in range(20)]
    for cache in (tmp_path / "cache", tmp_path / "cache"):
        stored = rounds(toys, tmp_path / "talks.jsonl", cache=str(cache))
        assert list(stored.train) == list(whole.train) and items_fingerprint(stored.train) == items_fingerprint(list(whole.train))


def test_the_samples_of_a_record_stay_together(toys: Toys, tmp_path: Path) -> None:
    split = rounds(toys, tmp_path / "talks.jsonl", eval_fraction=0.3)
    held_out, train = answers(toys, split.held_out), answers(toys, split.train)
    assert sorted(held_out + train) == sorted(ANSWERS)
    records = [{answer.split(".")[0] for answer in part} for part in (held_out, train)]
    assert len(records[0]) == 6 and not records[0] & records[1]
    # as many of the same records are held out where each is one sample
    last = rounds(toys, tmp_path / "talks.jsonl", eval_fraction=0.3, train_on="last")
    assert {answer.split(".")[0] for answer in answers(toys, last.held_out)} == records[0]
    first = rounds(toys, tmp_path / "talks.jsonl", limit=3)
    assert answers(toys, first.train) == ["a0.0", "a1.0", "a1.1", "a2.0", "a2.1", "a2.2"]
    double = rounds(toys, tmp_path / "talks.jsonl", weights=(2.0,))
    assert answers(toys, double.train) == ANSWERS * 2
    half = answers(toys, rounds(toys, tmp_path / "talks.jsonl", weights=(0.5,)).train)
    assert len({answer.split(".")[0] for answer in half}) == 10
    assert half == [answer for answer in ANSWERS if answer.split(".")[0] in {a.split(".")[0] for a in half}]


def test_samples_that_are_too_long_are_counted_one_by_one(toys: Toys, tmp_path: Path) -> None:
    whole = rounds(toys, tmp_path / "talks.jsonl")
    long = [len(sample) > 90 for sample in whole.train]
    dropped = rounds(toys, tmp_path / "talks.jsonl", max_length=90, overlength="drop")
    left = {answer.split(".")[0] for answer, out in zip(ANSWERS, long, strict=True) if not out}
    assert 0 < sum(long) < 50 and dropped.notes == [
        f"{sum(long)} samples of 20 records left out: longer than 90 tokens",
        f"{50 - sum(long)} samples of {len(left)} records, one for each trained answer",
    ]
    assert list(dropped.train) == [sample for sample, out in zip(whole.train, long, strict=True) if not out]
    with pytest.raises(UserError) as caught:
        rounds(toys, tmp_path / "talks.jsonl", max_length=90)
    too_long = {answer.split(".")[0] for answer, out in zip(ANSWERS, long, strict=True) if out}
    assert f"{len(too_long)} of 20 records are longer than data.max_length allows" in str(caught.value)
