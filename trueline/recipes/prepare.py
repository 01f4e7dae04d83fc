"""Files to token samples, split into trained and held out. Nothing is cut or left out without being counted and said.

Every file goes through the token cache by itself (`data/cache.py`), so a file added to the list costs its own rendering only.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np

from trueline.config.schema import DataConfig, PpoDataConfig
from trueline.data import cache
from trueline.data.cache import Items, Kept, Kind, Tally, TokenPrompt, in_memory, stored
from trueline.data.conversation import Conversation, Preference, Prompt
from trueline.data.files import file_hash, find_files
from trueline.data.formats import Located, equal_note, iter_conversations, iter_preferences, iter_prompts
from trueline.data.reader import Problems
from trueline.data.sample import Pair, Sample
from trueline.data.shared import bound, shared_pairs
from trueline.data.stream import key
from trueline.data.tokenizer import Tokenizer
from trueline.errors import RunError, UserError
from trueline.families import transcript
from trueline.families.family import Family
from trueline.families.transcript import training_samples

WORTH_SHARING = 1.1  # times fewer tokens; below, cutting and joining keys costs what is saved

T = TypeVar("T")
Read = Callable[[str, Problems, list[str]], Iterator[Located[Any]]]
"""(file, problems, places of equal pairs) -> its records."""


@dataclass(frozen=True)
class Prepared(Generic[T]):
    """What a stage trains on and what it is judged by. `notes` say what was left out or cut, with counts; `files` what is known of each."""

    train: Sequence[T]
    held_out: Sequence[T]
    notes: list[str]
    files: dict[str, Kept] = field(default_factory=dict)


@dataclass(frozen=True)
class Source(Generic[T]):
    """How the records of a file become items, and all that this depends on beside the file (`facts`)."""

    kind: Kind
    read: Read
    render: Callable[[Any], list[T]]  # a conversation may be several samples
    cut: Callable[[T, int], T | None]
    expect: Callable[[int], None]  # told how many bytes are to be rendered
    room: int
    overlength: str
    facts: dict[str, Any]
    folder: Path | None  # of the cache; None: none is kept


def sft_samples(data: DataConfig, family: Family, tokenizer: Tokenizer, seed: int) -> Prepared[Sample]:
    """Conversations, trained are the assistant's words and the token that ends its turn; of some families a sample for each answer."""

    def render(conversation: Conversation) -> list[Sample]:
        return training_samples(family, conversation, tokenizer, last_only=data.train_on == "last")

    def read(path: str, problems: Problems, equal: list[str]) -> Iterator[Located[Conversation]]:
        return iter_conversations([path], data.format, problems, tokenizer)

    facts = _facts("answer", data, family, tokenizer) | {"train_on": data.train_on}
    return _prepare(data, seed, _source("sample", read, render, _cut_sample, data.max_length, data, tokenizer, facts))


def preference_pairs(data: DataConfig, family: Family, tokenizer: Tokenizer, seed: int) -> Prepared[Pair]:
    """The prompt with each of its two answers; only the answers are trained, earlier assistant turns are not."""

    def render(preference: Preference) -> list[Pair]:
        sides = []
        for answer in (preference.chosen, preference.rejected):
            messages = (*preference.prompt.messages, answer)
            sides.append(family.render(replace(preference.prompt, messages=messages), tokenizer, last_only=True))
        return [Pair(sides[0], sides[1])]

    def read(path: str, problems: Problems, equal: list[str]) -> Iterator[Located[Preference]]:
        return iter_preferences([path], data.format, data.ranked, problems, equal, tokenizer)

    facts = _facts("pair", data, family, tokenizer) | {"ranked": data.ranked}
    return _prepare(data, seed, _source("pair", read, render, _cut_pair, data.max_length, data, tokenizer, facts))


def with_shared_prompts(pairs: Prepared[Pair], wanted: bool | Literal["auto"]) -> Prepared[Pair]:
    """The same pairs, their prompts to be run once; `auto`: where the training data have enough of them."""
    shared = shared_pairs(pairs.train) if wanted else None
    if shared is None or (wanted == "auto" and bound(shared) <= WORTH_SHARING):
        return pairs
    note = f"prompts run once for both answers: {bound(shared):.2f} times fewer tokens"
    return replace(pairs, train=shared, held_out=shared_pairs(pairs.held_out), notes=[*pairs.notes, note])


def prompt_tokens(data: DataConfig, family: Family, tokenizer: Tokenizer, max_new_tokens: int, seed: int) -> Prepared[TokenPrompt]:
    """Prompts with room for an answer: at most `data.max_length - max_new_tokens` tokens. A prompt is never cut."""
    room = data.max_length - max_new_tokens
    if room < 1:
        raise UserError(
            f"sampling.max_new_tokens ({max_new_tokens}) leaves no room for a prompt within data.max_length ({data.max_length}); "
            "raise data.max_length or ask for shorter answers"
        )

    def render(prompt: Prompt) -> list[TokenPrompt]:
        return [TokenPrompt(family.render(prompt.conversation, tokenizer, open=True).tokens, prompt)]

    def read(path: str, problems: Problems, equal: list[str]) -> Iterator[Located[Prompt]]:
        return iter_prompts([path], data.format, problems, tokenizer)

    def no_cut(item: TokenPrompt, room: int) -> TokenPrompt | None:
        return None

    facts = _facts("prompt", data, family, tokenizer)
    return _prepare(data, seed, _source("prompt", read, render, no_cut, room, data, tokenizer, facts))


def ptx_samples(data: PpoDataConfig, family: Family, tokenizer: Tokenizer, seed: int) -> Prepared[Sample]:
    """The supervised samples of PPO's pretraining-loss mix."""
    if not data.ptx:
        return Prepared([], [], [])
    plain = DataConfig(train=data.ptx, max_length=data.max_length, overlength=data.overlength, cache=data.cache)
    return sft_samples(plain, family, tokenizer, seed)


def cache_folder(setting: str | None) -> Path | None:
    """Where `data.cache` says tokens are kept; None: nowhere."""
    if setting is not None:
        return None if setting == "off" else Path(setting).expanduser()
    if home := os.environ.get("TRUELINE_CACHE"):
        return Path(home).expanduser() / "tokens"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trueline" / "tokens"


def _facts(use: str, data: DataConfig, family: Family, tokenizer: Tokenizer) -> dict[str, Any]:
    render = f"{family.name} {family.render.__module__}.{family.render.__qualname__}"
    known = {"use": use, "schema": data.format, "overlength": data.overlength, "tokenizer": tokenizer.fingerprint}
    return known | {"renderer": render, "source": source_hash()}


@lru_cache(maxsize=1)
def source_hash() -> str:
    """Hash of the source of everything between a file's bytes and its tokens: another version of it may give other ones."""
    folders = (Path(cache.__file__).parent, Path(transcript.__file__).parent)
    files = [Path(__file__), *(path for folder in folders for path in sorted(folder.glob("*.py")))]
    return hashlib.sha256(b"".join(path.name.encode() + b"\0" + path.read_bytes() for path in files)).hexdigest()


def _source(
    kind: Kind,
    read: Read,
    render: Callable[[Any], list[T]],
    cut: Callable[[T, int], T | None],
    room: int,
    data: DataConfig,
    tokenizer: Tokenizer,
    facts: dict[str, Any],
) -> Source[T]:
    return Source(kind, read, render, cut, tokenizer.expect, room, data.overlength, facts | {"room": room}, cache_folder(data.cache))


def _prepare(data: DataConfig, seed: int, source: Source[T]) -> Prepared[T]:
    notes: list[str] = []
    files: dict[str, Kept] = {}
    train, entry, first = _items(data.train, source, notes, files)
    held_out, *_ = _items(data.eval, source, notes, files)
    for paths, kept, purpose in ((data.train, train, "train on"), (data.eval, held_out, "evaluate on")):
        if paths and not len(kept):
            raise UserError(f"nothing is left to {purpose} in {', '.join(paths)}: {'; '.join(notes)}")
    items, records = train, np.arange(len(entry))  # chosen are records: the samples of one stay together
    if data.eval_fraction:
        if len(records) < 2:
            raise UserError(f"data.eval_fraction needs at least 2 records, found {len(records)}; add records or set it to 0")
        order = np.argsort(np.random.Philox(key=key(seed, "held-out")).random_raw(len(records)), kind="stable")
        count = min(max(1, round(len(records) * data.eval_fraction)), len(records) - 1)
        held_out, records = items.take(_samples_of(np.sort(order[:count]), first)), np.sort(order[count:])
    if data.weights:  # after the held-out records are gone: a record that occurs twice must not be in both
        records = records[mixed(entry[records], data.weights, seed)]
        if not len(records):
            raise UserError(f"data.weights leaves no record of {', '.join(data.train)}; give larger numbers")
    train = items.take(_samples_of(records[: data.limit], first))
    return Prepared(train, held_out, notes, files)


def _samples_of(records: "np.ndarray[Any, Any]", first: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """Indices of the items of these records, one record after the other; record i has those from `first[i]` to `first[i + 1]`."""
    counts = first[records + 1] - first[records]
    return np.repeat(first[records] - (counts.cumsum() - counts), counts) + np.arange(counts.sum())


def mixed(entry: "np.ndarray[Any, Any]", weights: Sequence[float], seed: int) -> "np.ndarray[Any, Any]":
    """Indices of records by the weight of their `entry` `[records]`: whole times all of them, and of the rest a drawn share.

    >>> mixed(np.array([0, 0, 1]), (2.0, 1.0), seed=0).tolist()
    [0, 1, 0, 1, 2]
    """
    found = []
    for i, weight in enumerate(weights):
        here = (entry == i).nonzero()[0]
        whole, share = divmod(weight, 1)
        order = np.argsort(np.random.Philox(key=key(seed, "weights", i)).random_raw(len(here)), kind="stable")
        found += [here] * int(whole) + [here[np.sort(order[: round(share * len(here))])]]
    return np.concatenate(found)


class _Refused:
    """What cannot be used in the files of one list: kept apart, for each kind has its own sentence."""

    def __init__(self) -> None:
        self.reading = Problems()
        self.strange: list[str] = []
        self.long: list[str] = []

    def __len__(self) -> int:
        return self.reading.count + len(self.strange) + len(self.long)

    def stop(self, records: int) -> None:
        """Raises one UserError with everything of the first kind there is."""
        self.reading.stop()
        if self.strange:
            raise UserError(f"{len(self.strange)} of {records} records cannot be rendered for this model:", self.strange[:50])
        if self.long:
            advice = "raise data.max_length, or set data.overlength to drop or truncate"
            sentence = f"{len(self.long)} of {records} records are longer than data.max_length allows; {advice}:"
            raise UserError(sentence, self.long[:50])


def _items(
    paths: Sequence[str], source: Source[T], notes: list[str], files: dict[str, Kept]
) -> tuple[Items[T], "np.ndarray[Any, Any]", "np.ndarray[Any, Any]"]:
    """The items of all files that `paths` mean, in order; which of `paths` each record came from, and its first item `[records + 1]`."""
    refused = _Refused()
    found = []
    meant = [(i, path) for i, inside in enumerate(find_files(paths)) for path in inside]
    for _, path in meant:
        rows = partial(_rows, path, source, refused)
        kept = _kept(path, source, rows)
        files[path] = kept
        found.append(kept)
        notes += [kept.note] if kept.note else []
    seen, dropped, truncated = (sum(getattr(kept.tally, name) for kept in found) for name in ("seen", "dropped", "truncated"))
    refused.stop(seen)
    items: Items[T] = Items([block for kept in found for block in kept.blocks])
    if equal := [f"{path}:{line}" for (_, path), kept in zip(meant, found, strict=True) for line in kept.tally.equal]:
        notes.append(equal_note(equal))
        if not seen:
            raise UserError(f"no pairs in {', '.join(paths)}: in every record both answers are equal")
    of = "samples of" if len(items) + dropped > seen else "of"  # some families make several of a record
    if dropped:
        notes.append(f"{dropped} {of} {seen} records left out: longer than {source.room} tokens")
    if truncated:
        notes.append(f"{truncated} {of} {seen} records cut at {source.room} tokens")
    numbers = [np.concatenate([block.records() for block in kept.blocks] or [np.empty(0, np.int64)]) for kept in found]
    counts = [np.unique(number, return_counts=True)[1] for number in numbers]
    entry = np.repeat(np.array([i for i, _ in meant], np.int64), [len(count) for count in counts])
    if len(items) > len(entry):
        notes.append(f"{len(items):,} samples of {len(entry):,} records, one for each trained answer")
    return items, entry, np.concatenate([[0], *counts]).cumsum()


def _kept(path: str, source: Source[T], rows: Callable[[Tally], Iterator[list[T]]]) -> Kept:
    """One file's items from the cache, or made now."""
    if source.folder is None or not Path(path).is_file():
        return in_memory(source.kind, rows)
    before = os.stat(path)
    facts = source.facts | {"file": file_hash(path), "ending": "".join(Path(path).suffixes[-2:]).lower()}
    kept = stored(source.folder, facts, source.kind, rows)
    after = os.stat(path)
    if kept.made and (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise RunError(f"{path} changed while it was read; start the same command again")
    return kept


def _rows(path: str, source: Source[T], refused: _Refused, tally: Tally) -> Iterator[list[T]]:
    """Each record's items, from record `tally.seen` on; once anything is refused, the rest is only looked through for more."""
    equal: list[str] = []
    start, before = tally.seen, len(refused)
    source.expect(Path(path).stat().st_size if Path(path).is_file() else 0)
    for located in islice(source.read(path, refused.reading, equal), start, None):
        tally.seen += 1
        if refused.reading.count:
            tally.failed = True
            continue
        try:
            items = source.render(located.value)
        except UserError as error:
            refused.strange.append(f"{located.where}: {error}")
            tally.failed = True
            continue
        length = max(map(longest, items))
        if length > source.room and source.overlength == "error":
            refused.long.append(f"{located.where}: {length} tokens, expected at most {source.room}")
            tally.failed = True
        elif fitting := _fitting(items, source, tally):
            yield fitting
    tally.equal = [int(where.rpartition(":")[2]) for where in equal]
    tally.failed = tally.failed or len(refused) > before


def _fitting(items: list[T], source: Source[T], tally: Tally) -> list[T]:
    """The items that have room, or are cut until they have; counts the others."""
    found = []
    for item in items:
        if longest(item) > source.room:
            shorter = source.cut(item, source.room) if source.overlength == "truncate" else None
            if shorter is None:
                tally.dropped += 1
                continue
            tally.truncated += 1
            item = shorter
        found.append(item)
    return found


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
