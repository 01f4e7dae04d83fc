"""What comes out of the cache is what went in, whole or not at all, whoever else is at it and whenever it was killed."""

import json
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trueline.data.cache import (
    Items,
    Tally,
    TokenPrompt,
    digest,
    in_memory,
    items_fingerprint,
    key_of,
    lengths,
    stored,
)
from trueline.data.conversation import Conversation, Message, Prompt
from trueline.data.sample import Pair, Sample
from trueline.errors import RunError, UserError

FACTS = {"file": "a", "room": 8}


def sample(i: int) -> Sample:
    draw = np.random.default_rng(i)
    size = int(draw.integers(1, 30))
    return Sample(draw.integers(0, 2**32, size).tolist(), (draw.random(size) < 0.5).tolist(), i % 4)


def prompt(i: int) -> TokenPrompt:
    messages = (Message("user", f"问 {i}"), Message("assistant", "{}", "f"), Message("observation", "ok"))
    talk = Conversation(messages, ({"type": "function"},))
    return TokenPrompt([i, i + 1], Prompt(talk, {"id": i, "big": 2**70, "half": 0.1, "nested": [{"a": None}]}))


ITEMS: dict[str, list[Any]] = {
    "sample": [sample(i) for i in range(25)],
    "pair": [Pair(sample(i), sample(i + 100)) for i in range(25)],
    "prompt": [prompt(i) for i in range(25)],
}


def rows(items: list[Any], kill_at: int = -1, pause: float = 0) -> Any:
    def read(tally: Tally) -> Iterator[list[Any]]:
        for i in range(tally.seen, len(items)):
            if i == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(pause)
            tally.seen += 1
            yield [items[i]]
        tally.equal = [7]

    return read


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("kind", list(ITEMS))
def test_items_come_back_bit_for_bit(kind: Any, tmp_path: Path) -> None:
    there = ITEMS[kind]
    made, found = (stored(tmp_path, FACTS, kind, rows(there), chunk=10) for _ in range(2))
    assert (made.made, found.made, found.tally) == (True, False, Tally(25, equal=[7]))
    for kept in (made, found, in_memory(kind, rows(there))):
        items: Items[Any] = Items(kept.blocks)
        assert [items[i] for i in range(len(items))] == there and list(items) == there
        assert lengths(items).tolist() == [len(item) for item in there]
        assert items_fingerprint(items) == items_fingerprint(there) == items_fingerprint(there[:9], items[9:])
        some = items.take(np.array([20, 3, 11]))[1:]
        assert list(some) == [there[3], there[11]] and items_fingerprint(some) == items_fingerprint([there[3], there[11]])
        assert items[-1] == there[-1]
        with pytest.raises(IndexError):
            items[25]


def test_every_part_of_an_item_tells_in_its_digest() -> None:
    one = Sample([1, 2, 3], [False, True, True], 0)
    others = [
        Sample([1, 2, 4], one.trained),
        Sample(one.tokens, [True] * 3),
        Sample(one.tokens, one.trained, 1),
        Sample([1, 2], [False, True]),
    ]
    pairs = [Pair(one, others[0]), Pair(others[0], one)]
    assert len({digest(item) for item in (one, *others, *pairs)}) == 7


def test_a_key_is_of_every_fact() -> None:
    assert key_of(FACTS) == key_of(dict(reversed(FACTS.items())))
    assert len({key_of(facts) for facts in (FACTS, FACTS | {"room": 9}, FACTS | {"file": "b"}, FACTS | {"more": 1})}) == 4


def build(folder: Path, kill_at: int, pause: float = 0) -> None:
    stored(folder, FACTS, "sample", rows(ITEMS["sample"], kill_at, pause), chunk=4)


@pytest.mark.parametrize("kill_at", [0, 3, 4, 13, 24])
def test_a_killed_build_goes_on_to_the_same_bytes(kill_at: int, tmp_path: Path) -> None:
    build(tmp_path / "whole", -1)
    process = multiprocessing.get_context("fork").Process(target=build, args=(tmp_path / "killed", kill_at))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (part,) = (tmp_path / "killed").iterdir()
    assert part.suffix == ".part" and len(list(part.glob("*.arrow"))) == kill_at // 4
    seen = []

    def watched(tally: Tally) -> Iterator[list[Any]]:
        seen.append(tally.seen)
        yield from rows(ITEMS["sample"])(tally)

    stored(tmp_path / "killed", FACTS, "sample", watched, chunk=4)
    assert seen == [kill_at // 4 * 4] and contents(tmp_path / "killed") == contents(tmp_path / "whole")


def triples(kill_at: int) -> Any:
    """25 items in records of three, the last of one; dies before record `kill_at`."""

    def read(tally: Tally) -> Iterator[list[Any]]:
        while tally.seen < 9:
            if tally.seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            tally.seen += 1
            yield ITEMS["sample"][3 * tally.seen - 3 : 3 * tally.seen]

    return read


@pytest.mark.parametrize("kill_at", [1, 2, 5])
def test_the_items_of_a_record_are_in_one_chunk(kill_at: int, tmp_path: Path) -> None:
    whole = stored(tmp_path / "whole", FACTS, "sample", triples(-1), chunk=4)
    assert [len(block) for block in whole.blocks] == [6, 6, 6, 6, 1]
    assert [record for block in whole.blocks for record in block.records().tolist()] == [i // 3 + 1 for i in range(25)]
    assert list(Items(whole.blocks)) == ITEMS["sample"]
    arguments = (tmp_path / "killed", FACTS, "sample", triples(kill_at), 4)
    process = multiprocessing.get_context("fork").Process(target=stored, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    stored(tmp_path / "killed", FACTS, "sample", triples(-1), chunk=4)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_chunk_damaged_before_the_resume_is_made_again(tmp_path: Path) -> None:
    build(tmp_path / "whole", -1)
    process = multiprocessing.get_context("fork").Process(target=build, args=(tmp_path / "killed", 13))
    process.start()
    process.join()
    second = next((tmp_path / "killed").glob("*.part/chunk-000001.arrow"))
    second.write_bytes(second.read_bytes()[:-1])
    build(tmp_path / "killed", -1)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_two_at_once_make_it_once(tmp_path: Path) -> None:
    processes = [multiprocessing.get_context("fork").Process(target=build, args=(tmp_path, -1, 0.02)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]

    def nobody(tally: Tally) -> Iterator[list[Any]]:
        raise AssertionError("it was there already")
        yield

    (place,) = tmp_path.iterdir()
    assert place.name == key_of(FACTS) and not stored(tmp_path, FACTS, "sample", nobody).made


def damage_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGE: dict[str, Any] = {
    "a flipped bit": ("chunk-000002.arrow", damage_flip, "chunk-000002.arrow is not as it was written"),
    "cut short": ("chunk-000002.arrow", lambda path: path.write_bytes(path.read_bytes()[:99]), "chunk-000002.arrow has 99 bytes, expected"),
    "missing": ("chunk-000002.arrow", Path.unlink, "chunk-000002.arrow is missing"),
    "manifest flipped": ("manifest.json", damage_flip, ""),
    "manifest missing": ("manifest.json", Path.unlink, "manifest.json is missing"),
}


@pytest.mark.parametrize("name", list(DAMAGE))
def test_damage_is_said_and_made_again(name: str, tmp_path: Path) -> None:
    build(tmp_path, -1)
    before = contents(tmp_path)
    file, harm, sentence = DAMAGE[name]
    harm(tmp_path / key_of(FACTS) / file)
    again = stored(tmp_path, FACTS, "sample", rows(ITEMS["sample"]), chunk=4)
    assert again.made and "was damaged" in again.note and sentence in again.note and contents(tmp_path) == before


def test_a_file_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def failing(tally: Tally) -> Iterator[list[Any]]:
        yield from rows(ITEMS["sample"])(tally)
        tally.failed = True

    kept = stored(tmp_path, FACTS, "sample", failing, chunk=4)
    assert kept.tally.failed and not kept.blocks and not list(tmp_path.iterdir())


def full(folder: Path, answer: Any) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    try:
        build(folder, -1)
    except RunError as error:
        answer.put(str(error))


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    process = context.Process(target=full, args=(tmp_path, answer))
    process.start()
    said = answer.get(timeout=30)
    process.join()
    assert said.startswith(f"disk full: the tokens could not be stored in {tmp_path}; free some space") and "\n" not in said
    assert not list(tmp_path.iterdir())


def test_a_place_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"data.cache: .*file cannot be used to store tokens in \(.*\); name another folder"):
        build(tmp_path / "file", -1)


def test_a_manifest_of_another_key_is_not_believed(tmp_path: Path) -> None:
    build(tmp_path, -1)
    (tmp_path / key_of(FACTS)).rename(tmp_path / key_of(FACTS | {"room": 9}))
    other = stored(tmp_path, FACTS | {"room": 9}, "sample", rows(ITEMS["sample"][:3]))
    assert other.made and list(Items(other.blocks)) == ITEMS["sample"][:3]
    assert json.loads((tmp_path / key_of(FACTS | {"room": 9}) / "manifest.json").read_text())["facts"]["room"] == 9
