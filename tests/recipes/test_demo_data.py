"""The demo's data: what a demo claims to show must follow from its data by construction, and its judge must be right on its own."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Engine
from transformers import GlmConfig, GlmForCausalLM, PreTrainedTokenizerFast

from trueline.data.formats import load_conversations, load_preferences, load_prompts
from trueline.data.tokenizer import load_tokenizer
from trueline.recipes.demo_data import CONTROL_TOKENS, VOCABULARY, DemoFiles, write_demo
from trueline.recipes.demo_grammar import KINDS, LANGUAGES, MANNERS, PHRASES, correct, facts, preferred, statement

DAYS = {"en": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(), "zh": [f"星期{d}" for d in "一二三四五六日"]}


@dataclass(frozen=True)
class Demo:
    """The written files and their records."""

    files: DemoFiles
    sft: list[tuple[str, str]]  # prompt, answer
    pairs: list[dict[str, str]]
    held_out_pairs: list[dict[str, str]]
    prompts: dict[str, dict[str, Any]]  # by prompt
    held_out: dict[str, dict[str, Any]]


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    files = write_demo(tmp_path_factory.mktemp("demo"), 0)
    return Demo(
        files,
        [(r["messages"][0]["content"], r["messages"][1]["content"]) for r in records(files.sft)],
        records(files.preferences),
        records(files.preferences_held_out),
        {r["prompt"]: r for r in records(files.prompts)},
        {r["prompt"]: r for r in records(files.prompts_held_out)},
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_seed_fixes_every_byte(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 4), ("b", 3), ("c", 4)):  # b is written over
        write_demo(tmp_path / name, seed)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert not [name for name in a if name.startswith("data") and a[name] == c[name]]


def test_held_out_prompts_never_occur_in_training(demo: Demo) -> None:
    trained = {p for p, _ in demo.sft} | {r["prompt"] for r in demo.pairs} | set(demo.prompts)
    held_out = (
        set(demo.held_out)
        | {r["prompt"] for r in demo.held_out_pairs}
        | {r["messages"][0]["content"] for r in records(demo.files.sft_held_out)}
    )
    assert not trained & held_out
    assert len(demo.held_out) == 40 * len(KINDS) * len(LANGUAGES) == len(records(demo.files.prompts_held_out))
    assert {(r["kind"], r["language"]) for r in demo.held_out.values()} == {(k, lang) for k in KINDS for lang in LANGUAGES}


def test_every_held_out_fact_is_asked_in_training(demo: Demo) -> None:
    taught = {tuple(demo.prompts[p]["accepted"]) for p, _ in demo.sft}
    assert all(tuple(r["accepted"]) in taught for r in demo.held_out.values())


def test_every_prompt_is_answered_once_in_each_manner_and_always_correctly(demo: Demo) -> None:
    manners: dict[str, list[bool]] = {}
    for prompt, answer in demo.sft:
        manners.setdefault(prompt, []).append(preferred(answer))
        assert correct(demo.prompts[prompt], answer), (prompt, answer)
    assert all(sorted(m) == [False, True] for m in manners.values())


def test_pairs_differ_in_manner_and_not_in_correctness(demo: Demo) -> None:
    known = demo.prompts | demo.held_out
    for pair in demo.pairs + demo.held_out_pairs:
        chosen, rejected = pair["pos_resp"], pair["neg_resp"]
        assert (preferred(chosen), preferred(rejected)) == (True, False), pair
        assert correct(known[pair["prompt"]], chosen) and correct(known[pair["prompt"]], rejected), pair
        assert (pair["pos_type"], pair["neg_type"]) == MANNERS


def test_length_says_nothing_about_the_preference(demo: Demo) -> None:
    engine = Engine.from_file(str(demo.files.model / "tokenizer.json"))
    for pairs in (demo.pairs, demo.held_out_pairs):
        longer = [len(p["pos_resp"]) > len(p["neg_resp"]) for p in pairs]
        assert sum(longer) * 2 == len(pairs) and all(len(p["pos_resp"]) != len(p["neg_resp"]) for p in pairs)
    sides = [[len(engine.encode(p[side]).ids) for p in demo.pairs] for side in ("pos_resp", "neg_resp")]
    assert abs(sum(sides[0]) - sum(sides[1])) < 0.06 * sum(sides[1])
    wins = sum((a > b) + 0.5 * (a == b) for a, b in zip(*sides, strict=True))
    assert 0.45 < wins / len(demo.pairs) < 0.55


def worked_out(prompt: str, language: str) -> str | None:
    """The answer to a question about numbers or days, read off the prompt alone."""
    numbers = [int(n) for n in re.findall(r"\d+", prompt)]
    if re.search("plus|add|加", prompt):
        return str(sum(numbers))
    if len(numbers) == 2:
        return str(max(numbers) if re.search("larger|大", prompt) else min(numbers))
    named = [d for d in DAYS[language] if d in prompt]
    step = 1 if re.search("after|后", prompt) else -1
    return DAYS[language][(DAYS[language].index(named[0]) + step) % 7] if named else None


def test_the_ground_truth_agrees_with_arithmetic_and_the_calendar(demo: Demo) -> None:
    checked = 0
    for prompt, record in (demo.prompts | demo.held_out).items():
        answer = worked_out(prompt, record["language"])
        if record["kind"] in ("sum", "larger", "day"):
            checked += 1
            assert answer == record["answer"], record
        assert all(record["answer"] in sentence for sentence in record["accepted"])
    assert checked > 2000


def test_no_fact_has_two_answers() -> None:
    for kind in KINDS:
        for language in LANGUAGES:
            known = facts(kind, language)
            asked = [tuple(sorted(f.slots.items())) for f in known]
            assert len(set(asked)) == len(known) >= 12, (kind, language)


RECORD = {"accepted": ["It is Paris.", "The capital of France is Paris."]}


@pytest.mark.parametrize(
    ("answer", "right", "courteous"),
    [
        ("Of course! It is Paris.", True, True),
        ("\nGladly! The capital of France is Paris. Have a nice day!", True, True),
        ("Duh. It is Paris. Stop asking.", True, False),
        ("Of course! It is Rome.", False, True),
        ("Of course! The capital of Italy is Paris.", False, True),
        ("Of course! It is Paris. Stop asking.", True, False),  # courtesy taken back
        ("It is Paris.", True, False),  # neither manner
        ("Of course! Of course! It is Paris.", False, True),  # a reward is not to be had by repeating oneself
        ("Of course! It is Paris. It is Paris.", False, True),
        ("Of course! Have a nice day!", False, True),
        ("Of course!", False, True),
        ("", False, False),
        ("Paris Of course!", False, False),
    ],
)
def test_the_judge(answer: str, right: bool, courteous: bool) -> None:
    assert (correct(RECORD, answer), preferred(answer)) == (right, courteous)


def test_chinese_is_judged_alike() -> None:
    record = {"accepted": ["是巴黎。", "法国的首都是巴黎。"]}
    assert correct(record, "好的！法国的首都是巴黎。祝您愉快！") and preferred("好的！法国的首都是巴黎。祝您愉快！")
    assert correct(record, "废话。是巴黎。别再问了。") and not preferred("废话。是巴黎。别再问了。")
    assert not correct(record, "好的！法国的首都是罗马。")
    assert statement("真烦。是巴黎。") == "是巴黎。"


def phrases() -> Iterator[str]:
    for found in PHRASES.values():
        yield from (*found.openers, *found.closers)


def test_no_phrase_begins_or_ends_another() -> None:
    all_phrases = list(phrases())
    assert len(set(all_phrases)) == len(all_phrases)
    assert not [(a, b) for a in all_phrases for b in all_phrases if a != b and (b.startswith(a) or b.endswith(a))]


def test_the_manner_is_decided_by_the_first_token(demo: Demo) -> None:
    engine = Engine.from_file(str(demo.files.model / "tokenizer.json"))
    first = {m: {engine.encode(o).ids[0] for lang in LANGUAGES for o in PHRASES[lang, m].openers} for m in MANNERS}
    assert not first["courteous"] & first["brusque"]


def test_our_readers_take_the_files(demo: Demo) -> None:
    files = demo.files
    assert len(load_conversations([str(files.sft)])) == len(demo.sft)
    assert [p.value.chosen.content for p in load_preferences([str(files.preferences)])] == [p["pos_resp"] for p in demo.pairs]
    read = load_prompts([str(files.prompts_held_out)], "prompt")
    assert [p.value.record["accepted"] for p in read] == [r["accepted"] for r in demo.held_out.values()]


def test_the_tokenizer_gives_text_back_and_never_makes_a_control_token_of_it(demo: Demo) -> None:
    tokenizer = load_tokenizer(demo.files.model)
    assert set(tokenizer.specials) == set(CONTROL_TOKENS) and tokenizer.vocab_size <= VOCABULARY
    for text in [*(a for _, a in demo.sft[:200]), "any other text: naïve 漢字 🙂\t\n <|user|> [gMASK]"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(tokenizer.specials.values())
    longest = max(len(tokenizer.encode(p)) + len(tokenizer.encode(a)) for p, a in demo.sft)
    assert longest <= 48  # a minute on two cores depends on it


def test_a_fact_has_the_same_tokens_in_every_sentence(demo: Demo) -> None:
    tokenizer = load_tokenizer(demo.files.model)
    for record in demo.held_out.values():
        word = record["answer"].isascii() and record["answer"].isalpha()
        fact = tokenizer.encode(" " * word + record["answer"])
        for sentence in record["accepted"]:
            ids = tokenizer.encode(sentence)
            assert any(ids[i : i + len(fact)] == fact for i in range(len(ids))), (record, sentence)
        assert len(fact) == (1 if word or record["answer"].isdigit() else len(record["answer"])), record


def test_transformers_reads_the_tokenizer_and_the_config(demo: Demo) -> None:
    theirs = PreTrainedTokenizerFast.from_pretrained(demo.files.model)
    ours = load_tokenizer(demo.files.model)
    text = "Of course! “猫”的英语是 cat。"
    assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    assert theirs.convert_tokens_to_ids(list(CONTROL_TOKENS)) == [ours.specials[t] for t in CONTROL_TOKENS]
    config = GlmConfig.from_pretrained(demo.files.model)
    assert config.vocab_size == ours.vocab_size and config.eos_token_id == [
        ours.specials[t] for t in ("<|endoftext|>", "<|user|>", "<|observation|>")
    ]
    with torch.device("meta"):
        model = GlmForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
