"""LLaMA-Factory 0.9.3's PPO, on trl 0.9.6, on given prompts, timed from inside (0.9.5 refuses that trl). Runs in an environment of its own.

`python ppo_lf.py FOLDER ITERATIONS [--epochs N] --varied --columns FILE`. Its critic is a value head on the policy's trunk: it runs and
trains one model less than the other sides. Scoring and training run under autocast, on a CPU in bfloat16. To compare numbers, the passes of
the first iteration are repeated without that and without dropout; that iteration's time does not count.
"""

import argparse
import json
import shutil
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from columns import write_columns
from llamafactory.extras.env import VERSION
from llamafactory.train.ppo import workflow
from llamafactory.train.tuner import run_exp
from safetensors.torch import load_file, save_file
from sides import PPO_ANSWER, PPO_ANSWERS, draw_prompts, serve_ppo
from words import write_dataset, write_tokenizer

Trainer = workflow.CustomPPOTrainer


class Notes:
    """What the trainer's own functions returned in its first iteration, when each iteration began, and its tokens."""

    def __init__(self) -> None:
        self.began: list[float] = []
        self.generated: list[float] = []
        self.texts: list[tuple[list[list[int]], list[list[int]]]] = []
        self.columns: dict[str, torch.Tensor] = {}


def noting(notes: Notes) -> type:
    class Noting(Trainer):
        """The trainer, telling."""

        @contextmanager
        def exactly(self, model):
            """In float32 and without dropout."""
            training, usual = model.training, self.amp_context
            self.amp_context = nullcontext()
            try:
                yield model.eval()
            finally:
                self.amp_context = usual
                model.train(training)

        def get_inputs(self, batch):
            notes.began.append(time.perf_counter())
            queries, responses = super().get_inputs(batch)
            notes.generated.append(time.perf_counter())
            notes.texts.append(([q.tolist() for q in queries], [r.tolist() for r in responses]))
            return queries, responses

        def get_rewards(self, queries, responses):
            if "scores" not in notes.columns:
                with self.exactly(self.reward_model):
                    notes.columns["scores"] = torch.cat(list(super().get_rewards(queries, responses)))
            return super().get_rewards(queries, responses)

        def batched_forward_pass(self, model, queries, responses, model_inputs, return_logits=False, response_masks=None):
            given = queries, responses, model_inputs, return_logits, response_masks
            name = "logprobs" if model is self.model else "ref_logprobs"
            if name not in notes.columns:
                with self.exactly(model):
                    logprobs, _, values, masks = super().batched_forward_pass(model, *given)
                notes.columns[name] = logprobs[masks.bool()]
                notes.columns.setdefault("values", values[masks.bool()])
            return super().batched_forward_pass(model, *given)

        def ppo_train(self, resume_from_checkpoint=None):
            super().ppo_train(resume_from_checkpoint)
            notes.began.append(time.perf_counter())

    return Noting


def write_models(folder: Path, place: Path) -> None:
    """Policy and reward model as it wants them: language models with a value head beside, and a tokenizer."""
    head = load_file(folder / "ppo" / "model.safetensors")["lm_head.weight"]
    for name, scorer in {"policy": "critic", "reward": "reward"}.items():
        weights = load_file(folder / scorer / "model.safetensors")
        values = {"v_head.summary.weight": weights.pop("score.weight"), "v_head.summary.bias": torch.zeros(1)}
        (place / name).mkdir(parents=True, exist_ok=True)
        save_file(weights | {"lm_head.weight": head}, place / name / "model.safetensors", {"format": "pt"})
        save_file(values, place / name / "value_head.safetensors", {"format": "pt"})
        settings = json.loads((folder / "ppo" / "config.json").read_text())  # in the words of transformers 5, which 4 does not know
        settings |= {"torch_dtype": settings.pop("dtype"), "rope_theta": settings.pop("rope_parameters")["rope_theta"]}
        (place / name / "config.json").write_text(json.dumps(settings))
        ends = {"eos_token_id": settings["eos_token_id"], "pad_token_id": settings["pad_token_id"]}
        (place / name / "generation_config.json").write_text(json.dumps(ends))  # without one it would generate without a cache
        write_tokenizer(place / name, settings["vocab_size"])


def train(given: argparse.Namespace) -> dict[str, Any]:
    place = given.folder / "lf"
    if not place.exists():
        write_models(given.folder, place)
    prompts = draw_prompts(PPO_ANSWERS * given.iterations, given.varied)
    write_dataset(place, [{"prompt": p, "chosen": [2]} for p in prompts])
    settings: dict[str, Any] = {
        "model_name_or_path": str(place / "policy"),
        "stage": "ppo",
        "do_train": True,
        "finetuning_type": "full",
        "reward_model": str(place / "reward"),
        "reward_model_type": "full",
        "ppo_epochs": given.epochs,
        "dataset": "bench",
        "dataset_dir": str(place),
        "template": "empty",
        "overwrite_cache": True,
        "output_dir": str(place / "out"),
        "per_device_train_batch_size": PPO_ANSWERS,
        "gradient_accumulation_steps": 1,
        "max_new_tokens": PPO_ANSWER,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "learning_rate": 3e-6,
        "lr_scheduler_type": "constant",
        "max_steps": given.iterations,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    shutil.rmtree(place / "out", ignore_errors=True)
    notes = Notes()
    workflow.CustomPPOTrainer = noting(notes)
    try:
        run_exp(settings)
    finally:
        workflow.CustomPPOTrainer = Trainer
    path = given.columns[0]
    if not path.exists():
        write_columns(path, *notes.texts[0], notes.columns)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__, "llamafactory": VERSION}
    return {
        "seconds": [end - begin for begin, end in zip(notes.began, notes.began[1:], strict=False)],
        "tokens": [sum(len(row) for rows in pair for row in rows) for pair in notes.texts],
        "columns": str(path),
        "split": {"generate": [end - begin for begin, end in zip(notes.began, notes.generated, strict=False)]},
        "losses": [],
        "versions": versions,
    }


if __name__ == "__main__":
    serve_ppo(train)
