"""LLaMA-Factory's fine-tuning on given tokens, timed from inside. Runs in its own environment; answers `compare.py` like the other sides.

`python lf_side.py sft MODEL RECORDS [--lora]`. It packs without attention across records (`neat_packing`) into rows of 2,048 tokens,
without recomputing. Before the first timed run, two steps of packs that hold one step's records each give the losses to compare.
"""

import argparse
import importlib.machinery
import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

# text needs neither of these, and builds that do not fit torch's fail when imported; LLaMA-Factory itself imports the second one
sys.modules["torchvision"] = None  # type: ignore[assignment]
sys.modules["torchaudio"] = types.ModuleType("torchaudio")
sys.modules["torchaudio"].__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)

import torch  # noqa: E402
import transformers  # noqa: E402
from llamafactory.extras.env import VERSION  # noqa: E402
from llamafactory.train.sft import workflow  # noqa: E402
from llamafactory.train.tuner import run_exp  # noqa: E402
from sides import SIZE, serve  # noqa: E402
from steps import Clock  # noqa: E402
from words import write_dataset, write_tokenizer  # noqa: E402

ROW = 2048  # rows have to be multiples of 8: it pads the tokens to that, but not their positions


def counting(base: type, tokens: list[int]) -> type:
    """The collator, noting how many real tokens each micro-batch holds."""

    class Counting(base):
        def __call__(self, features):
            tokens.append(sum(sum(m > 0 for m in f["attention_mask"]) for f in features))
            return super().__call__(features)

    return Counting


def write_folder(model: Path, records: list[dict[str, list[int]]], folder: Path) -> Path:
    """The model with a tokenizer whose words are the tokens' numbers, and the records as text."""
    shutil.copytree(model, folder / "model", dirs_exist_ok=True)
    write_tokenizer(folder / "model", json.loads((model / "config.json").read_text())["vocab_size"])
    write_dataset(folder, records)
    return folder


def train(folder: Path, lora: bool, steps: int, pack_of: int, row: int) -> dict[str, Any]:
    """`steps` steps of one packed row each, packed out of so many records at a time."""
    settings: dict[str, Any] = {
        "model_name_or_path": str(folder / "model"),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora" if lora else "full",
        "dataset": "bench",
        "dataset_dir": str(folder),
        "template": "empty",
        "cutoff_len": row,
        "neat_packing": True,
        "preprocessing_batch_size": pack_of,
        "overwrite_cache": True,
        "disable_shuffling": True,
        "disable_gradient_checkpointing": True,
        "flash_attn": "sdpa",
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "max_steps": steps,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "dataloader_pin_memory": False,
    }
    if lora:
        settings |= {"lora_rank": 8, "lora_alpha": 32, "lora_dropout": 0.0, "lora_target": "q_proj,k_proj,v_proj,o_proj"}
    shutil.rmtree(folder / "out", ignore_errors=True)
    clock, tokens = Clock(), []
    original = workflow.SFTDataCollatorWith4DAttentionMask
    workflow.SFTDataCollatorWith4DAttentionMask = counting(original, tokens)
    try:
        run_exp(settings, callbacks=[clock])
    finally:
        workflow.SFTDataCollatorWith4DAttentionMask = original
    return {"seconds": clock.seconds, "losses": clock.losses, "tokens": tokens[: len(clock.seconds)]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("stage", choices=["sft"])
    parser.add_argument("model", type=Path)
    parser.add_argument("records", type=Path)
    parser.add_argument("--lora", action="store_true")
    given = parser.parse_args()
    records = json.loads(given.records.read_text())
    folder = given.records.with_suffix(".lf" + ("-lora" if given.lora else ""))
    folder.mkdir(exist_ok=True)
    write_folder(given.model, records, folder)
    sizes = [len(r["prompt"]) + len(r["chosen"]) for r in records]
    widest = (max(sum(sizes[i : i + SIZE]) for i in range(0, len(sizes), SIZE)) // 8 + 2) * 8
    losses: list[float] = []

    def run() -> dict[str, Any]:
        if not losses:
            losses.extend(train(folder, given.lora, 2, SIZE, widest)["losses"][:2])
        rows = max(2, sum(sizes) // ROW)
        found = train(folder, given.lora, rows, len(records), ROW)
        versions = {"torch": torch.__version__, "transformers": transformers.__version__, "llamafactory": VERSION}
        return found | {"losses": losses, "versions": versions}

    serve(run)


if __name__ == "__main__":
    main()
