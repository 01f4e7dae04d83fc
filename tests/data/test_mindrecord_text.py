"""MindRLHF's columns to text and back, as its scripts write them, through the command line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trueline as api
from tests.recipes.commands import Commands
from tests.recipes.toys import Toys
from trueline.config.schema import DataConfig
from trueline.data.mindrecord import read_mindrecord, write_mindrecord
from trueline.data.mindrecord_text import DPO, PROMPTS, REWARD, read_tokens
from trueline.data.record import Problems
from trueline.data.tokenizer import Tokenizer, load_tokenizer
from trueline.families.family import Family
from trueline.families.folder import open_folder
from trueline.recipes.prepare import preference_pairs, sft_samples

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
    write_mindrecord(tmp_path / "x.mindrecord", dict.fromkeys(row, "int32"), [row])
    (record,) = read_tokens(str(tmp_path / "x.mindrecord"), Problems(), tokenizer)
    found = record.value
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


PAIRS = [
    {
        "messages": [{"role": "system", "content": "say"}, {"role": "user", "content": "红 or blue?"}],
        "chosen": "红.", "rejected": "红 two\nno",
    },
    {"system": "say", "prompt": "one", "chosen": "二 one", "rejected": "二"},
]  # fmt: skip


@pytest.mark.parametrize("family", ["qwen2", "glm", "chatglm4"])
def test_pairs_there_and_back(toys: Toys, trueline: Commands, tmp_path: Path, family: str) -> None:
    """Both kinds of pairs: their columns by hand from the rendered tokens, and the records as they were."""
    model = toys.model(family)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in PAIRS), encoding="utf-8")
    opened = api.load(str(model))
    single = [{"role": "system", "content": "say"}, {"role": "user", "content": "one"}]
    wanted = [PAIRS[0], PAIRS[1] | {"messages": single}]
    for kind, columns in (("dpo", DPO), ("reward", REWARD)):
        out = tmp_path / f"{kind}.mindrecord"
        trueline("convert", tmp_path / "a.jsonl", out, "--model", model, "--kind", kind, "--length", 96).ok()
        rows = list(read_mindrecord(out))
        assert [set(row) for row in rows] == [set(columns)] * 2
        for row, record in zip(rows, wanted, strict=True):
            check_pair(row, record, opened, kind)
        trueline("convert", out, tmp_path / f"{kind}.jsonl", "--model", model).ok()
        found = lines(tmp_path / f"{kind}.jsonl")
        assert found == [{name: record[name] for name in ("messages", "chosen", "rejected")} for record in wanted]
    refuse = ("convert", tmp_path / "a.jsonl", tmp_path / "x.mindrecord", "--model", model)
    refused = trueline(*refuse, "--kind", "dpo", "--length", 9).refused()
    assert "a.jsonl:2: chosen of" in refused and "expected at most 9 (--prompt-length, --length)" in refused
    assert "--kind sft: expected one of ppo, dpo, reward" in trueline(*refuse, "--kind", "sft").refused()


def check_pair(row: dict[str, Any], record: dict[str, Any], opened: Any, kind: str) -> None:
    sides = [opened.render([*record["messages"], {"role": "assistant", "content": record[side]}]) for side in ("chosen", "rejected")]
    for side, sample in zip(("chosen", "rejected"), sides, strict=True):
        pad = row[f"{side}_input_ids"].tolist()[-1]
        assert row[f"{side}_input_ids"].tolist() == sample.tokens + [pad] * (96 - len(sample.tokens)), side
        assert row[f"{side}_attention_mask"].tolist() == [1] * len(sample.tokens) + [0] * (96 - len(sample.tokens))
        if kind == "dpo":
            assert row[f"{side}_labels"].tolist() == row[f"{side}_input_ids"].tolist()
            assert row[f"{side}_loss_mask"].tolist() == [int(t) for t in sample.trained] + [0] * (96 - len(sample.tokens))
            (logprobs,) = opened.logprobs([sample.tokens])
            expected = sum(float(p) for p, trained in zip(logprobs, sample.trained, strict=True) if trained)
            assert row[f"{side}_ref_logps"].tolist() == [pytest.approx(expected, rel=1e-5)]
    if kind == "reward":
        first, second = (sample.tokens + [-1] * 96 for sample in sides)
        start = min(i for i in range(96) if first[i] != second[i])
        end = max(len(sample.tokens) for sample in sides)
        assert row["loss_mask"].tolist() == [int(start <= i < end) for i in range(96)] and row["end_ind"] == end
        assert row["position_id"].tolist() == list(range(96)) and row["chosen_input_ids"].dtype == np.int32


def test_mindrecord_is_trained_on(toys: Toys, trueline: Commands, tmp_path: Path) -> None:
    """A file, its shards under one name, a folder and a pattern: the samples of the text it was made from. PPO's prompts likewise."""
    model, length = toys.model(), ("--length", 96, "--prompt-length", 64)
    for kind, source in (("ppo", "alpaca.json"), ("dpo", "cvalues.jsonl")):
        out = tmp_path / f"{kind}.mindrecord"
        trueline("convert", toys.data(source), out, "--model", model, "--kind", kind, *length).ok()
        rows = list(read_mindrecord(out))
        (tmp_path / kind).mkdir()
        write_mindrecord(tmp_path / kind / "s.mindrecord", {"ppo": PROMPTS, "dpo": DPO}[kind], rows, 3)
    tokenizer, family = load_tokenizer(model), open_folder(model).family
    wanted = {path: found(path, tokenizer, family) for path in (str(toys.data("alpaca.json")), str(toys.data("cvalues.jsonl")))}
    for path in ("ppo.mindrecord", "ppo/s.mindrecord", "ppo", "ppo/*.mindrecord?"):
        given = found(str(tmp_path / path), tokenizer, family)
        assert sorted(given[0]) == sorted(wanted[str(toys.data("alpaca.json"))][0]), path
    pairs = found(str(tmp_path / "dpo"), tokenizer, family)[1]
    assert sorted(pairs) == sorted(wanted[str(toys.data("cvalues.jsonl"))][1])
    shards = tmp_path / "ppo" / "s.mindrecord"
    trueline("sft", toys.config("sft"), f"data.train={shards}", f"run.output={tmp_path / 'run'}", "run.steps=1").ok()
    mix = (f"data.train={shards}", f"data.ptx={shards}", "ppo.ptx_coefficient=1", "run.steps=1", f"run.output={tmp_path / 'ppo-run'}")
    trueline("ppo", toys.config("ppo"), *mix).ok()
    assert all((tmp_path / run / "model" / "model.safetensors").is_file() for run in ("run", "ppo-run"))
    said = trueline("check", tmp_path / "dpo", "--model", model).ok().out
    assert "schema preference, 4 pairs" in said
    (tmp_path / "ppo" / "s.mindrecord1").unlink()
    assert "one of 3 shards, of which s.mindrecord1 is not beside it" in trueline("check", tmp_path / "ppo", "--model", model).refused()
    refused = trueline("check", tmp_path / "ppo.mindrecord").refused()
    assert "token ids" in refused and "`trueline convert" in refused
    assert "expected a data file of text" in trueline("check", tmp_path / "ppo.mindrecord", "--fix", tmp_path / "fixed").refused()
    asked = ("generate", model, "--prompts", tmp_path / "ppo.mindrecord", "--out", tmp_path / "answers.jsonl", "max_new_tokens=2")
    trueline(*asked).ok()
    assert len(lines(tmp_path / "answers.jsonl")) == 12


def found(path: str, tokenizer: Tokenizer, family: Family) -> tuple[list[Any], list[Any]]:
    """Tokens, and which are trained, of the files' conversations (those that have any), and of both sides of their pairs."""
    data = DataConfig(train=(path,), max_length=128, cache="off")
    pairs = "dpo" in path or "cvalues" in path
    samples = [] if pairs else sft_samples(data, family, tokenizer, 0).train
    both = preference_pairs(data, family, tokenizer, 0).train if pairs else []
    return [(s.tokens, s.trained) for s in samples], [(p.chosen.tokens, p.chosen.trained, p.rejected.tokens) for p in both]


def test_other_columns_are_refused(toys: Toys, trueline: Commands, tmp_path: Path) -> None:
    model = ("--model", toys.model())
    one = {"loss_mask": np.zeros(3, np.int64), "prompt_ids": np.ones(3, np.int64), "pretrain_ids": np.ones(3, np.int64)}
    cases = {
        "experience": ({"query_tensors": [1], "response_tensors": [1]}, "experience file"),
        "other": ({"image": [1]}, "columns image; expected"),
        "numbers": ({"prompt_ids": 1, "pretrain_ids": 2, "loss_mask": 3, "x": [1]}, "numbers.mindrecord:1: prompt_ids is no list of"),
        "masked": (one, "masked.mindrecord:1: loss_mask has no 1"),
    }
    for name, (row, why) in cases.items():
        path = tmp_path / f"{name}.mindrecord"
        write_mindrecord(path, {name: "number" if isinstance(values, int) else "int64" for name, values in row.items()}, [row])
        assert why in trueline("convert", path, tmp_path / f"{name}.jsonl", *model).refused()
        assert not (tmp_path / f"{name}.jsonl").exists()
    assert "--model" in trueline("convert", path, tmp_path / "x.jsonl").refused()
    assert "OUT.mindrecord" in trueline("convert", toys.data("messages.jsonl"), tmp_path / "x").refused()


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_nothing_is_written_of_pairs_that_are_all_equal(toys: Toys, trueline: Commands, tmp_path: Path, kind: str) -> None:
    (tmp_path / "equal.jsonl").write_text('{"prompt": "one", "chosen": "two", "rejected": "two"}\n')
    done = trueline("convert", tmp_path / "equal.jsonl", tmp_path / "out.mindrecord", "--model", toys.model(), "--kind", kind)
    assert "in every record both answers are equal" in done.refused() and not list(tmp_path.glob("out*"))
