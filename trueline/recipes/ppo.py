"""Proximal policy optimisation from a reward model or a Python function (arXiv:1707.06347, 2203.02155, details as in 1909.08593).

One iteration: 1. answer prompts with the policy as it is now; 2. score the answers; 3. appraise them (log-probabilities, reference, values,
rewards less the KL penalty, advantages); 4. replay them in minibatches, one update of policy and critic each; 5. adapt the KL coefficient.

Left out: entropy bonus, several ranks, rollouts that run beside training.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from trueline.config.load import to_yaml
from trueline.config.schema import OptimizerConfig, PpoConfig, PpoStageConfig
from trueline.data.cache import TokenPrompt, items_fingerprint, lengths
from trueline.data.sample import Sample, answered
from trueline.data.stream import key, plan, step_indices, total_samples, total_steps
from trueline.model.batch import Batch, pack
from trueline.model.heads import LanguageModel, Scorer, values_before
from trueline.parallel.world import World, start_alone
from trueline.recipes.assemble import publish
from trueline.recipes.fit import TRIVIAL, resume, save, show_plan
from trueline.recipes.generate import sampling_of
from trueline.recipes.judges import Scores, open_reward, sample_line, score_samples
from trueline.recipes.prepare import prompt_tokens, ptx_samples
from trueline.recipes.report import run_report
from trueline.recipes.roles import Roles, open_roles, parents
from trueline.rollout.engine import Engine
from trueline.rollout.sampling import Rollout
from trueline.train.budget import Budget, choose_recompute, recompute_all
from trueline.train.experience import Experience, ExperienceBatch, appraise, pack_experience
from trueline.train.losses import adaptive_kl, kl, ppo_clipped, ppo_policy_loss, ppo_value_loss, sft_loss
from trueline.train.optimizer import Optimizer, learning_rate, make_optimizer
from trueline.train.run import Run
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


@dataclass
class Learning:
    """What PPO carries from iteration to iteration beside the weights; part of every checkpoint."""

    kl_coefficient: float

    def restore(self, ppo: PpoConfig, state: Mapping[str, Any]) -> None:
        """A coefficient that does not adapt is the config's."""
        if ppo.kl_target is not None:
            self.kl_coefficient = float(state["kl_coefficient"])

    def adapt(self, ppo: PpoConfig, drift: float, answers: int) -> None:
        """`drift`: KL to the reference, in nats per answer."""
        if ppo.kl_target is not None:
            self.kl_coefficient = adaptive_kl(self.kl_coefficient, drift, ppo.kl_target, ppo.kl_horizon, answers)


@dataclass(frozen=True)
class Actors:
    """Those who act in every iteration."""

    config: PpoStageConfig
    roles: Roles
    optimizers: dict[str, Optimizer]
    score: Scores
    world: World
    budget: Budget

    def answer(self, prompts: Sequence[TokenPrompt], seeds: Sequence[int]) -> list[Rollout]:
        """One answer to each prompt by the policy as it is now: the engine runs the very weights that are trained."""
        config, opened = self.config, self.roles.policy
        engine = Engine(self.roles.model, config.rollout.running)
        with engine.hold():
            rollouts = engine.generate([p.tokens for p in prompts], sampling_of(config.sampling, opened), seeds)
        return [replace(r, text=opened.text().decode(r.tokens)) for r in rollouts]

    def appraise(
        self, rollouts: Sequence[Rollout], scores: Sequence[float], kl_coefficient: float, max_tokens: int
    ) -> tuple[list[Experience], dict[str, float]]:
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
            loss = sft_loss(model(item.ptx), item.ptx.trained).sum()
            return {"ptx tokens": ppo.ptx_coefficient * loss}, {"ptx_loss": (loss, item.ptx.trained.sum())}
        seen = item.experience
        assert seen is not None
        trained = seen.batch.trained
        tokens = trained.sum()
        logprobs = model(seen.batch, temperature)
        total = (ppo_policy_loss(logprobs, seen.logprobs, seen.advantages, ppo.clip) * trained).sum()
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


def run(config: PpoStageConfig, dry_run: bool = False) -> None:
    """Trains `config.model` on the prompts in `config.data`: the policy is left in `<run.output>/model`, every answer in samples.jsonl."""
    world = start_alone(config.mesh)
    roles = open_roles(config)
    family, tokenizer = roles.policy.folder.family, roles.policy.text()
    prompts = prompt_tokens(config.data, family, tokenizer, config.sampling.max_new_tokens, config.run.seed)
    ptx = ptx_samples(config.data, family, tokenizer, config.run.seed)
    total = total_steps(len(prompts.train), config.rollout.prompts, config.run.steps, config.run.epochs)
    longest = max(int(lengths(items).max()) for items in (prompts.train, prompts.held_out) if len(items)) + config.sampling.max_new_tokens
    plan([longest, int(max(lengths(ptx.train), default=0))], config.batch.max_tokens)  # refuses what would not fit later
    if dry_run:
        show_plan(config, derived(config, roles, prompts.train, total))
        return
    optimizers = {
        "policy": make_optimizer(roles.policy_parameters, config.optimizer, key(config.run.seed, "policy rounding")),
        "critic": make_optimizer(
            roles.critic_parameters, config.critic.optimizer or config.optimizer, key(config.run.seed, "critic rounding")
        ),
    }
    trained = {"policy": roles.policy_parameters, "critic": roles.critic_parameters}
    learning = Learning(config.ppo.kl_coefficient)
    order: dict[str, Any] = {"seed": config.run.seed, "model": roles.policy.fingerprint}
    order |= {"rollout.prompts": config.rollout.prompts, "rollout.samples": config.rollout.samples}
    order |= {"data": items_fingerprint(prompts.train)}
    budget = Budget(config.batch.max_tokens, print)
    source = (config.reward, roles.policy, roles.reward, roles.reward_opened, config.run.output, budget)
    with Run("ppo", config.run, to_yaml(config), world) as run, open_reward(*source) as score:
        done = resume(run, order, trained, optimizers, lambda state: learning.restore(config.ppo, state))
        if run.finished(done, total):
            return
        run.begin(done, total, parents(config, roles.policy))
        for note in (*prompts.notes, *(f"data.ptx: {note}" for note in ptx.notes)):
            run.say(note)
        budget.say = run.say
        actors = Actors(config, roles, optimizers, score, world, budget)
        burn_in(actors, prompts.train, ptx.train)
        for step in range(done + 1, total + 1):
            values, lines = iterate(actors, learning, prompts.train, ptx.train, step, total)
            run.log(step, values)
            run.samples(step, lines)
            stopping = run.stopping
            if prompts.held_out and run.due(config.run.eval_every, step) and not stopping:
                run.log(step, held_out_values(actors, prompts.held_out), "eval")
            if run.due(config.run.save_every, step) or stopping:
                save(run, step, order, trained, optimizers, {"kl_coefficient": learning.kl_coefficient})
            if stopping and step < total:
                raise run.interrupted(step)
        publish(run.folder / "model", roles.policy, roles.model.role, config.model.adapter)
        run_report(run.folder)


def iterate(
    actors: Actors, learning: Learning, prompts: Sequence[TokenPrompt], ptx: Sequence[Sample], step: int, total: int
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """One iteration; returns its metrics, and a line for each answer."""
    config = actors.config
    clock = [time.perf_counter()]
    limit = None if config.run.epochs is None else total_samples(len(prompts), config.run.epochs)
    indices = step_indices(config.run.seed, step - 1, len(prompts), config.rollout.prompts, limit)
    asked = [prompts[i] for i in indices for _ in range(config.rollout.samples)]
    rollouts = actors.answer(asked, [key(config.run.seed, "rollout", step, j) for j in range(len(asked))])
    clock.append(time.perf_counter())
    scores = actors.score(rollouts, asked)
    sizes = [len(r.prompt) + len(r.tokens) for r in rollouts]
    experience, values = actors.budget.fit(sizes, partial(actors.appraise, rollouts, scores, learning.kl_coefficient))
    clock.append(time.perf_counter())
    values |= replay(actors, experience, ptx, step, total) | {"kl_coefficient": learning.kl_coefficient}
    clock.append(time.perf_counter())
    learning.adapt(config.ppo, values["kl"], len(rollouts))
    tokens = sum(len(e) for e in experience)
    names = ("generate_seconds", "appraise_seconds", "train_seconds")
    values |= {name: after - before for name, before, after in zip(names, clock, clock[1:], strict=False)}
    values |= {"tokens": tokens, "tokens_per_second": tokens / (clock[-1] - clock[0])}
    return values, [sample_line(p, r, s) for p, r, s in zip(asked, rollouts, scores, strict=True)]


def burn_in(actors: Actors, prompts: Sequence[TokenPrompt], ptx: Sequence[Sample]) -> None:
    """Chooses which layers are recomputed, then scores and learns from the fullest micro-batch there can be, without an update.

    Its answers are as long as they may become. Nothing is kept of it; memory for generating is not rehearsed.
    """
    config, roles, budget = actors.config, actors.roles, actors.budget
    rollouts = longest_rollouts(config, prompts)
    rollouts = rollouts[: -(-len(rollouts) // config.ppo.minibatches)]
    mixed = sorted(ptx, key=len, reverse=True)[: len(rollouts)]
    sizes = [len(r.prompt) + len(r.tokens) for r in rollouts]

    def fullest(tokens: int) -> list[Rollout]:
        return [rollouts[i] for i in plan(sizes, tokens)[0][0]]

    def rehearse(tokens: int) -> None:
        experience, _ = actors.appraise(fullest(tokens), [0.0] * len(fullest(tokens)), 0.0, tokens)
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
        chosen: dict[int, int] = {}
        for module in (roles.model, roles.critic):
            decoder = module.decoder
            budget.say(choose_recompute(decoder, module.role, batch, len(batch.tokens), actors.optimizers.values(), config.batch.memory))
            decoder.recompute = chosen[id(decoder)] = max(decoder.recompute, chosen.get(id(decoder), 0))
        budget.relieve = partial(recompute_all, [roles.model.decoder, roles.critic.decoder])
    if min(budget.room(sizes), sum(sizes)) >= TRIVIAL:
        budget.fit([*sizes, *map(len, mixed)], rehearse)


def longest_rollouts(config: PpoStageConfig, prompts: Sequence[TokenPrompt]) -> list[Rollout]:
    """An iteration's answers if all prompts were the longest and no answer stopped."""
    order, answer = np.argsort(-lengths(prompts), kind="stable")[: config.rollout.prompts], config.sampling.max_new_tokens
    asked = [prompts[int(i)].tokens for i in order for _ in range(config.rollout.samples)]
    return [Rollout(tokens, tokens[-1:] * answer, [0.0] * answer, "length") for tokens in asked]


def replay(actors: Actors, experience: Sequence[Experience], ptx: Sequence[Sample], step: int, total: int) -> dict[str, float]:
    """The updates of one iteration; metrics are averages over them."""
    config = actors.config
    ppo, seed = config.ppo, config.run.seed
    per_step = ppo.epochs * ppo.minibatches
    seen: list[dict[str, float]] = []
    for number in range(per_step):
        epoch, part = divmod(number, ppo.minibatches)
        order = step_indices(key(seed, "replay", step), epoch, len(experience), len(experience))
        first, last = (len(order) * n // ppo.minibatches for n in (part, part + 1))
        if first == last:  # the last iteration may have fewer answers than minibatches
            continue
        chosen = [experience[i] for i in order[first:last]]
        update = (step - 1) * per_step + number
        mixed = step_indices(key(seed, "ptx"), update, len(ptx), len(chosen)) if ptx else []
        values = actors.update(chosen, [ptx[i] for i in mixed], step, update, total * per_step)
        seen.append(values)
        if ppo.target_kl is not None and values["policy_kl"] > ppo.target_kl:
            break
    averages = {name: sum(v[name] for v in seen) / len(seen) for name in seen[0]}
    return averages | {"updates": float(len(seen))}


def held_out_values(actors: Actors, prompts: Sequence[TokenPrompt]) -> dict[str, float]:
    """Score, length and share of stopped answers on held-out prompts, one answer each."""
    rollouts = actors.answer(prompts, [key(actors.config.run.seed, "held-out", i) for i in range(len(prompts))])
    scores = actors.score(rollouts, prompts)
    count = len(rollouts)
    return {
        "score": sum(scores) / count,
        "response_length": sum(len(r.tokens) for r in rollouts) / count,
        "stopped": sum(r.finish == "stop" for r in rollouts) / count,
    }


def derived(config: PpoStageConfig, roles: Roles, prompts: Sequence[TokenPrompt], total: int) -> dict[str, Any]:
    """What follows from the config."""
    answers = config.rollout.prompts * config.rollout.samples
    return {
        "prompts": len(prompts),
        "longest prompt": int(lengths(prompts).max()),
        "iterations": total,
        "answers in all": total * answers,
        "answer tokens in all, at most": total * answers * config.sampling.max_new_tokens,
        "updates, at most": total * config.ppo.epochs * config.ppo.minibatches,
        "parameters trained, policy": sum(p.numel() for p in roles.policy_parameters.values()),
        "parameters trained, critic": sum(p.numel() for p in roles.critic_parameters.values()),
        "trunks in memory": roles.trunks,
    }
