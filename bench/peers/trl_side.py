"""TRL's trainers on given tokens, timed from inside. Runs in TRL's own environment; answers `compare.py` like the other sides.

`python trl_side.py STAGE MODEL RECORDS [--batch N] [--lora] [--precompute] [--bfloat16] [--no-checkpointing] [--padding-free]`
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig
from sides import SIZE, serve
from steps import Clock
from torch.utils.data import SequentialSampler
from transformers import PreTrainedTokenizerFast


def in_order(base: type) -> type:
    """The trainer on data that is tokens already, in the order given."""

    class Ordered(base):
        def _get_train_sampler(self, *given):
            return SequentialSampler(self.train_dataset)

        def _prepare_dataset(self, dataset, *given, **more):
            return dataset

    return Ordered


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Any tokenizer of the right size: the trainers ask for one, the data is tokens already."""
    from tokenizers import Tokenizer, models

    words = {"<pad>": 0, "<end>": 1} | {f"w{i}": i for i in range(2, vocabulary)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "<end>")), pad_token="<pad>", eos_token="<end>")


def dataset(stage: str, records: list[dict[str, list[int]]]) -> Dataset:
    if stage == "sft":
        rows = [
            {"input_ids": r["prompt"] + r["chosen"], "labels": [-100] * len(r["prompt"]) + r["chosen"]} for r in records
        ]
    elif stage == "reward":
        rows = [{"chosen_ids": r["prompt"] + r["chosen"], "rejected_ids": r["prompt"] + r["rejected"]} for r in records]
    else:
        rows = [{"prompt_ids": r["prompt"], "chosen_ids": r["chosen"], "rejected_ids": r["rejected"]} for r in records]
    return Dataset.from_list(rows)


def train(given: argparse.Namespace, records: list[dict[str, list[int]]]) -> dict[str, Any]:
    dtype = torch.bfloat16 if given.bfloat16 else torch.float32
    config, trainer, kind = {
        "sft": (trl.SFTConfig, trl.SFTTrainer, transformers.AutoModelForCausalLM),
        "reward": (trl.RewardConfig, trl.RewardTrainer, transformers.AutoModelForSequenceClassification),
        "dpo": (trl.DPOConfig, trl.DPOTrainer, transformers.AutoModelForCausalLM),
    }[given.stage]
    options = {"num_labels": 1} if given.stage == "reward" else {}
    model = kind.from_pretrained(given.model, dtype=dtype, **options)
    if given.stage == "reward":
        torch.nn.init.zeros_(model.score.weight)
    extra = {"precompute_ref_log_probs": given.precompute} if given.stage == "dpo" else {}
    if given.stage == "sft":
        extra["padding_free"] = given.padding_free
    arguments = config(
        output_dir=str(Path(given.records).with_suffix(".trl")),
        per_device_train_batch_size=given.batch,
        gradient_accumulation_steps=SIZE // given.batch,
        max_steps=len(records) // SIZE,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        max_length=None if given.padding_free else 2048,
        gradient_checkpointing=not given.no_checkpointing,
        dataloader_pin_memory=False,
        **extra,
    )
    clock = Clock()
    adapter = LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]) if given.lora else None
    run = in_order(trainer)(
        model=model,
        args=arguments,
        train_dataset=dataset(given.stage, records),
        processing_class=tokenizer(model.config.vocab_size),
        peft_config=adapter,
        callbacks=[clock],
    )
    run.train()
    versions = {m.__name__: m.__version__ for m in (torch, transformers, trl)}
    return {"seconds": clock.seconds, "losses": clock.losses, "versions": versions}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("stage", choices=["sft", "reward", "dpo"])
    parser.add_argument("model")
    parser.add_argument("records")
    parser.add_argument("--batch", type=int, default=SIZE)
    for flag in ("--lora", "--precompute", "--bfloat16", "--no-checkpointing", "--padding-free"):
        parser.add_argument(flag, action="store_true")
    given = parser.parse_args()
    records = json.loads(Path(given.records).read_text())
    serve(lambda: train(given, records))


if __name__ == "__main__":
    main()
