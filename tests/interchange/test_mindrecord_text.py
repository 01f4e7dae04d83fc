"""MindRLHF's columns to text and back, as its scripts write them, through the command line."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.recipes.commands import Commands
from tests.recipes.toys import Toys
from trueline.data.tokenizer import load_tokenizer
from trueline.interchange.mindrecord import read_mindrecord, write_mindrecord
from trueline.interchange.mindrecord_text import PROMPTS, texts

PAD = 0  # <|endoftext|> of the toy tokenizers


def padded(ids: list[int], length: int, fill: int = PAD) -> np.ndarray:
    return np.array(ids + [fill] * (length - len(ids)))


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("fill", [0, 7])
def test_prompts_as_mindrlhf_writes_them(toys: Toys, trueline: Commands, tmp_path: Path, fill: int) -> None:
    """Plain concatenation without a template; the mask is padded with the pad id, whatever that is."""
    encode = load_tokenizer(toys.model()).encode
    pairs = [("红 blue?", "蓝 is not red."), ("one", "二")]
    rows = []
    for prompt, answer in pairs:
        ids = [encode(prompt), encode(answer)]
        mask = [0] * len(ids[0]) + [1] * len(ids[1])
        columns = {"prompt_ids": ids[0], "pretrain_ids": ids[0] + ids[1], "loss_mask": mask}
        rows.append({name: padded(values, 64, fill) for name, values in columns.items()})
    write_mindrecord(tmp_path / "p.mindrecord", PROMPTS, rows)
    trueline("convert", tmp_path / "p.mindrecord", tmp_path / "p.jsonl", "--model", toys.model()).ok()
    assert lines(tmp_path / "p.jsonl") == [{"prompt": prompt, "response": answer} for prompt, answer in pairs]
    trueline("check", tmp_path / "p.jsonl").ok()


def test_dpo_pairs_in_chatml(toys: Toys, trueline: Commands, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(toys.model())
    start, end = tokenizer.specials["<|im_start|>"], tokenizer.specials["<|im_end|>"]
    encode = tokenizer.encode
    prompt = [start, *encode("system\nsay red"), end, *encode("\n"), start, *encode("user\n红?\nblue"), end, *encode("\n"), start]
    prompt += encode("assistant\n")
    row: dict[str, np.ndarray] = {}
    for side, answer in (("chosen", "yes 红"), ("rejected", "no\nno")):
        ids = [*encode(answer), end]
        row |= {
            f"{side}_input_ids": padded(prompt + ids, 128), f"{side}_labels": padded(prompt + ids, 128),
            f"{side}_attention_mask": padded([1] * len(prompt + ids), 128),
            f"{side}_loss_mask": padded([0] * len(prompt) + [1] * len(ids), 128),
            f"{side}_ref_logps": np.array([-3.5], np.float32),
        }  # fmt: skip
    kinds = {name: "float32" if "logps" in name else "int32" for name in row}
    write_mindrecord(tmp_path / "d.mindrecord", kinds, [row], 1)
    trueline("convert", tmp_path / "d.mindrecord", tmp_path / "d.jsonl", "--model", toys.model()).ok()
    messages = [{"role": "system", "content": "say red"}, {"role": "user", "content": "红?\nblue"}]
    assert lines(tmp_path / "d.jsonl") == [{"messages": messages, "chosen": "yes 红", "rejected": "no\nno"}]
    trueline("check", tmp_path / "d.jsonl").ok()


def test_reward_pairs_share_their_prompt(toys: Toys, tmp_path: Path) -> None:
    """There the mask says only where the sides differ; 红 and 绿 share their first byte's token, or a character would be halved."""
    tokenizer = load_tokenizer(toys.model())
    row: dict[str, np.ndarray] = {}
    for side, text in (("chosen", "say: 红 yes"), ("rejected", "say: 绿")):
        ids = tokenizer.encode(text)
        row |= {f"{side}_input_ids": padded(ids, 32), f"{side}_attention_mask": padded([1] * len(ids), 32)}
    (found,) = texts([row], tokenizer, "x")
    assert [found["prompt"] + found["chosen"], found["prompt"] + found["rejected"]] == ["say: 红 yes", "say: 绿"]
    assert "\ufffd" not in json.dumps(found, ensure_ascii=False) and found["prompt"]


@pytest.mark.parametrize("family", ["qwen2", "glm"])
def test_conversations_there_and_back(toys: Toys, trueline: Commands, tmp_path: Path, family: str) -> None:
    records = [
        {
            "messages": [
                {"role": "system", "content": "say"}, {"role": "user", "content": "红 blue?"}, {"role": "assistant", "content": "蓝."},
            ]
        },
        {
            "messages": [
                {"role": "system", "content": "say"}, {"role": "user", "content": "one"}, {"role": "assistant", "content": "二"},
                {"role": "user", "content": "two?"}, {"role": "assistant", "content": "一\n\nno"},
            ]
        },
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    given = ("--model", toys.model(family), "--prompt-length", 96, "--length", 128)
    trueline("convert", tmp_path / "a.jsonl", tmp_path / "a.mindrecord", *given).ok()
    (first, _) = read_mindrecord(tmp_path / "a.mindrecord")
    assert {name: (str(column.dtype), len(column)) for name, column in first.items()} == {
        "prompt_ids": ("int64", 96), "pretrain_ids": ("int64", 128), "loss_mask": ("int64", 128),
    }  # fmt: skip
    assert set(first["loss_mask"].tolist()) == {0, 1}
    trueline("convert", tmp_path / "a.mindrecord", tmp_path / "b.jsonl", "--model", toys.model(family)).ok()
    assert lines(tmp_path / "b.jsonl") == records
    refused = trueline("convert", tmp_path / "a.jsonl", tmp_path / "c.mindrecord", "--model", toys.model(family), "--length", 10).refused()
    assert "2 problems" in refused and "a.jsonl:1" in refused and "expected at most 2048 and 10" in refused
    assert not (tmp_path / "c.mindrecord").exists()


def test_other_columns_are_refused(toys: Toys, trueline: Commands, tmp_path: Path) -> None:
    model = ("--model", toys.model())
    one = {"loss_mask": np.zeros(3, np.int64), "prompt_ids": np.ones(3, np.int64), "pretrain_ids": np.ones(3, np.int64)}
    cases = {
        "experience": ({"query_tensors": [1], "response_tensors": [1]}, "experience file"),
        "other": ({"image": [1]}, "columns image; expected"),
        "masked": (one, "record 1: loss_mask has no 1"),
    }
    for name, (row, why) in cases.items():
        path = tmp_path / f"{name}.mindrecord"
        write_mindrecord(path, dict.fromkeys(row, "int64"), [row])
        assert why in trueline("convert", path, tmp_path / f"{name}.jsonl", *model).refused()
        assert not (tmp_path / f"{name}.jsonl").exists()
    assert "--model" in trueline("convert", path, tmp_path / "x.jsonl").refused()
    assert "OUT.mindrecord" in trueline("convert", toys.data("messages.jsonl"), tmp_path / "x").refused()
