"""Tokens as text for LLaMA-Factory, which reads nothing else: a tokenizer whose words are the tokens' numbers."""

import json
from pathlib import Path

WORDS = {0: "<pad>", 1: "<end>"}  # special tokens are found inside words too, so no number stands for them


def text(tokens: list[int]) -> str:
    return " ".join(WORDS.get(i, f"w{i}") for i in tokens)


def write_tokenizer(folder: Path, size: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({text([i]): i for i in range(size)}, WORDS[0]))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token=WORDS[0], eos_token=WORDS[1]).save_pretrained(folder)


def write_dataset(folder: Path, records: list[dict[str, list[int]]]) -> None:
    rows = [{"instruction": text(r["prompt"]), "input": "", "output": text(r["chosen"])} for r in records]
    (folder / "bench.json").write_text(json.dumps(rows))
    (folder / "dataset_info.json").write_text(json.dumps({"bench": {"file_name": "bench.json"}}))
