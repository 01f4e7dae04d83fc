"""TRL 1.12's experimental PPO on given prompts (it is gone from 1.14 on). Runs in an environment of its own; answers `compare.py`.

`python ppo_trl.py FOLDER ITERATIONS [--epochs N] [--varied] [--batch N] --columns FILE`. The first reading leaves the tokens of its first
iteration in the file, with its log-probabilities, values and scores. Set besides: what has to be equal, and that no samples are made to
look at. Recomputing and bfloat16, which it asks for by default, have no effect on its PPO.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from columns import write_columns
from datasets import Dataset
from sides import PPO, PPO_ANSWER, PPO_ANSWERS, STOP, draw_prompts, serve_ppo
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

VOCABULARY = PPO["vocab_size"]


class Notes:
    """What the trainer's own functions returned in its first iteration, and when each iteration began."""

    def __init__(self, varied: bool) -> None:
        self.varied = varied
        self.began: list[float] = []
        self.generated: list[float] = []
        self.texts: list[tuple[list[list[int]], list[list[int]]]] = []  # prompts and answers of each iteration, without padding
        self.rows: dict[str, list[torch.Tensor]] = {"logprobs": [], "rewards": []}
        self.originals = {name: getattr(ppo_trainer, name) for name in ("batch_generation", "selective_log_softmax", "get_reward")}

    def __enter__(self) -> "Notes":
        def batch_generation(*given: Any, **more: Any) -> Any:
            self.began.append(time.perf_counter())
            found = self.originals["batch_generation"](*given, **more)
            self.generated.append(time.perf_counter())
            self.texts.append(self.real(given[1], found[0]))
            return found

        def noted(name: str, column: str, keep: Any) -> Any:
            def call(*given: Any, **more: Any) -> Any:
                found = self.originals[name](*given, **more)
                if len(self.rows[column]) < 2:  # the policy's and the reference's; the value's and the reward's
                    self.rows[column].append(keep(found))
                return found

            return call

        ppo_trainer.batch_generation = batch_generation
        ppo_trainer.selective_log_softmax = noted("selective_log_softmax", "logprobs", lambda found: found.detach().clone())
        ppo_trainer.get_reward = noted("get_reward", "rewards", lambda found: (found[0].detach().clone(), found[1].detach().clone()))
        return self

    def __exit__(self, *given: Any) -> None:
        for name, original in self.originals.items():
            setattr(ppo_trainer, name, original)

    def real(self, queries: torch.Tensor, rows: torch.Tensor) -> tuple[list[list[int]], list[list[int]]]:
        answers = [row.tolist() for row in rows[:, queries.shape[1] :]]
        if self.varied:
            answers = [answer[: answer.index(STOP) + 1] if STOP in answer else answer for answer in answers]
        return [query[query != VOCABULARY].tolist() for query in queries], answers

    def write(self, path: Path) -> None:
        prompts, answers = self.texts[0]
        value, score = self.rows["rewards"]
        logprobs, reference = self.rows["logprobs"]
        columns = {"logprobs": logprobs, "ref_logprobs": reference, "values": value[0][:, -logprobs.shape[1] - 1 : -1, 0]}
        real = {name: torch.cat([row[: len(a)] for row, a in zip(rows, answers, strict=True)]) for name, rows in columns.items()}
        write_columns(path, prompts, answers, real | {"scores": score[1]})


def tokenizer() -> PreTrainedTokenizerFast:
    """Any tokenizer. Its pad token is outside the vocabulary: a sampled one would count as the end of an answer."""
    from tokenizers import Tokenizer, models

    words = {f"w{i}": i for i in range(VOCABULARY)} | {"<pad>": VOCABULARY}
    made = Tokenizer(models.WordLevel(words, "w0"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="w1", padding_side="left")


def train(given: argparse.Namespace) -> dict[str, Any]:
    folder: Path = given.folder
    kinds = {"ppo": AutoModelForCausalLM, "critic": AutoModelForSequenceClassification, "reward": AutoModelForSequenceClassification}
    models = {name: kind.from_pretrained(folder / name, dtype=torch.float32) for name, kind in kinds.items()}
    count = PPO_ANSWERS * given.iterations
    arguments = PPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=given.batch,
        gradient_accumulation_steps=PPO_ANSWERS // given.batch,
        num_ppo_epochs=given.epochs,
        total_episodes=count,
        num_sample_generations=0,
        response_length=PPO_ANSWER,
        stop_token_id=STOP if given.varied else None,
        temperature=1.0,
        kl_coef=0.05,
        learning_rate=3e-6,
        lr_scheduler_type="constant",
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        dataloader_pin_memory=False,
    )
    prompts = draw_prompts(count, given.varied)
    trainer = PPOTrainer(
        args=arguments,
        processing_class=tokenizer(),
        model=models["ppo"],
        ref_model=None,
        reward_model=models["reward"],
        value_model=models["critic"],
        train_dataset=Dataset.from_list([{"input_ids": p} for p in prompts]),
        eval_dataset=Dataset.from_list([{"input_ids": p} for p in prompts[:PPO_ANSWERS]]),
    )
    with Notes(given.varied) as notes:
        trainer.train()
    ended = [*notes.began[1:], time.perf_counter()]
    path = given.columns[0]
    if not path.exists():
        notes.write(path)
    seconds = [end - begin for begin, end in zip(notes.began, ended, strict=True)]
    return {
        "seconds": seconds,
        "tokens": [sum(len(row) for rows in pair for row in rows) for pair in notes.texts],
        "columns": str(path),
        "split": {"generate": [end - begin for begin, end in zip(notes.began, notes.generated, strict=True)]},
        "losses": [],
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, trl)},
    }


if __name__ == "__main__":
    serve_ppo(train)
