"""MindRLHF's token columns to records of text and back. One rule: padding is told by the masks, never by a pad id.

Left out: experience files (the rollouts of one model), and the reference's log-probabilities of DPO files, which nothing ties to a model.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from trueline.data.tokenizer import Tokenizer
from trueline.errors import UserError

Row = dict[str, Any]
PROMPTS = {"prompt_ids": "int64", "pretrain_ids": "int64", "loss_mask": "int64"}
_PAIRS = {f"{side}_{part}" for side in ("chosen", "rejected") for part in ("input_ids", "attention_mask")}
_DPO = _PAIRS | {f"{side}_loss_mask" for side in ("chosen", "rejected")}
_ROLES = ("system", "user", "assistant", "observation")


def texts(rows: Iterable[Row], tokenizer: Tokenizer, where: str) -> Iterator[dict[str, Any]]:
    """Each record as text: `prompt` and `response`, or a prompt with `chosen` and `rejected`. The first record's columns tell the kind."""
    read: Callable[[Row, Tokenizer], dict[str, Any]] | None = None
    for number, row in enumerate(rows, start=1):
        if read is None:
            read = _reader(row.keys(), where)
        try:
            yield read(row, tokenizer)
        except ValueError as problem:
            raise UserError(f"{where}: record {number}: {problem}") from None
    if read is None:
        raise UserError(f"{where}: no records")


def prompt_row(prompt: list[int], whole: list[int], trained: list[bool], prompt_length: int, length: int, pad: int) -> Row:
    """MindRLHF's three columns, padded on the right; `loss_mask` is 0 on padding (MindRLHF's own scripts put the pad id there).

    Raises ValueError for a record that does not fit: a cut one would teach another end.
    """
    if len(prompt) > prompt_length or len(whole) > length:
        raise ValueError(f"prompt of {len(prompt)} tokens, {len(whole)} in all; expected at most {prompt_length} and {length}")
    columns = (prompt, prompt_length, pad), (whole, length, pad), ([int(t) for t in trained], length, 0)
    return {name: np.array(ids + [fill] * (size - len(ids))) for name, (ids, size, fill) in zip(PROMPTS, columns, strict=True)}


def _reader(columns: Iterable[str], where: str) -> Callable[[Row, Tokenizer], dict[str, Any]]:
    there = set(columns)
    if PROMPTS.keys() <= there:
        return _prompt
    if there >= _DPO:
        return _dpo
    if there >= _PAIRS:
        return _pair
    if {"query_tensors", "response_tensors"} <= there:
        raise UserError(f"{where}: an experience file, which holds the rollouts of one model; PPO makes its own")
    raise UserError(
        f"{where}: columns {', '.join(sorted(there))}; expected MindRLHF's prompts ({', '.join(PROMPTS)}) or pairs "
        "(chosen_input_ids, chosen_attention_mask, rejected_input_ids, rejected_attention_mask)"
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
