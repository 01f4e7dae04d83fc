"""TRL 1.12's experimental PPO on given prompts (it is gone from 1.14 on). Runs in an environment of its own; answers `compare.py`.

`python ppo_trl.py FOLDER ITERATIONS`. The first reading leaves the tokens of its first iteration in `peer.safetensors`, with its
log-probabilities, values and scores.
"""

import time
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from safetensors.torch import save_file
from sides import PPO_ANSWER, PPO_ANSWERS, draw_prompts, serve_ppo
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

VOCABULARY = 32_000


class Notes:
    """What the trainer's own functions returned in its first iteration, and when each iteration began."""

    def __init__(self) -> None:
        self.began: list[float] = []
        self.generated: list[float] = []
        self.tokens: list[torch.Tensor] = []
        self.rows: dict[str, list[torch.Tensor]] = {"logprobs": [], "rewards": []}
        self.originals = {name: getattr(ppo_trainer, name) for name in ("batch_generation", "selective_log_softmax", "get_reward")}

    def __enter__(self) -> "Notes":
        def batch_generation(*given: Any, **more: Any) -> Any:
            self.began.append(time.perf_counter())
            found = self.originals["batch_generation"](*given, **more)
            self.generated.append(time.perf_counter())
            self.tokens.append(found[0])
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

    def write(self, path: Path) -> None:
        value, score = self.rows["rewards"]
        columns = {
            "tokens": self.tokens[0],
            "logprobs": self.rows["logprobs"][0],
            "ref_logprobs": self.rows["logprobs"][1],
            "values": value[0][:, -PPO_ANSWER - 1 : -1, 0],
            "scores": score[1],
        }
        save_file({name: x.contiguous() for name, x in columns.items()}, path)


def tokenizer() -> PreTrainedTokenizerFast:
    """Any tokenizer. Its pad token is outside the vocabulary: a sampled one would count as the end of an answer."""
    from tokenizers import Tokenizer, models

    words = {f"w{i}": i for i in range(VOCABULARY)} | {"<pad>": VOCABULARY}
    made = Tokenizer(models.WordLevel(words, "w0"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="w1", padding_side="left")


def train(folder: Path, iterations: int) -> dict[str, Any]:
    kinds = {"ppo": AutoModelForCausalLM, "critic": AutoModelForSequenceClassification, "reward": AutoModelForSequenceClassification}
    models = {name: kind.from_pretrained(folder / name, dtype=torch.float32) for name, kind in kinds.items()}
    models["ppo"].generation_config.eos_token_id = None
    arguments = PPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=PPO_ANSWERS,
        gradient_accumulation_steps=1,
        local_rollout_forward_batch_size=PPO_ANSWERS,
        num_mini_batches=1,
        num_ppo_epochs=1,
        total_episodes=PPO_ANSWERS * iterations,
        num_sample_generations=0,
        response_length=PPO_ANSWER,
        temperature=1.0,
        kl_coef=0.05,
        learning_rate=3e-6,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        dataloader_pin_memory=False,
    )
    prompts = draw_prompts(PPO_ANSWERS * iterations, VOCABULARY)
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
    with Notes() as notes:
        trainer.train()
    ended = [*notes.began[1:], time.perf_counter()]
    path = folder / "peer.safetensors"
    if not path.exists():
        notes.write(path)
    seconds = [end - begin for begin, end in zip(notes.began, ended, strict=True)]
    return {
        "seconds": seconds,
        "tokens": [x.numel() for x in notes.tokens],
        "split": {"generate": [end - begin for begin, end in zip(notes.began, notes.generated, strict=True)]},
        "losses": [],
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, trl)},
    }


if __name__ == "__main__":
    serve_ppo(train)
