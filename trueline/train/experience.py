"""From finished rollouts to what PPO learns from. One rule: whatever describes token t sits at index t, and prompt tokens hold zero."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from trueline.config.schema import PpoConfig
from trueline.data.sample import Sample, answered
from trueline.data.stream import plan
from trueline.errors import RunError
from trueline.model.batch import Batch, pack
from trueline.model.heads import LanguageModel, Scorer, values_before
from trueline.parallel.world import World, all_max, all_sum
from trueline.rollout.sampling import Rollout
from trueline.train.losses import gae, kl, kl_rewards, whiten
from trueline.train.step import Totals, average

Reference = Callable[[Batch, float], Tensor]
"""Batch and temperature -> log-probabilities `[T]`, zero on untrained tokens; a LanguageModel is one."""


@dataclass(frozen=True)
class ModelScores:
    """A reward model that reads the very tokens that were sampled, so it takes part in the pass over them."""

    scorer: Scorer
    finish: Callable[[list[float]], list[float]]  # scales and clips


@dataclass(frozen=True)
class Experience:
    """One finished rollout, appraised. Tensors are `[t]` over its prompt and answer, on the CPU, float32 (float64 for a float64 policy)."""

    sample: Sample
    rollout_logprobs: Tensor  # as sampled
    logprobs: Tensor  # the same, by the training graph: what the ratio is taken against
    ref_logprobs: Tensor
    values: Tensor  # of the state before the token
    rewards: Tensor
    advantages: Tensor
    returns: Tensor
    score: float
    stopped: bool

    def __len__(self) -> int:
        return len(self.sample)


@dataclass(frozen=True)
class ExperienceBatch:
    """Experiences packed for an objective: `[T]` tensors beside their batch."""

    batch: Batch
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def to(self, device: torch.device | str) -> "ExperienceBatch":
        return ExperienceBatch(
            self.batch.to(device), self.logprobs.to(device), self.values.to(device), self.advantages.to(device), self.returns.to(device)
        )


def pack_experience(items: Sequence[Experience]) -> ExperienceBatch:
    """Lays experiences end to end, in any grouping."""
    columns = (torch.cat([getattr(e, name) for e in items]) for name in ("logprobs", "values", "advantages", "returns"))
    return ExperienceBatch(pack([e.sample for e in items]), *columns)


def rollout_suffices(step: int, gap: float | None, tolerance: float, every: int) -> bool:
    """Whether iteration `step`, from 1, takes the rollout's log-probabilities for the policy's instead of running the policy again.

    `gap`: their mean difference where it was measured last, None if never. Every `every` iterations it is measured anew.
    """
    return gap is not None and gap <= tolerance and (step - 1) % every != 0


@torch.no_grad()
def appraise(
    rollouts: Sequence[Rollout],
    scores: Sequence[float] | ModelScores,
    policy: LanguageModel,
    reference: Reference,
    critic: Scorer,
    *,
    ppo: PpoConfig,
    kl_coefficient: float,
    temperature: float,
    max_tokens: int,
    world: World,
    rollout_logprobs_suffice: bool = False,
) -> tuple[list[Experience], dict[str, float]]:
    """Log-probabilities, values, rewards and advantages of this rank's rollouts, and metrics over every rank's.

    `scores`: one finite number per rollout, or the model that gives them. It is paid at the answer's last token, be that a stop token or
    not, less `ppo.no_stop_penalty` where it is not. Every answer token is charged `kl_coefficient` times log p - log reference.
    `temperature` is the rollouts': all log-probabilities are of the distribution they were sampled from, before truncation. `max_tokens`
    bounds a micro-batch. With `rollout_logprobs_suffice` the policy is not run: its log-probabilities are the rollouts', and no gap is
    told.
    The modules are in eval mode. Raises RunError naming the first rollout with a number that is not finite.
    """
    blocks = policy.decoder.config.blocks
    samples = [answered(r.prompt, r.tokens, blocks) for r in rollouts]
    lengths = [len(s) for s in samples]
    judge = scores.scorer if isinstance(scores, ModelScores) else None
    if not isinstance(scores, ModelScores):
        _check_scores(rollouts, scores)  # before the work
    settings = temperature, max_tokens, world.device
    (logprobs, ref_logprobs, values), found = _measure(samples, policy, reference, critic, judge, *settings, not rollout_logprobs_suffice)
    if isinstance(scores, ModelScores):
        scores = scores.finish(found)
        _check_scores(rollouts, scores)
    trained = torch.tensor([t for s in samples for t in s.trained], dtype=torch.bool)
    rollout_logprobs = torch.zeros_like(logprobs).masked_scatter(
        trained, torch.tensor([x for r in rollouts for x in r.logprobs], dtype=logprobs.dtype)
    )
    if rollout_logprobs_suffice:
        logprobs = rollout_logprobs
    stopped = [r.finish == "stop" for r in rollouts]
    paid = [score - (0.0 if stop else ppo.no_stop_penalty) for score, stop in zip(scores, stopped, strict=True)]
    ends = torch.tensor(list(accumulate(lengths))) - 1
    rewards = kl_rewards(logprobs, ref_logprobs, torch.tensor(paid, dtype=logprobs.dtype), ends, kl_coefficient)
    raw = gae(rewards, values, trained, lengths, ppo.gamma, ppo.lam)
    returns = raw + values
    advantages = whiten(raw, trained, lambda x: all_sum(world, x)) if ppo.whiten else raw
    columns = (rollout_logprobs, logprobs, ref_logprobs, values, rewards, advantages, returns)
    for name, column in zip(("rollout log-probability", "log-probability", "reference log-probability", "value"), columns, strict=False):
        _check_finite(name, column, lengths)
    rows = zip(samples, *(column.split(lengths) for column in columns), map(float, scores), stopped, strict=True)
    metrics = _metrics(columns, trained, scores, stopped, world)
    if rollout_logprobs_suffice:
        del metrics["logprob_gap"], metrics["logprob_gap_max"]
    return [Experience(*row) for row in rows], metrics


def _check_scores(rollouts: Sequence[Rollout], scores: Sequence[float]) -> None:
    if len(scores) != len(rollouts):
        raise RunError(f"the reward gave {len(scores)} scores for {len(rollouts)} answers")
    for i, (rollout, score) in enumerate(zip(rollouts, scores, strict=True)):
        if not math.isfinite(score):
            raise RunError(f"the reward of answer {i + 1} of {len(rollouts)} is {score}; expected a finite number")
        if not rollout.tokens or len(rollout.tokens) != len(rollout.logprobs):
            raise ValueError(f"rollout {i} has {len(rollout.tokens)} tokens and {len(rollout.logprobs)} log-probabilities")


def _check_finite(name: str, column: Tensor, lengths: list[int]) -> None:
    for i, part in enumerate(column.split(lengths)) if not column.isfinite().all() else ():
        bad = (~part.isfinite()).nonzero()
        if len(bad):
            raise RunError(f"{name} of token {int(bad[0])} of answer {i + 1} is {float(part[bad[0]])}; the weights behind it are not sound")


def _measure(
    samples: Sequence[Sample],
    policy: LanguageModel,
    reference: Reference,
    critic: Scorer,
    judge: Scorer | None,
    temperature: float,
    max_tokens: int,
    device: torch.device,
    with_policy: bool,
) -> tuple[list[Tensor], list[float]]:
    """Policy log-probabilities, reference log-probabilities and values of all samples, packed in their order: three `[T]` on the CPU; and
    the reward model's score of each sample's last token. Without the policy, the reference's stand in its place.

    Every role reads the same packed batch, and those on the policy's trunk the same embeddings.
    """
    parts: list[list[Tensor]] = [[torch.empty(0)] * len(samples) for _ in range(3)]
    scores = [0.0] * len(samples)
    for indices in plan([len(s) for s in samples], max_tokens)[0]:
        plain = pack([samples[i] for i in indices]).to(device)
        shared = replace(plain, embedded=policy.decoder.embed(plain.tokens))

        def seen(role: object, plain: Batch = plain, shared: Batch = shared) -> Batch:
            return shared if getattr(role, "decoder", None) is policy.decoder else plain

        expected = reference(seen(reference), temperature)
        found = policy(shared, temperature) if with_policy else expected, expected, values_before(critic(seen(critic)), plain)
        for part, column in zip(parts, found, strict=True):
            for i, piece in zip(indices, column.cpu().split(plain.lengths), strict=True):
                part[i] = piece
        if judge is not None:
            for i, score in zip(indices, judge(seen(judge))[plain.ends()].tolist(), strict=True):
                scores[i] = score
    return [torch.cat(part) for part in parts], scores


def _metrics(
    columns: Sequence[Tensor], trained: Tensor, scores: Sequence[float], stopped: Sequence[bool], world: World
) -> dict[str, float]:
    """`kl` is summed over an answer's tokens, then averaged over answers; `entropy` is estimated as -log p of the sampled tokens."""
    rollout_logprobs, logprobs, ref_logprobs, values, rewards, _, returns = (c.double()[trained] for c in columns)
    answers, tokens = len(scores), len(logprobs)
    drift, gap, error = kl(logprobs, ref_logprobs).sum(), (rollout_logprobs - logprobs).abs(), returns - values
    score = torch.tensor(scores, dtype=torch.float64)
    totals: Totals = {
        "score": (score.sum(), answers),
        "score_squared": ((score**2).sum(), answers),
        "reward": (rewards.sum(), answers),
        "kl": (drift, answers),
        "kl_per_token": (drift, tokens),
        "logprob_gap": (gap.sum(), tokens),
        "entropy": (-logprobs.sum(), tokens),
        "value": (values.sum(), tokens),
        "response_length": (torch.tensor(float(tokens)), answers),
        "stopped": (torch.tensor(float(sum(stopped))), answers),
        "returns": (returns.sum(), tokens),
        "returns_squared": ((returns**2).sum(), tokens),
        "error": (error.sum(), tokens),
        "error_squared": ((error**2).sum(), tokens),
    }
    means = average(totals, world)

    def variance(name: str) -> float:
        return max(means.pop(f"{name}_squared") - means[name] ** 2, 0.0)

    spread, unexplained = variance("returns"), variance("error")
    means["score_deviation"] = variance("score") ** 0.5
    means["explained_variance"] = 1 - unexplained / spread if spread > 0 else 0.0
    means["logprob_gap_max"] = float(all_max(world, gap.max()))
    del means["returns"], means["error"]
    return means
