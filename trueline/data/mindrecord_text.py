"""MindRLHF's token columns to records of text and back. One rule: padding is told by the masks, never by a pad id.

Left out: experience files (the rollouts of one model). The reference's log-probabilities of DPO files are written, but not read: nothing
ties them to a model.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trueline.data.mindrecord import NUMBER, read_shard
from trueline.data.record import Problems, Record
from trueline.data.sample import Pair
from trueline.data.tokenizer import Tokenizer
from trueline.errors import UserError

Row = dict[str, Any]
PROMPTS = {"prompt_ids": "int64", "pretrain_ids": "int64", "loss_mask": "int64"}
_SIDES = ("chosen", "rejected")
DPO = {f"{side}_{part}": "int32" for side in _SIDES for part in ("input_ids", "labels", "attention_mask", "loss_mask")}
DPO |= {f"{side}_ref_logps": "float32" for side in _SIDES}
_PAIRS = {f"{side}_{part}": "int32" for side in _SIDES for part in ("input_ids", "attention_mask")}
REWARD = {**_PAIRS, "position_id": "int32", "loss_mask": "int32", "end_ind": NUMBER}
_ROLES = ("system", "user", "assistant", "observation")


def read_tokens(path: str, problems: Problems, tokenizer: Tokenizer | None) -> Iterator[Record]:
    """Each record as text: `prompt` and `response`, or a prompt with `chosen` and `rejected`. The first record's columns tell the kind."""
    if tokenizer is None:
        convert = f"`trueline convert {path} OUT.jsonl --model DIR`"
        problems.add(path, f"token ids, which only their model's tokenizer can read, expected text or a model; {convert} makes text of it")
        return
    read: Callable[[Row, Tokenizer], dict[str, Any]] | None = None
    try:
        for number, row in enumerate(read_shard(Path(path)), start=1):
            if read is None:
                needed, read = _reader(row)
            try:
                if odd := next((name for name in needed if getattr(row.get(name), "ndim", 0) != 1), None):
                    raise ValueError(f"{odd} is no list of token ids")
                yield Record(path, number, read(row, tokenizer))
            except ValueError as problem:
                problems.add(f"{path}:{number}", str(problem), record=(path, number, 1))
        if read is None:
            problems.add(path, "no records, expected at least one")
    except UserError as problem:
        problems.add(path, str(problem).removeprefix(f"{path}: "))


def prompt_row(prompt: list[int], whole: list[int], trained: list[bool], prompt_length: int, length: int, pad: int) -> Row:
    """MindRLHF's three columns, padded on the right; `loss_mask` is 0 on padding (MindRLHF's own scripts put the pad id there).

    Raises ValueError for a record that does not fit: a cut one would teach another end.
    """
    if len(prompt) > prompt_length or len(whole) > length:
        raise ValueError(f"prompt of {len(prompt)} tokens, {len(whole)} in all; expected at most {prompt_length} and {length}")
    columns = (_padded(prompt, prompt_length, pad), _padded(whole, length, pad), _padded(trained, length))
    return dict(zip(PROMPTS, columns, strict=True))


def dpo_row(pair: Pair, length: int, pad: int) -> Row:
    """Eight of MindRLHF's ten columns (`reference_columns` has the others). ValueError as in `prompt_row`."""
    row = _both_sides(pair, length, pad)
    for side, sample in zip(_SIDES, (pair.chosen, pair.rejected), strict=True):
        row |= {f"{side}_labels": row[f"{side}_input_ids"], f"{side}_loss_mask": _padded(sample.trained, length)}
    return row


def reference_columns(*sums: float) -> Row:
    """The reference's log-probability of each answer, summed over its tokens (chosen, rejected)."""
    return {f"{side}_ref_logps": np.array([value], np.float32) for side, value in zip(_SIDES, sums, strict=True)}


def reward_row(pair: Pair, length: int, pad: int) -> Row:
    """MindRLHF's seven columns; compared are the tokens from the first that differs to the end of the longer side (`end_ind`)."""
    sides = pair.chosen.tokens, pair.rejected.tokens
    start = next((i for i, (a, b) in enumerate(zip(*sides, strict=False)) if a != b), min(map(len, sides)))
    end = max(map(len, sides))
    mask = _padded([0] * start + [1] * (end - start), max(length, end))
    return {**_both_sides(pair, length, pad), "position_id": np.arange(length), "loss_mask": mask, "end_ind": end}


def _both_sides(pair: Pair, length: int, pad: int) -> Row:
    row: Row = {}
    for side, sample in zip(_SIDES, (pair.chosen, pair.rejected), strict=True):
        if len(sample) > length:
            raise ValueError(f"{side} of {len(sample)} tokens with its prompt; expected at most {length}")
        row[f"{side}_input_ids"] = _padded(sample.tokens, length, pad)
        row[f"{side}_attention_mask"] = _padded([1] * len(sample), length)
    return row


def _padded(values: Sequence[int], length: int, fill: int = 0) -> "np.ndarray[Any, Any]":
    return np.array([*values, *[fill] * (length - len(values))], np.int64)


def _reader(columns: Iterable[str]) -> tuple[list[str], Callable[[Row, Tokenizer], dict[str, Any]]]:
    """The columns that are needed, and what reads them."""
    there = set(columns)
    masked = [*_PAIRS, *(f"{side}_loss_mask" for side in _SIDES)]
    for needed, read in (([*PROMPTS], _prompt), (masked, _dpo), ([*_PAIRS], _pair)):
        if there.issuperset(needed):
            return needed, read
    if {"query_tensors", "response_tensors"} <= there:
        raise UserError("an experience file, which holds the rollouts of one model; PPO makes its own")
    raise UserError(
        f"columns {', '.join(sorted(there))}; expected MindRLHF's prompts ({', '.join(PROMPTS)}) or pairs ({', '.join(_PAIRS)})"
    )


def _prompt(row: Row, tokenizer: Tokenizer) -> dict[str, Any]:
    start, end = _ones(row["loss_mask"], "loss_mask")
    ids = row["pretrain_ids"].tolist()
    messages, answer = _split(ids[:end], start, tokenizer)
    return {"prompt": messages[0]["content"], "response": answer} if len(messages) == 1 else {"messages": [*messages, _answer(answer)]}


def _dpo(row: Row, tokenizer: Tokenizer) -> dict[str, Any]:
    sides = []
    for side in ("chosen", "rejected"):
        start, end = _ones(row[f"{side}_loss_mask"], f"{side}_loss_mask")
        sides.append((row[f"{side}_input_ids"].tolist()[:end], start))
    return _both(sides, tokenizer)


def _pair(row: Row, tokenizer: Tokenizer) -> dict[str, Any]:
    """The prompt is what both sides begin with: there is no mask that says more."""
    ids = [row[f"{side}_input_ids"][row[f"{side}_attention_mask"] != 0].tolist() for side in ("chosen", "rejected")]
    start = next((i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b), min(map(len, ids)))
    while start and "\ufffd" in tokenizer.decode(ids[0][start:]) + tokenizer.decode(ids[1][start:]):
        start -= 1  # both answers begin with the same bytes of a character
    return _both([(side, start) for side in ids], tokenizer)


def _both(sides: list[tuple[list[int], int]], tokenizer: Tokenizer) -> dict[str, Any]:
    (prompt, chosen), (other, rejected) = (_split(ids, start, tokenizer) for ids, start in sides)
    if prompt != other:
        raise ValueError("the sides have different prompts")
    if len(prompt) == 1:
        return {"prompt": prompt[0]["content"], "chosen": chosen, "rejected": rejected}
    return {"messages": prompt, "chosen": chosen, "rejected": rejected}


def _ones(mask: "np.ndarray[Any, Any]", name: str) -> tuple[int, int]:
    """Begin and end of the first run of ones; behind it is padding, with any value."""
    found = np.flatnonzero(mask == 1)
    if not len(found):
        raise ValueError(f"{name} has no 1, so the answer was cut off; leave the record out, or preprocess with a larger length")
    start = int(found[0])
    rest = np.flatnonzero(mask[start:] != 1)
    return start, start + int(rest[0]) if len(rest) else len(mask)


def _split(ids: list[int], start: int, tokenizer: Tokenizer) -> tuple[list[dict[str, str]], str]:
    """`(messages, answer)`: what stands before `start`, by the control tokens of ChatML or GLM-4, and the text after it."""
    names = {i: name for name, i in tokenizer.specials.items()}
    turns: list[tuple[str, list[int]]] = []
    for token in ids[:start]:
        name = names.get(token, "")
        if name.strip("<|>") in (*_ROLES, "im_start"):
            turns.append((name.strip("<|>"), []))
        elif not name and turns:
            turns[-1][1].append(token)
    answer = tokenizer.decode(ids[start:]).removeprefix("\n")
    if not turns:
        return [{"role": "user", "content": tokenizer.decode(ids[:start])}], answer
    messages = []
    for role, inner in turns:
        header, _, content = tokenizer.decode(inner).partition("\n")
        chatml = role == "im_start"  # the role is its text's first line, and a newline follows its end
        messages.append({"role": header if chatml else role, "content": content.removesuffix("\n") if chatml else content})
    last = messages.pop() if messages[-1]["role"] == "assistant" else {"content": ""}
    if any(message["role"] not in _ROLES for message in messages) or not messages:
        raise ValueError("turns that are neither ChatML's nor GLM-4's, or another tokenizer's tokens")
    return messages, last["content"] + answer


def _answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
