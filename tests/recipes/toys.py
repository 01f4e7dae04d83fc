"""A tiny random model of each family, data files in several schemas, and a configuration for every stage. One rule: a second's work."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, pre_tokenizers, trainers

from trueline.data.tokenizer import load_tokenizer
from trueline.families.export import save_folder
from trueline.families.folder import open_folder, random_decoder

FAMILIES = ("qwen2", "glm", "llama", "chatglm", "qwen3", "glm4", "mistral", "chatglm2", "chatglm3", "chatglm4")
WHOLE = ("qwen2", "glm", "chatglm")  # run at every stage with every kind of adapter in the default suite, the others under `slow`
ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
CONTROLS = {
    "qwen2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "glm": ["<|endoftext|>", "[gMASK]", "<sop>", *ROLES],
    "qwen3": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "glm4": ["<|endoftext|>", "[gMASK]", "<sop>", *ROLES],
    "mistral": ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"],
    "chatglm2": ["<unk>", "</s>", "[gMASK]", "sop"],
    "chatglm3": ["<unk>", "</s>", "[gMASK]", "sop", *ROLES],
    "chatglm4": ["<|endoftext|>", "[gMASK]", "<sop>", *ROLES],
    "chatglm": ["<pad>", "[MASK]", "[gMASK]", "<sop>", "<eop>"],
    "llama": [
        "<|finetune_right_pad_id|>",
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ],
}
SIZES = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3, "max_position_embeddings": 512,
}  # fmt: skip
CHATGLM_SIZES = {
    "vocab_size": 320, "hidden_size": 32, "inner_hidden_size": 48, "num_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3,
    "mask_token_id": 1, "gmask_token_id": 2, "bos_token_id": 3, "position_encoding_2d": True,
}  # fmt: skip
FUSED_SIZES = {
    "padded_vocab_size": 320, "hidden_size": 32, "ffn_hidden_size": 48, "num_layers": 2, "num_attention_heads": 4, "kv_channels": 8,
    "multi_query_attention": True, "multi_query_group_num": 2, "add_qkv_bias": True, "initializer_range": 0.3,
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen3": {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    "mistral": {"sliding_window": 24},
}
WORDS = ("red", "blue", "green", "红", "蓝", "绿", "one", "two", "一", "二")
KINDS = {
    "full": ["model.adapter.kind=full"],
    "lora": ["model.adapter.kind=lora", "model.adapter.rank=4", "model.adapter.alpha=8", "model.adapter.targets=[q, v, gate, down]"],
    "ptuning": ["model.adapter.kind=ptuning", "model.adapter.tokens=4"],
}
STAGES = ("sft", "reward", "dpo", "ppo")


@dataclass(frozen=True)
class Toys:
    home: Path

    def model(self, family: str = "qwen2") -> Path:
        return self.home / family

    def data(self, name: str) -> Path:
        return self.home / name

    def config(self, stage: str) -> str:
        """A file that lacks only model.path (qwen2 is named) and run.output."""
        return str(self.home / f"{stage}.yaml")

    def dictionary(self, stage: str, **sections: Any) -> dict[str, Any]:
        """The same, with `sections` merged in, as Python's interface takes it."""
        found: dict[str, Any] = yaml.safe_load(Path(self.config(stage)).read_text())
        return {name: found.get(name, {}) | sections.get(name, {}) for name in {**found, **sections}}


def make_toys(home: Path) -> Toys:
    toys = Toys(home)
    write_data(toys)
    for family in FAMILIES:
        write_model(toys, family)
    for stage in STAGES:
        Path(toys.config(stage)).write_text(yaml.safe_dump(stage_config(toys, stage)))
    return toys


def stage_config(toys: Toys, stage: str) -> dict[str, Any]:
    """Three steps of four records, saved each step."""
    train = {"sft": ["messages.jsonl", "alpaca.json"], "ppo": ["prompts.jsonl"]}.get(stage, ["cvalues.jsonl", "preference.json"])
    config: dict[str, Any] = {
        "model": {"path": str(toys.model()), "dtype": "float32"},
        "data": {"train": [str(toys.data(name)) for name in train], "max_length": 128},
        "batch": {"sequences": 4, "max_tokens": 300},
        "optimizer": {"lr": 0.01, "warmup": 0},
        "run": {"steps": 2, "save_every": 1},
    }
    if stage == "ppo":
        config |= {
            "reward": {"function": f"{toys.data('judges.py')}:shorter"},
            "rollout": {"prompts": 4, "samples": 2},
            "sampling": {"max_new_tokens": 8},
            "ppo": {"epochs": 2, "minibatches": 2},
        }
    return config


def write_data(toys: Toys) -> None:
    questions = [(f"say {a} {b}", f"{b} {a}") for a in WORDS[:6] for b in WORDS[4:]]
    lines(toys.data("messages.jsonl"), (turns(q, a) for q, a in questions[:12]))
    alpaca = [{"instruction": "say", "input": q[4:], "output": a, "system": "be brief"} for q, a in questions[12:24]]
    toys.data("alpaca.json").write_text(json.dumps(alpaca, ensure_ascii=False, indent=1), encoding="utf-8")
    lines(toys.data("cvalues.jsonl"), ({"prompt": q, "pos_resp": a, "neg_resp": f"no {a}"} for q, a in questions[:10]))
    pairs = [{"prompt": q, "chosen": a, "rejected": a[::-1] + " no"} for q, a in questions[10:20]]
    toys.data("preference.json").write_text(json.dumps(pairs, ensure_ascii=False), encoding="utf-8")
    lines(toys.data("prompts.jsonl"), ({"prompt": q, "answer_length": len(a)} for q, a in questions[:20]))
    toys.data("judges.py").write_text(JUDGES, encoding="utf-8")


def turns(question: str, answer: str) -> dict[str, Any]:
    """Every fourth conversation has two rounds."""
    first = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": first * 2 if len(question) % 4 == 0 else first}


def lines(path: Path, records: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def write_model(toys: Toys, family: str) -> None:
    folder = toys.model(family)
    draft = toys.home / f"{family}-draft"
    draft.mkdir()
    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZES["vocab_size"],
        special_tokens=CONTROLS[family],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = ["system user assistant You are a helpful assistant. say red blue green 红 蓝 绿 one two 一 二 no"] * 9
    engine.train_from_iterator(corpus, trainer)
    engine.save(str(draft / "tokenizer.json"))
    sizes = SIZES | MORE.get(family, {})
    kind = family
    if family.startswith("chatglm"):
        sizes, kind = CHATGLM_SIZES if family == "chatglm" else FUSED_SIZES | {"_name_or_path": family}, "chatglm"
    (draft / "config.json").write_text(json.dumps({"model_type": kind, "pad_token_id": 0, "eos_token_id": None, **sizes}))
    opened = open_folder(draft)
    save_folder(folder, random_decoder(opened, torch.float32, seed=5), opened, load_tokenizer(draft))


JUDGES = '''
"""Rewards for the tests."""

import time


def shorter(answers):
    return [-float(len(answer)) for answer in answers]


def asked(answers, prompts, records):
    return [float(record["answer_length"]) + len(prompt) for prompt, record in zip(prompts, records)]


def constant(answers):
    return [1.0] * len(answers)


def counted(answers, records):
    print("call", len(answers), flush=True)
    return [-float(len(answer)) for answer in answers]


def raises(answers):
    return [1 / 0 for answer in answers]


def too_few(answers):
    return [1.0]


def not_finite(answers):
    return [float("nan")] * len(answers)


def slow(answers):
    time.sleep(30)
'''
