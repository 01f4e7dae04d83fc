"""The models and records that every side of the comparison runs on. Needs torch, transformers and numpy."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from sides import PPO, SIZES, STOP, STOP_RATE


def write_model(folder: Path, **changes: Any) -> Path:
    """A random Qwen2 in float32, as transformers saves it."""
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES | changes)).save_pretrained(folder)
    return folder


def write_ppo(place: Path) -> None:
    """PPO's models: `ppo`, whose answers end (`make_it_stop`), `critic` on the same trunk, and `reward` on one of its own."""
    settings = transformers.Qwen2Config(**SIZES | PPO)
    torch.manual_seed(0)
    policy = transformers.Qwen2ForCausalLM(settings)
    make_it_stop(policy, STOP, STOP_RATE)
    policy.save_pretrained(place / "ppo")
    for name, trunk in {"critic": policy.model, "reward": None}.items():
        scorer = transformers.Qwen2ForSequenceClassification(transformers.Qwen2Config(**SIZES | PPO, num_labels=1))
        if trunk is not None:
            scorer.model.load_state_dict(trunk.state_dict())
        scorer.save_pretrained(place / name)


@torch.no_grad()
def make_it_stop(model: Any, stop: int, rate: float) -> None:
    """Makes `stop` about so probable after any other token, so that the lengths of answers are nearly geometric.

    All embeddings get a direction in common, the hidden states of random weights keep part of it, and the head's row of `stop` points
    along it. How far it has to is measured on random tokens.
    """
    size = model.config.vocab_size
    common = torch.nn.functional.normalize(torch.randn(model.config.hidden_size), dim=0)
    model.model.embed_tokens.weight += 60 * model.config.initializer_range * common
    hidden = model.model(torch.randint(2, size, (8, 96))).last_hidden_state
    others = torch.cat([model.lm_head.weight[:stop], model.lm_head.weight[stop + 1 :]])
    wanted = (hidden @ others.T).logsumexp(-1) + torch.tensor(rate / (1 - rate)).log()
    model.lm_head.weight[stop] = wanted.mean() / (hidden @ common).mean() * common


def draw_records(count: int, vocabulary: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Prompts of about 30 tokens, answers log-normal around 95 and at most 530: the lengths of a published Chinese alpaca sample.

    `rejected` is a second answer, of its own length.
    """
    draw = np.random.default_rng(seed)

    def tokens(length: float) -> list[int]:
        return draw.integers(2, vocabulary, max(2, int(length))).tolist()

    def answer() -> list[int]:
        return tokens(np.clip(np.exp(draw.normal(np.log(95), 1.0)), 4, 530)) + [1]

    return [{"prompt": tokens(np.exp(draw.normal(np.log(30), 0.25))), "chosen": answer(), "rejected": answer()} for _ in range(count)]


def write_records(path: Path, count: int, vocabulary: int) -> Path:
    path.write_text(json.dumps(draw_records(count, vocabulary)), encoding="utf-8")
    return path
