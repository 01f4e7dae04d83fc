"""trueline's PPO on given prompts, through the recipe's own iteration: policy, reference, critic and reward model, all weights trained.

`python ppo_ours.py FOLDER ITERATIONS` in the folder that `compare.py` filled. A reading checks the other side's first iteration, if that
has left `peer.safetensors` there: the largest difference between its log-probabilities, values and scores and ours on the same tokens.
"""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from sides import PPO_ANSWER, PPO_ANSWERS, PPO_PROMPT, draw_prompts, serve_ppo

from trueline.config.load import from_any
from trueline.config.schema import PpoStageConfig
from trueline.data.cache import TokenPrompt
from trueline.data.conversation import Conversation, Message, Prompt
from trueline.parallel.world import World
from trueline.recipes.actors import Actors
from trueline.recipes.judges import open_reward
from trueline.recipes.ppo import Learning, iterate
from trueline.recipes.roles import Roles, open_roles
from trueline.rollout.sampling import Rollout
from trueline.train.budget import Budget
from trueline.train.experience import appraise
from trueline.train.optimizer import make_optimizer


class Silent:
    """A tokenizer for answers nobody reads."""

    fingerprint = "none"

    def decode(self, tokens: list[int]) -> str:
        return ""


class Endless:
    """Opened, but nothing stops an answer: both sides generate the same number of tokens."""

    stop: frozenset[int] = frozenset()

    def __init__(self, opened: Any):
        self.opened = opened

    def __getattr__(self, name: str) -> Any:
        return getattr(self.opened, name)

    def text(self) -> Silent:
        return Silent()


def settings(folder: Path) -> PpoStageConfig:
    sections: dict[str, Any] = {
        "model": {"path": str(folder / "ppo"), "dtype": "float32", "adapter": {"kind": "full"}},
        "critic": {"path": str(folder / "critic")},
        "reward": {"model": str(folder / "reward")},
        "data": {"train": ["none.jsonl"]},
        "rollout": {"prompts": PPO_ANSWERS, "samples": 1, "running": PPO_ANSWERS},
        "sampling": {"max_new_tokens": PPO_ANSWER, "temperature": 1.0},
        "ppo": {"epochs": 1, "minibatches": 1, "kl_coefficient": 0.05},
        "optimizer": {"lr": 3e-6},
        "run": {"output": str(folder / "run"), "steps": 1000},
    }
    return from_any(PpoStageConfig, sections)


def check(peer: Path, config: PpoStageConfig, roles: Roles, scores: Any) -> dict[str, float]:
    """Ours on the peer's tokens, before anything was trained."""
    theirs = load_file(peer)
    rows = [row.tolist() for row in theirs["tokens"]]
    rollouts = [Rollout(row[:PPO_PROMPT], row[PPO_PROMPT:], [0.0] * PPO_ANSWER, "length") for row in rows]
    found, _ = appraise(
        rollouts, scores, roles.model, roles.reference, roles.critic,
        ppo=config.ppo, kl_coefficient=0.05, temperature=1.0, max_tokens=config.batch.max_tokens, world=World(),
    )  # fmt: skip
    ours = {
        "logprobs": torch.stack([e.logprobs[PPO_PROMPT:] for e in found]),
        "ref_logprobs": torch.stack([e.ref_logprobs[PPO_PROMPT:] for e in found]),
        "values": torch.stack([e.values[PPO_PROMPT:] for e in found]),
        "scores": torch.tensor([e.score for e in found]),
    }
    if not all(x.any() for x in ours.values()):
        raise RuntimeError(f"a column is zero everywhere, so its comparison would say nothing: {ours}")
    return {name: float((theirs[name] - x).abs().max()) for name, x in ours.items()}


def train(folder: Path, iterations: int) -> dict[str, Any]:
    config, world = settings(folder), World()
    torch.manual_seed(0)
    roles = open_roles(config)
    optimizers = {
        "policy": make_optimizer(roles.policy_parameters, config.optimizer, 0),
        "critic": make_optimizer(roles.critic_parameters, config.optimizer, 1),
    }
    nothing = Conversation((Message("user", ""),))
    prompts = [TokenPrompt(tokens, Prompt(nothing)) for tokens in draw_prompts(PPO_ANSWERS * iterations, 32_000)]
    lines = []
    with ExitStack() as stack:
        budget = Budget(config.batch.max_tokens, print)
        source = (config.reward, roles.policy, roles.reward, roles.reward_opened, folder, budget)
        reward = stack.enter_context(open_reward(*source))
        peer = folder / "peer.safetensors"
        apart = check(peer, config, roles, reward.shared) if peer.exists() else {}
        ours: Any = replace(roles, policy=Endless(roles.policy))
        actors = Actors(config, ours, optimizers, reward, world, budget)
        learning = Learning(0.05)  # as in a run: after the first iteration the rollout's log-probabilities may do
        for step in range(1, iterations + 1):
            lines.append(iterate(actors, learning, prompts, [], step, iterations)[0])
    parts = ("generate", "reward", "score", "update", "save", "idle")
    seconds = [sum(line[f"{part}_seconds"] for part in parts) for line in lines]
    split = {part: [line[f"{part}_seconds"] for line in lines] for part in parts}
    return {
        "seconds": seconds,
        "tokens": [line["tokens"] for line in lines],
        "split": split,
        "apart": apart,
        "losses": [],
        "versions": {"torch": torch.__version__},
    }


if __name__ == "__main__":
    serve_ppo(train)
