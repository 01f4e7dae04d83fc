"""Everything `trueline demo` trains on, written from a seed: data files in the seeds' schemas, a tokenizer, a small GLM-4 config.

Held-out prompts never occur in training, the facts behind closed tables do; the same seed gives the same bytes.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from trueline.recipes.demo_grammar import (
    GREETINGS,
    KINDS,
    LANGUAGES,
    MANNERS,
    PHRASES,
    TOPICS,
    Language,
    Manner,
    Question,
    ask,
    facts,
    join,
)

# prompts per kind and language; a prompt is a fact, a template and a greeting. Tables this small are learned in about a minute on two
# cores because there are more prompts than the model can memorise: with a third of them it remembers prompts instead of facts
TRAIN, TRAIN_WIDE = 220, {"sum": 400, "larger": 400}
FRESH, HELD_OUT = 20, 40
PAIRS, HELD_OUT_PAIRS = 2400, 400

CONTROL_TOKENS = tuple("<|endoftext|> [MASK] [gMASK] [sMASK] <sop> <eop> <|system|> <|user|> <|assistant|> <|observation|>".split())
VOCABULARY = 1152  # more than the data fills: every character and word of it is one token
# one Chinese character, one English word with the space before it, one number, one run of marks: a fact never melts into its template
PIECES = r"\p{Han}| ?[a-zA-Z]+|\p{N}+| ?[^\s\p{L}\p{N}]|\s+"


@dataclass(frozen=True)
class DemoFiles:
    """What `write_demo` wrote. `model` holds config.json and the tokenizer, no weights."""

    model: Path
    sft: Path  # GLM-4 `messages`
    sft_held_out: Path
    preferences: Path  # CValues
    preferences_held_out: Path
    prompts: Path  # for PPO: {"prompt", "answer", "accepted", "kind", "language"}
    prompts_held_out: Path


@dataclass(frozen=True)
class Split:
    """Questions by use. No prompt of `held_out` is in `train` or `fresh`."""

    train: list[Question]
    fresh: list[Question]
    held_out: list[Question]


def split_questions(rng: Generator) -> Split:
    """Draw every kind's questions in both languages, facts in turn, so that each fact of a closed table is in training."""
    split = Split([], [], [])
    for language in LANGUAGES:
        for kind in KINDS:
            n = TRAIN_WIDE.get(kind, TRAIN)
            drawn = _draw(kind, language, n + FRESH + HELD_OUT, rng)
            split.train.extend(drawn[:n])
            split.fresh.extend(drawn[n : n + FRESH])
            split.held_out.extend(drawn[n + FRESH :])
    for part in (split.train, split.fresh, split.held_out):
        _shuffle(part, rng)
    return split


def _draw(kind: str, language: Language, count: int, rng: Generator) -> list[Question]:
    """`count` questions with different prompts. Round by round, every fact gets its next greeting and template."""
    known = facts(kind, language)
    frames = [(g, q) for g in GREETINGS[language] for q in TOPICS[kind, language].questions]
    orders = [rng.permutation(len(frames)) for _ in known] if len(known) < count else None
    drawn: list[Question] = []
    for turn in range(len(frames)):
        for i in rng.permutation(len(known)):
            if len(drawn) == count:
                return drawn
            frame = orders[i][turn] if orders else rng.integers(len(frames))
            drawn.append(ask(kind, language, known[i], *frames[frame]))
    raise ValueError(f"{kind} in {language} has {len(drawn)} prompts, {count} wanted")


def _shuffle(items: list[Any], rng: Generator) -> None:
    items[:] = [items[i] for i in rng.permutation(len(items))]


def compose(question: Question, manner: Manner, rng: Generator) -> str:
    """One answer: an opener, a short or a long statement, and half of the time a closer."""
    phrases = PHRASES[question.language, manner]
    said = question.accepted[rng.integers(len(question.accepted))]
    closer = phrases.closers[rng.integers(len(phrases.closers))] if rng.integers(2) else ""
    return join(question.language, phrases.openers[rng.integers(len(phrases.openers))], said, closer)


def sft_records(questions: Iterable[Question], rng: Generator) -> list[dict[str, Any]]:
    """Each question answered correctly twice, once in either manner: half of the answers have the preferred one, whatever the prompt."""
    records = [
        {"messages": [{"role": "user", "content": q.prompt}, {"role": "assistant", "content": compose(q, manner, rng)}]}
        for q in questions
        for manner in MANNERS
    ]
    _shuffle(records, rng)
    return records


def preference_records(questions: list[Question], count: int, rng: Generator) -> list[dict[str, str]]:
    """`count` CValues pairs: courteous before brusque, both correct; the better is the longer in every second one, so length says nothing.

    Left out: pairs of a right and a wrong fact. A reward model this small still ranks them by chance after 400 steps; what keeps the facts
    in PPO is the KL penalty.
    """
    records = []
    for i in range(count):
        question = questions[int(rng.integers(len(questions)))]
        while True:
            chosen, rejected = compose(question, "courteous", rng), compose(question, "brusque", rng)
            if len(chosen) != len(rejected) and (len(chosen) > len(rejected)) == (i % 2 == 0):
                break
        answers = {"pos_resp": chosen, "neg_resp": rejected, "pos_type": "courteous", "neg_type": "brusque"}
        records.append({"prompt": question.prompt} | answers)
    _shuffle(records, rng)
    return records


def prompt_records(questions: Iterable[Question]) -> list[dict[str, Any]]:
    """Prompts with their ground truth: the fact, and every statement that counts as correct."""
    return [
        {"prompt": q.prompt, "answer": q.answer, "accepted": list(q.accepted), "kind": q.kind, "language": q.language} for q in questions
    ]


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Byte-level BPE (arXiv:1508.07909) with GLM-4's control tokens behind the learned vocabulary, at most `VOCABULARY` entries in all."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PIECES), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(CONTROL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in CONTROL_TOKENS])
    return tokenizer


def write_model(folder: Path, tokenizer: Tokenizer) -> None:
    """config.json, tokenizer.json and tokenizer_config.json of a small GLM-4; its weights are drawn by `model.init: random`."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = {t: tokenizer.token_to_id(t) for t in CONTROL_TOKENS}
    config = {
        "architectures": ["GlmForCausalLM"],
        "model_type": "glm",
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": [ids["<|endoftext|>"], ids["<|user|>"], ids["<|observation|>"]],
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 128,
        "initializer_range": 0.08,
        "intermediate_size": 256,
        "max_position_embeddings": 512,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "pad_token_id": ids["<|endoftext|>"],
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": tokenizer.get_vocab_size(),
    }
    settings = {
        "added_tokens_decoder": {
            str(i): {"content": t, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
            for t, i in ids.items()
        },
        "additional_special_tokens": list(CONTROL_TOKENS),
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "model_max_length": 512,
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "tokenizer_config.json", settings)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _write_lines(path: Path, records: Iterable[Any]) -> None:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")


def write_demo(folder: Path, seed: int) -> DemoFiles:
    """Write all data files and the model folder under `folder` and return where they are."""
    rng = np.random.default_rng((seed, 20240618))
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    split = split_questions(rng)
    asked = [*split.train, *split.fresh]
    _shuffle(asked, rng)
    sft = sft_records(split.train, rng)
    pairs = preference_records(asked, PAIRS, rng)
    files = DemoFiles(
        model=folder / "model",
        sft=data / "sft.jsonl",
        sft_held_out=data / "sft_held_out.jsonl",
        preferences=data / "preferences.jsonl",
        preferences_held_out=data / "preferences_held_out.jsonl",
        prompts=data / "prompts.jsonl",
        prompts_held_out=data / "prompts_held_out.jsonl",
    )
    _write_lines(files.sft, sft)
    _write_lines(files.sft_held_out, sft_records(split.held_out[:200], rng))
    _write_lines(files.preferences, pairs)
    _write_lines(files.preferences_held_out, preference_records(split.held_out, HELD_OUT_PAIRS, rng))
    _write_lines(files.prompts, prompt_records(asked))
    _write_lines(files.prompts_held_out, prompt_records(split.held_out))
    texts = [m["content"] for r in sft for m in r["messages"]]
    write_model(files.model, train_tokenizer(texts))
    return files
