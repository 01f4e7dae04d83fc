"""Scores for answers: from a reward model, or from a person's Python function in a process of its own."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trueline.config.schema import AdapterConfig, ModelConfig, RewardSourceConfig
from trueline.data.cache import TokenPrompt
from trueline.data.conversation import Message
from trueline.data.sample import Sample, answered
from trueline.data.stream import plan
from trueline.data.tokenizer import Tokenizer
from trueline.errors import UserError
from trueline.families.family import Family
from trueline.model.batch import pack
from trueline.model.heads import Scorer
from trueline.recipes.assemble import Opened, make_scorer, open_model
from trueline.recipes.generate import line_of
from trueline.recipes.measures import matches, references
from trueline.rollout.sampling import Rollout
from trueline.train.budget import Budget
from trueline.train.experience import ModelScores
from trueline.train.judge import Judge

SAME_ANSWER = "same_answer"
"""The reward function that is built in: 1 where the final answer is the record's (`trueline/data/answers.py`), else 0."""
Scores = Callable[[Sequence[Rollout], Sequence[TokenPrompt]], list[float]]
"""Answers (with their text) and what they answer -> one finite number each."""


@dataclass(frozen=True)
class Reward:
    """Where scores come from, in two parts; called, it is a `Scores`.

    `prepare` may work on some answers while others are generated: what it makes of an answer does not depend on the rest. `finish` gets
    what was made of all. Where `shared` is set, the model takes part in PPO's own pass over the answers in place of `finish`.
    """

    prepare: Callable[[Sequence[Rollout], Sequence[TokenPrompt]], list[Any]]
    finish: Callable[[list[Any]], list[float]]
    shared: ModelScores | None = None

    def __call__(self, rollouts: Sequence[Rollout], prompts: Sequence[TokenPrompt]) -> list[float]:
        return self.finish(self.prepare(rollouts, prompts))


def frozen_config(config: ModelConfig, path: str) -> ModelConfig:
    """The settings for another, frozen model of the same run: its own tokenizer and template, weights from its folder."""
    own = {"path": path, "base": None, "init": "load", "tokenizer": None, "template": "auto"}
    return config.model_copy(update=own | {"adapter": AdapterConfig(), "recompute": False, "compile": False})


def reward_model(config: RewardSourceConfig, policy: ModelConfig, seed: int) -> tuple[Scorer, Opened]:
    """The reward model in its own memory, frozen."""
    opened = open_model(frozen_config(policy, str(config.model)), seed, with_head=False)
    scorer = make_scorer(opened.decoder, opened.role, needed_score(opened.score, opened.path))
    scorer.requires_grad_(False)
    return scorer, opened


def needed_score(score: Tensor | None, path: Path) -> Tensor:
    if score is None:
        raise UserError(f"reward.model: {path} has no score head, so it is no reward model; train one with `trueline reward`")
    return score


@contextmanager
def open_reward(
    config: RewardSourceConfig, policy: Opened | None, scorer: Scorer | None, own: Opened | None, folder: Path, budget: Budget
) -> Iterator[Reward]:
    """The scores `config` asks for, scaled and clipped. `scorer` (a reward model) may have its `own` folder, and so its own template;
    without a `policy` (answers from a file) it is the one that is used."""

    def finish(scores: list[float]) -> list[float]:
        bound = config.clip if config.clip is not None else float("inf")
        return [min(max(score * config.scale, -bound), bound) for score in scores]

    if scorer is not None:
        render = _renderer(policy, own)
        yield Reward(
            lambda rollouts, prompts: [render(r, p) for r, p in zip(rollouts, prompts, strict=True)],
            lambda samples: finish(score_samples(scorer, samples, budget)),
            ModelScores(scorer, finish) if _reads_the_answer(policy, own) else None,
        )
        return
    if config.function == SAME_ANSWER:
        yield Reward(lambda rollouts, prompts: list(zip(rollouts, prompts, strict=True)), lambda pairs: finish(_equal_answers(pairs)))
        return
    printed = folder / "reward.log"
    try:
        with Judge(str(config.function), config.timeout, printed) as judge:
            yield Reward(
                lambda rollouts, prompts: judge.score(
                    [r.text or "" for r in rollouts], [asked_of(p) for p in prompts], [p.prompt.record for p in prompts]
                ),
                finish,
            )
    finally:
        if printed.is_file() and not printed.stat().st_size:
            printed.unlink()


def sample_line(prompt: TokenPrompt, rollout: Rollout, score: float | None) -> dict[str, Any]:
    """One line of samples.jsonl."""
    return line_of(asked_of(prompt), rollout) | ({} if score is None else {"score": score})


def asked_of(prompt: TokenPrompt) -> str:
    """The last user turn."""
    return next((m.content for m in reversed(prompt.prompt.conversation.messages) if m.role == "user"), "")


def _equal_answers(pairs: Sequence[tuple[Rollout, TokenPrompt]]) -> list[float]:
    wanted = references([prompt for _, prompt in pairs], None, "auto")
    if None in wanted:
        raise UserError(f"reward.function: {SAME_ANSWER} needs an answer in every record; {wanted.count(None)} of {len(wanted)} have none")
    return [score or 0.0 for score in matches([rollout.text or "" for rollout, _ in pairs], wanted)]


def _renderer(policy: Opened | None, own: Opened | None) -> Callable[[Rollout, TokenPrompt], Sample]:
    """How the reward model sees an answer: the very tokens that were sampled where it shares the policy's template and tokenizer."""
    if policy is not None and _reads_the_answer(policy, own):
        blocks = (own or policy).folder.decoder_config.blocks
        return lambda rollout, prompt: answered(rollout.prompt, rollout.tokens, blocks)
    assert own is not None
    family, tokenizer = own.folder.family, own.text()
    return lambda rollout, prompt: _translated(rollout, prompt, family, tokenizer)


def _reads_the_answer(policy: Opened | None, own: Opened | None) -> bool:
    """Whether the reward model takes the very tokens that were sampled: it shares the policy's template and tokenizer."""
    if policy is None or own is None:
        return policy is not None
    alike = own.tokenizer is None or policy.tokenizer is None or own.tokenizer.fingerprint == policy.tokenizer.fingerprint
    return alike and own.folder.family is policy.folder.family


def _translated(rollout: Rollout, prompt: TokenPrompt, family: Family, tokenizer: Tokenizer) -> Sample:
    conversation = prompt.prompt.conversation
    answer = Message("assistant", (rollout.text or "").strip())
    return family.render(replace(conversation, messages=(*conversation.messages, answer)), tokenizer, last_only=True)


def score_samples(scorer: Scorer, samples: Sequence[Sample], budget: Budget) -> list[float]:
    """The score of each sample's last token."""
    return budget.fit([len(s) for s in samples], partial(_score, scorer, samples))


@torch.no_grad()
def _score(scorer: Scorer, samples: Sequence[Sample], max_tokens: int) -> list[float]:
    place = scorer.score.weight.device
    scores = [0.0] * len(samples)
    for indices in plan([len(s) for s in samples], max_tokens)[0]:
        batch = pack([samples[i] for i in indices]).to(place)
        for i, value in zip(indices, scorer(batch)[batch.ends()].tolist(), strict=True):
            scores[i] = value
    return scores
