"""Files to token samples, split into trained and held out. Nothing is cut or left out without being counted and said."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np

from trueline.config.schema import DataConfig, PpoDataConfig
from trueline.data.conversation import Conversation, Preference, Prompt
from trueline.data.formats import Located, load_conversations, load_preferences, load_prompts
from trueline.data.sample import Pair, Sample
from trueline.data.stream import key
from trueline.data.tokenizer import Tokenizer
from trueline.errors import UserError
from trueline.families.family import Family

T = TypeVar("T")


@dataclass(frozen=True)
class TokenPrompt:
    """A prompt as the model sees it, and where it came from."""

    tokens: list[int]
    prompt: Prompt


@dataclass(frozen=True)
class Prepared(Generic[T]):
    """What a stage trains on and what it is judged by. `notes` say what was left out or cut, with counts."""

    train: list[T]
    held_out: list[T]
    notes: list[str]


def sft_samples(data: DataConfig, family: Family, tokenizer: Tokenizer, seed: int) -> Prepared[Sample]:
    """Conversations rendered whole; trained are the assistant's words and the token that ends its turn."""

    def render(conversation: Conversation) -> Sample:
        return family.render(conversation, tokenizer, last_only=data.train_on == "last")

    return _prepare(data, seed, lambda paths: load_conversations(paths, data.format), render, _cut_sample)


def preference_pairs(data: DataConfig, family: Family, tokenizer: Tokenizer, seed: int) -> Prepared[Pair]:
    """The prompt with each of its two answers; only the answers are trained, earlier assistant turns are not."""

    def render(preference: Preference) -> Pair:
        sides = []
        for answer in (preference.chosen, preference.rejected):
            messages = (*preference.prompt.messages, answer)
            sides.append(family.render(replace(preference.prompt, messages=messages), tokenizer, last_only=True))
        return Pair(*sides)

    notes: list[str] = []
    found = _prepare(data, seed, lambda paths: load_preferences(paths, data.format, data.ranked, notes), render, _cut_pair)
    return replace(found, notes=notes + found.notes)


def prompt_tokens(data: DataConfig, family: Family, tokenizer: Tokenizer, max_new_tokens: int, seed: int) -> Prepared[TokenPrompt]:
    """Prompts with room for an answer: at most `data.max_length - max_new_tokens` tokens. A prompt is never cut."""
    room = data.max_length - max_new_tokens
    if room < 1:
        raise UserError(
            f"sampling.max_new_tokens ({max_new_tokens}) leaves no room for a prompt within data.max_length ({data.max_length}); "
            "raise data.max_length or ask for shorter answers"
        )

    def render(prompt: Prompt) -> TokenPrompt:
        return TokenPrompt(family.render(prompt.conversation, tokenizer, open=True).tokens, prompt)

    def no_cut(item: TokenPrompt, room: int) -> TokenPrompt | None:
        return None

    return _prepare(data, seed, lambda paths: load_prompts(paths, data.format), render, no_cut, room, lambda p: len(p.tokens))


def ptx_samples(data: PpoDataConfig, family: Family, tokenizer: Tokenizer, seed: int) -> Prepared[Sample]:
    """The supervised samples of PPO's pretraining-loss mix."""
    if not data.ptx:
        return Prepared([], [], [])
    plain = DataConfig(train=data.ptx, max_length=data.max_length, overlength=data.overlength)
    return sft_samples(plain, family, tokenizer, seed)


def _prepare(
    data: DataConfig,
    seed: int,
    load: Callable[[Sequence[str]], list[Located[Any]]],
    render: Callable[[Any], T],
    cut: Callable[[T, int], T | None],
    room: int | None = None,
    length: Callable[[T], int] = lambda item: longest(item),
) -> Prepared[T]:
    room = data.max_length if room is None else room
    notes: list[str] = []
    train = _render_all(load(data.train) if data.train else [], data, render, cut, room, length, notes)
    held_out = _render_all(load(data.eval) if data.eval else [], data, render, cut, room, length, notes)
    for files, kept, purpose in ((data.train, train, "train on"), (data.eval, held_out, "evaluate on")):
        if files and not kept:
            raise UserError(f"nothing is left to {purpose} in {', '.join(files)}: {'; '.join(notes)}")
    if data.eval_fraction:
        if len(train) < 2:
            raise UserError(f"data.eval_fraction needs at least 2 records, found {len(train)}; add records or set it to 0")
        order = np.argsort(np.random.Philox(key=key(seed, "held-out")).random_raw(len(train)), kind="stable")
        count = min(max(1, round(len(train) * data.eval_fraction)), len(train) - 1)
        chosen = set(order[:count].tolist())
        held_out = [item for i, item in enumerate(train) if i in chosen]
        train = [item for i, item in enumerate(train) if i not in chosen]
    if data.limit is not None:
        train = train[: data.limit]
    return Prepared(train, held_out, notes)


def _render_all(
    located: list[Located[Any]],
    data: DataConfig,
    render: Callable[[Any], T],
    cut: Callable[[T, int], T | None],
    room: int,
    length: Callable[[T], int],
    notes: list[str],
) -> list[T]:
    kept: list[T] = []
    problems: list[str] = []
    strange: list[str] = []
    dropped = truncated = 0
    for item in located:
        try:
            rendered = render(item.value)
        except UserError as error:
            strange.append(f"{item.where}: {error}")
            continue
        if length(rendered) <= room:
            kept.append(rendered)
        elif data.overlength == "error":
            problems.append(f"{item.where}: {length(rendered)} tokens, expected at most {room}")
        elif data.overlength == "truncate" and (shorter := cut(rendered, room)) is not None:
            kept.append(shorter)
            truncated += 1
        else:
            dropped += 1
    if strange:
        raise UserError(f"{len(strange)} of {len(located)} records cannot be rendered for this model:", strange[:50])
    if problems:
        advice = "raise data.max_length, or set data.overlength to drop or truncate"
        raise UserError(f"{len(problems)} of {len(located)} records are longer than data.max_length allows; {advice}:", problems[:50])
    if dropped:
        notes.append(f"{dropped} of {len(located)} records left out: longer than {room} tokens")
    if truncated:
        notes.append(f"{truncated} of {len(located)} records cut at {room} tokens")
    return kept


def longest(item: Any) -> int:
    """Tokens of a sample, or of a pair's longer side."""
    return max(len(item.chosen), len(item.rejected)) if isinstance(item, Pair) else len(item)


def _cut_sample(sample: Sample, room: int) -> Sample | None:
    """The first `room` tokens; None when no trained token is among them."""
    trained = sample.trained[:room]
    return replace(sample, tokens=sample.tokens[:room], trained=trained) if any(trained) else None


def _cut_pair(pair: Pair, room: int) -> Pair | None:
    chosen, rejected = (_cut_sample(side, room) if len(side) > room else side for side in (pair.chosen, pair.rejected))
    return Pair(chosen, rejected) if chosen and rejected and chosen.tokens != rejected.tokens else None
