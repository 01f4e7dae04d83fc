"""trueline's PPO on given prompts, through the recipe's own iteration: policy, reference, critic and reward model, all weights trained.

`python ppo_ours.py FOLDER ITERATIONS [--epochs N] [--varied] [--dtype NAME] --columns FILE ...` in the folder that `compare.py` filled.
A reading checks the first iteration of every peer that has left its file there: the largest difference between its log-probabilities,
values and scores and ours on the same tokens.
"""

import argparse
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from columns import read_columns
from sides import PPO_ANSWER, PPO_ANSWERS, STOP, draw_prompts, serve_ppo

from trueline.config.load import from_any
from trueline.config.schema import PpoStageConfig
from trueline.data.cache import TokenPrompt
from trueline.data.conversation import Conversation, Message, Prompt
from trueline.parallel.world import World
from trueline.recipes.actors import Actors
from trueline.recipes.assemble import settle_dtype
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


class Given:
    """An opened model whose tokenizer nobody needs, and whose answers end where the peer's do."""

    def __init__(self, opened: Any, stop: frozenset[int]):
        self.opened, self.stop = opened, stop

    def __getattr__(self, name: str) -> Any:
        return getattr(self.opened, name)

    def text(self) -> Silent:
        return Silent()


def settings(given: argparse.Namespace) -> PpoStageConfig:
    folder: Path = given.folder
    sections: dict[str, Any] = {
        "model": {"path": str(folder / "ppo"), "dtype": given.dtype, "adapter": {"kind": "full"}},
        "critic": {"path": str(folder / "critic")},
        "reward": {"model": str(folder / "reward")},
        "data": {"train": ["none.jsonl"]},
        "rollout": {"prompts": PPO_ANSWERS, "samples": 1, "running": PPO_ANSWERS},
        "sampling": {"max_new_tokens": PPO_ANSWER, "temperature": 1.0},
        "ppo": {"epochs": given.epochs, "minibatches": 1, "kl_coefficient": 0.05},
        "optimizer": {"lr": 3e-6},
        "run": {"output": str(folder / "run"), "steps": 1000},
    }
    return settle_dtype(from_any(PpoStageConfig, sections))  # what `auto` means is the stages' own rule


def check(columns: Path, config: PpoStageConfig, roles: Roles, scores: Any) -> dict[str, float]:
    """Ours on the peer's tokens, before anything was trained."""
    prompts, answers, theirs = read_columns(columns)
    ends: Any = {True: "stop", False: "length"}
    rollouts = [Rollout(p, a, [0.0] * len(a), ends[a[-1] == STOP]) for p, a in zip(prompts, answers, strict=True)]
    found, _ = appraise(
        rollouts, scores, roles.model, roles.reference, roles.critic,
        ppo=config.ppo, kl_coefficient=0.05, temperature=1.0, max_tokens=config.batch.max_tokens, world=World(),
    )  # fmt: skip
    pairs = list(zip(found, prompts, strict=True))
    ours = {name: torch.cat([getattr(e, name)[len(p) :] for e, p in pairs]) for name in ("logprobs", "ref_logprobs", "values")}
    ours["scores"] = torch.tensor([e.score for e in found])
    if not all(x.any() for x in ours.values()):
        raise RuntimeError(f"a column is zero everywhere, so its comparison would say nothing: {ours}")
    return {name: float((theirs[name] - x).abs().max()) for name, x in ours.items()}


def train(given: argparse.Namespace) -> dict[str, Any]:
    config, world, iterations = settings(given), World(), given.iterations
    torch.manual_seed(0)
    roles = open_roles(config)
    optimizers = {
        "policy": make_optimizer(roles.policy_parameters, config.optimizer, 0),
        "critic": make_optimizer(roles.critic_parameters, config.optimizer, 1),
    }
    nothing = Conversation((Message("user", ""),))
    prompts = [TokenPrompt(tokens, Prompt(nothing)) for tokens in draw_prompts(PPO_ANSWERS * iterations, given.varied)]
    lines = []
    with ExitStack() as stack:
        budget = Budget(config.batch.max_tokens, print)
        source = (config.reward, roles.policy, roles.reward, roles.reward_opened, given.folder, budget)
        reward = stack.enter_context(open_reward(*source))
        apart = {str(path): check(path, config, roles, reward.shared) for path in given.columns if path.exists()}
        ours: Any = replace(roles, policy=Given(roles.policy, frozenset({STOP} if given.varied else ())))
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
        "dtype": config.model.dtype,
        "versions": {"torch": torch.__version__},
    }


if __name__ == "__main__":
    serve_ppo(train)
