"""Those who act in PPO: they answer, score, appraise and learn; and what policy and critic learn from one micro-batch.

One rule: every forward and backward pass of an iteration goes through `Actors.budget`, so that what does not fit is cut and never lost.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from torch import Tensor

from trueline.config.schema import OptimizerConfig, PpoConfig, PpoStageConfig
from trueline.data.cache import TokenPrompt
from trueline.data.sample import Sample, answered
from trueline.data.stream import key, plan
from trueline.model.batch import Batch, pack
from trueline.model.heads import LanguageModel, Scorer, values_before
from trueline.parallel.world import World
from trueline.recipes.fit import TRIVIAL, longest_items
from trueline.recipes.generate import sampling_of
from trueline.recipes.judges import Reward, score_samples
from trueline.recipes.roles import Roles
from trueline.rollout.engine import Engine
from trueline.rollout.sampling import Rollout
from trueline.train.beside import Beside
from trueline.train.budget import Budget, choose_recompute, recompute_all
from trueline.train.experience import Experience, ExperienceBatch, ModelScores, appraise, pack_experience
from trueline.train.losses import kl, ppo_clipped, ppo_policy_loss, ppo_value_loss
from trueline.train.optimizer import Optimizer, learning_rate
from trueline.train.step import Count, Losses, Objective, Totals, accumulate, train_step


@dataclass(frozen=True)
class PolicyBatch:
    """What one policy micro-batch learns from: rollouts, or supervised samples of the pretraining mix."""

    experience: ExperienceBatch | None
    ptx: Batch | None = None

    @property
    def batch(self) -> Batch | None:
        """Its tokens, for the report on a step that went wrong."""
        return self.ptx if self.experience is None else self.experience.batch


PARTS = ("generate", "reward", "score", "update", "save", "idle")


class Clock:
    """Seconds by what they were spent on, since the last reading. Nothing falls between the parts: they add up to the time on the wall."""

    def __init__(self) -> None:
        self.last = time.perf_counter()
        self.spent = dict.fromkeys(PARTS, 0.0)

    def lap(self, part: str) -> None:
        """What has passed since the last lap was spent on `part`."""
        now = time.perf_counter()
        self.spent[part] += now - self.last
        self.last = now

    def skip(self) -> None:
        """What has passed since the last lap is counted elsewhere."""
        self.last = time.perf_counter()

    def read(self) -> dict[str, float]:
        """A metric for each part; all are zero again afterwards."""
        self.lap("idle")
        found, self.spent = {f"{part}_seconds": seconds for part, seconds in self.spent.items()}, dict.fromkeys(PARTS, 0.0)
        return found


@dataclass(frozen=True)
class Answers:
    """One answer to each prompt, with its text; what the reward made of them so far, and how many seconds that took beside generation."""

    rollouts: list[Rollout]
    prepared: list[Any]
    overlapped: float


@dataclass(frozen=True)
class Actors:
    """Those who act in every iteration."""

    config: PpoStageConfig
    roles: Roles
    optimizers: dict[str, Optimizer]
    reward: Reward
    world: World
    budget: Budget
    clock: Clock = field(default_factory=Clock)

    @cached_property
    def engine(self) -> Engine:
        """The same in every iteration: what it has recorded may serve again."""
        rollout = self.config.rollout
        return Engine(self.roles.model, rollout.running, rollout.memory_bytes, rollout.packed)

    def answer(self, prompts: Sequence[TokenPrompt], seeds: Sequence[int], samples: int = 1) -> Answers:
        """One answer to each prompt by the policy as it is now: the engine runs the very weights that are trained.

        With `reward.overlap` the reward works on the answers to a prompt (`samples` neighbours) once they have ended, while others go on.
        """
        config, opened = self.config, self.roles.policy
        found: dict[int, Rollout] = {}

        def work(indices: list[int]) -> list[tuple[Rollout, Any]]:
            rollouts = [replace(found[i], text=opened.text().decode(found[i].tokens)) for i in indices]
            return list(zip(rollouts, self.reward.prepare(rollouts, [prompts[i] for i in indices]), strict=True))

        self.clock.lap("idle")
        with Beside(work, len(prompts), samples if config.reward.overlap else len(prompts)) as beside:

            def finished(i: int, rollout: Rollout) -> None:
                found[i] = rollout
                beside.done(i)

            with self.engine.hold():
                self.engine.generate([p.tokens for p in prompts], sampling_of(config.sampling, opened), seeds, finished)
            self.clock.lap("generate")
            rollouts, prepared = zip(*beside.results(), strict=True)
        waited = time.perf_counter() - self.clock.last
        self.clock.lap("reward")
        return Answers(list(rollouts), list(prepared), max(beside.seconds - waited, 0.0))

    def appraise(
        self,
        rollouts: Sequence[Rollout],
        scores: Sequence[float] | ModelScores,
        kl_coefficient: float,
        max_tokens: int,
        suffices: bool = False,
    ) -> tuple[list[Experience], dict[str, float]]:
        """`experience.appraise` with these roles; `suffices`: the rollouts' log-probabilities are the policy's."""
        config, roles = self.config, self.roles
        return appraise(
            rollouts,
            scores,
            roles.model,
            roles.reference,
            roles.critic,
            ppo=config.ppo,
            kl_coefficient=kl_coefficient,
            temperature=config.sampling.temperature,
            max_tokens=max_tokens,
            world=self.world,
            rollout_logprobs_suffice=suffices,
        )

    def update(self, chosen: Sequence[Experience], mixed: Sequence[Sample], step: int, number: int, total: int) -> dict[str, float]:
        """Update `number` of `total`, of the policy and then of the critic."""
        config = self.config
        lengths = [*(len(e) for e in chosen), *(len(s) for s in mixed)]
        objective = policy_objective(self.roles.model, config.ppo, config.sampling.temperature)

        def update_policy(tokens: int) -> dict[str, float]:
            policy = [PolicyBatch(e) for e in self.pack(chosen, tokens)]
            for indices in plan([len(s) for s in mixed], tokens)[0] if mixed else []:
                policy.append(PolicyBatch(None, pack([mixed[i] for i in indices]).to(self.world.device)))
            return self._step("policy", config.optimizer, policy, objective, count_policy, step, number, total)

        def update_critic(tokens: int) -> dict[str, float]:
            settings, objective = config.critic.optimizer or config.optimizer, value_objective(self.roles.critic, config.ppo)
            return self._step("critic", settings, self.pack(chosen, tokens), objective, count_values, step, number, total)

        values, critic = self.budget.fit(lengths, update_policy), self.budget.fit([len(e) for e in chosen], update_critic)
        return values | {"value_loss": critic["loss"]} | {f"critic_{name}": critic[name] for name in ("grad_norm", "lr")}

    def pack(self, chosen: Sequence[Experience], max_tokens: int) -> list[ExperienceBatch]:
        """Micro-batches of at most so many tokens."""
        planned = plan([len(e) for e in chosen], max_tokens)[0]
        return [pack_experience([chosen[i] for i in indices]).to(self.world.device) for indices in planned if indices]

    def _step(
        self,
        who: str,
        settings: OptimizerConfig,
        batches: Sequence[Any],
        objective: Objective[Any],
        count: Count[Any],
        step: int,
        number: int,
        total: int,
    ) -> dict[str, float]:
        rate = learning_rate(number, total, settings)
        values = train_step(
            self.optimizers[who],
            batches,
            objective,
            count,
            world=self.world,
            max_norm=settings.max_norm,
            lr=rate,
            step=step,
            seed=key(self.config.run.seed, who, number),
        )
        return values | {"lr": rate}


def policy_objective(model: LanguageModel, ppo: PpoConfig, temperature: float) -> Callable[[PolicyBatch], tuple[Losses, Totals]]:
    """Clipped policy loss per answer token, plus `ptx_coefficient` times the supervised loss per trained token of the mix."""

    def objective(item: PolicyBatch) -> tuple[Losses, Totals]:
        if item.ptx is not None:
            supervised = -model.total(item.ptx)
            return {"ptx tokens": ppo.ptx_coefficient * supervised}, {"ptx_loss": (supervised, item.ptx.trained.sum())}
        seen = item.experience
        assert seen is not None
        trained = seen.batch.trained
        tokens = trained.sum()

        def loss(logprobs: Tensor, at: Tensor) -> Tensor:
            return ppo_policy_loss(logprobs, seen.logprobs[at], seen.advantages[at], ppo.clip)

        total, logprobs = model.losses(seen.batch, loss, temperature)
        clipped = (ppo_clipped(logprobs, seen.logprobs, seen.advantages, ppo.clip) & trained).sum()
        drift = (kl(seen.logprobs, logprobs) * trained).sum()
        return {"tokens": total}, {"policy_loss": (total, tokens), "clip_fraction": (clipped, tokens), "policy_kl": (drift, tokens)}

    return objective


def value_objective(critic: Scorer, ppo: PpoConfig) -> Callable[[ExperienceBatch], tuple[Losses, Totals]]:
    """Clipped value loss per answer token."""

    def objective(seen: ExperienceBatch) -> tuple[Losses, Totals]:
        values = values_before(critic(seen.batch), seen.batch)
        total = (ppo_value_loss(values, seen.values, seen.returns, ppo.value_clip) * seen.batch.trained).sum()
        return {"tokens": total}, {}

    return objective


def count_policy(item: PolicyBatch) -> Mapping[str, Tensor]:
    if item.ptx is not None:
        return {"ptx tokens": item.ptx.trained.sum()}
    assert item.experience is not None
    return {"tokens": item.experience.batch.trained.sum()}


def count_values(seen: ExperienceBatch) -> Mapping[str, Tensor]:
    return {"tokens": seen.batch.trained.sum()}


def burn_in(actors: Actors, prompts: Sequence[TokenPrompt], ptx: Sequence[Sample]) -> None:
    """Chooses which layers are recomputed, then scores and learns from the fullest micro-batch there can be, without an update.

    Its answers are as long as they may become. Nothing is kept of it; memory for generating is not rehearsed.
    """
    config, roles, budget = actors.config, actors.roles, actors.budget
    rollouts = longest_rollouts(config, prompts)
    rollouts = rollouts[: -(-len(rollouts) // config.ppo.minibatches)]
    mixed = longest_items(ptx, len(rollouts))
    sizes = [len(r.prompt) + len(r.tokens) for r in rollouts]

    def fullest(tokens: int) -> list[Rollout]:
        return [rollouts[i] for i in plan(sizes, tokens)[0][0]]

    def rehearse(tokens: int) -> None:
        answers = fullest(tokens)
        experience, _ = actors.appraise(answers, [0.0] * len(answers), 0.0, tokens)
        if roles.reward is not None:
            score_samples(roles.reward, [e.sample for e in experience], Budget(tokens, budget.say))
        packed = actors.pack(experience, tokens)
        policy = policy_objective(roles.model, config.ppo, config.sampling.temperature)
        accumulate(actors.optimizers["policy"], [PolicyBatch(e) for e in packed], policy, count_policy, actors.world, 0)
        actors.optimizers["policy"].clear()
        for indices in plan([len(s) for s in mixed], tokens)[0][:1] if mixed else []:
            both = [PolicyBatch(None, pack([mixed[i] for i in indices]).to(actors.world.device))]
            accumulate(actors.optimizers["policy"], both, policy, count_policy, actors.world, 0)
            actors.optimizers["policy"].clear()
        accumulate(actors.optimizers["critic"], packed, value_objective(roles.critic, config.ppo), count_values, actors.world, 0)
        actors.optimizers["critic"].clear()

    if config.model.recompute == "auto":
        samples = [answered(r.prompt, r.tokens, roles.model.decoder.config.blocks) for r in fullest(budget.room(sizes))]
        batch = pack(samples).to(actors.world.device)
        several = len(plan(sizes, budget.room(sizes))[0]) > 1 or bool(mixed)
        for module in (roles.model, roles.critic):
            optimizers, memory = actors.optimizers.values(), config.batch.memory
            budget.say(choose_recompute(module.decoder, module.role, batch, len(batch.tokens), optimizers, memory, several))
        budget.relieve = partial(recompute_all, [roles.model.decoder, roles.critic.decoder])
    if min(budget.room(sizes), sum(sizes)) >= TRIVIAL:
        budget.fit([*sizes, *map(len, mixed)], rehearse)


def longest_rollouts(config: PpoStageConfig, prompts: Sequence[TokenPrompt]) -> list[Rollout]:
    """An iteration's answers if all prompts were the longest and no answer stopped."""
    answer = config.sampling.max_new_tokens
    asked = [prompt.tokens for prompt in longest_items(prompts, config.rollout.prompts) for _ in range(config.rollout.samples)]
    return [Rollout(tokens, tokens[-1:] * answer, [0.0] * answer, "length") for tokens in asked]
