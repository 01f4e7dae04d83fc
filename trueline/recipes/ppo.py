"""Proximal policy optimisation from a reward model or a Python function (arXiv:1707.06347, 2203.02155, details as in 1909.08593).

One iteration: 1. answer prompts with the policy as it is now; 2. score the answers as they come in; 3. appraise them (log-probabilities,
reference, values, rewards less the KL penalty, advantages); 4. replay them in minibatches, one update of policy and critic each;
5. adapt the KL coefficient.

Left out: entropy bonus, several ranks, rollouts that run beside training.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from trueline.config.load import to_yaml
from trueline.config.schema import OptimizerConfig, PpoConfig, PpoStageConfig
from trueline.data.cache import TokenPrompt, items_fingerprint, lengths
from trueline.data.sample import Sample
from trueline.data.stream import key, plan, step_indices, total_samples, total_steps
from trueline.model.batch import Batch, pack
from trueline.model.heads import LanguageModel, Scorer, values_before
from trueline.parallel.world import World, peak_memory_mb, start_alone
from trueline.recipes.assemble import publish
from trueline.recipes.fit import resume, save, show_plan
from trueline.recipes.generate import sampling_of
from trueline.recipes.judges import Reward, open_reward, sample_line
from trueline.recipes.prepare import prompt_tokens, ptx_samples
from trueline.recipes.report import run_report
from trueline.recipes.roles import Roles, open_roles, parents
from trueline.rollout.engine import Engine
from trueline.rollout.sampling import Rollout
from trueline.train.beside import Beside
from trueline.train.experience import Experience, ExperienceBatch, appraise, pack_experience, rollout_suffices
from trueline.train.losses import adaptive_kl, kl, ppo_clipped, ppo_policy_loss, ppo_value_loss, sft_loss
from trueline.train.optimizer import Optimizer, learning_rate, make_optimizer
from trueline.train.run import Run
from trueline.train.step import Count, Losses, Objective, Totals, train_step


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
    gaps: dict[str, float] = field(default_factory=dict)  # of the rollout's log-probabilities from training's, as measured last

    def restore(self, ppo: PpoConfig, state: Mapping[str, Any]) -> None:
        """A coefficient that does not adapt is the config's."""
        self.gaps = dict(state.get("gaps", {}))
        if ppo.kl_target is not None:
            self.kl_coefficient = float(state["kl_coefficient"])

    def adapt(self, ppo: PpoConfig, drift: float, answers: int) -> None:
        """`drift`: KL to the reference, in nats per answer."""
        if ppo.kl_target is not None:
            self.kl_coefficient = adaptive_kl(self.kl_coefficient, drift, ppo.kl_target, ppo.kl_horizon, answers)


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
    clock: Clock = field(default_factory=Clock)

    def answer(self, prompts: Sequence[TokenPrompt], seeds: Sequence[int], samples: int = 1) -> Answers:
        """One answer to each prompt by the policy as it is now: the engine runs the very weights that are trained.

        With `reward.overlap` the reward works on the answers to a prompt (`samples` neighbours) once they have ended, while others go on.
        """
        config, opened = self.config, self.roles.policy
        found: dict[int, Rollout] = {}

        def work(indices: list[int]) -> list[tuple[Rollout, Any]]:
            rollouts = [replace(found[i], text=opened.text().decode(found[i].tokens)) for i in indices]
            return list(zip(rollouts, self.reward.prepare(rollouts, [prompts[i] for i in indices]), strict=True))

        rollout = config.rollout
        engine = Engine(self.roles.model, rollout.running, None if rollout.memory is None else int(rollout.memory * 2**30), rollout.packed)
        self.clock.lap("idle")
        with Beside(work, len(prompts), samples if config.reward.overlap else len(prompts)) as beside:

            def finished(i: int, rollout: Rollout) -> None:
                found[i] = rollout
                beside.done(i)

            with engine.hold():
                engine.generate([p.tokens for p in prompts], sampling_of(config.sampling, opened), seeds, finished)
            self.clock.lap("generate")
            rollouts, prepared = zip(*beside.results(), strict=True)
        waited = time.perf_counter() - self.clock.last
        self.clock.lap("reward")
        return Answers(list(rollouts), list(prepared), max(beside.seconds - waited, 0.0))

    def update(self, chosen: Sequence[Experience], mixed: Sequence[Sample], step: int, number: int, total: int) -> dict[str, float]:
        """Update `number` of `total`, of the policy and then of the critic."""
        config = self.config
        place = self.world.device
        groups = [[chosen[i] for i in indices] for indices in plan([len(e) for e in chosen], config.batch.max_tokens)[0] if indices]
        packed = [pack_experience(group).to(place) for group in groups]
        policy = [PolicyBatch(e) for e in packed]
        for indices in plan([len(s) for s in mixed], config.batch.max_tokens)[0] if mixed else []:
            policy.append(PolicyBatch(None, pack([mixed[i] for i in indices]).to(place)))
        objective = policy_objective(self.roles.model, config.ppo, config.sampling.temperature)
        values = self._step("policy", config.optimizer, policy, objective, count_policy, step, number, total)
        settings = config.critic.optimizer or config.optimizer
        critic = self._step("critic", settings, packed, value_objective(self.roles.critic, config.ppo), count_values, step, number, total)
        return values | {"value_loss": critic["loss"]} | {f"critic_{name}": critic[name] for name in ("grad_norm", "lr")}

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
    source = (config.reward, roles.policy, roles.reward, roles.reward_opened, config.run.output, config.batch.max_tokens)
    with Run("ppo", config.run, to_yaml(config), world) as run, open_reward(*source) as reward:
        done = resume(run, order, trained, optimizers, lambda state: learning.restore(config.ppo, state))
        if run.finished(done, total):
            return
        run.begin(done, total, parents(config, roles.policy))
        for note in (*prompts.notes, *(f"data.ptx: {note}" for note in ptx.notes)):
            run.say(note)
        actors = Actors(config, roles, optimizers, reward, world)
        for step in range(done + 1, total + 1):
            values, lines = iterate(actors, learning, prompts.train, ptx.train, step, total)
            run.log(step, values)
            run.samples(step, lines)
            stopping = run.stopping
            if prompts.held_out and run.due(config.run.eval_every, step) and not stopping:
                actors.clock.lap("idle")
                run.log(step, held_out_values(actors, prompts.held_out), "eval")
                actors.clock.skip()
            if run.due(config.run.save_every, step) or stopping:
                actors.clock.lap("idle")
                save(run, step, order, trained, optimizers, asdict(learning))
                actors.clock.lap("save")
            if stopping and step < total:
                raise run.interrupted(step)
        publish(run.folder / "model", roles.policy, roles.model.role, config.model.adapter)
        run_report(run.folder)


def iterate(
    actors: Actors, learning: Learning, prompts: Sequence[TokenPrompt], ptx: Sequence[Sample], step: int, total: int
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """One iteration; returns its metrics, and a line for each answer."""
    config, roles = actors.config, actors.roles
    began = time.perf_counter()
    limit = None if config.run.epochs is None else total_samples(len(prompts), config.run.epochs)
    indices = step_indices(config.run.seed, step - 1, len(prompts), config.rollout.prompts, limit)
    asked = [prompts[i] for i in indices for _ in range(config.rollout.samples)]
    answers = actors.answer(asked, [key(config.run.seed, "rollout", step, j) for j in range(len(asked))], config.rollout.samples)
    rollouts, shared = answers.rollouts, actors.reward.shared
    scores = shared or actors.reward.finish(answers.prepared)
    actors.clock.lap("reward")
    suffices = rollout_suffices(step, learning.gaps.get("logprob_gap"), config.rollout.logprob_gap, config.rollout.logprob_check)
    experience, values = appraise(
        rollouts,
        scores,
        roles.model,
        roles.reference,
        roles.critic,
        ppo=config.ppo,
        kl_coefficient=learning.kl_coefficient,
        temperature=config.sampling.temperature,
        max_tokens=config.batch.max_tokens,
        world=actors.world,
        rollout_logprobs_suffice=suffices,
    )
    if not suffices:
        learning.gaps = {name: values[name] for name in ("logprob_gap", "logprob_gap_max")}
    values |= learning.gaps | {"rollout_logprobs": float(suffices)}
    actors.clock.lap("score")
    values |= replay(actors, experience, ptx, step, total) | {"kl_coefficient": learning.kl_coefficient}
    actors.clock.lap("update")
    learning.adapt(config.ppo, values["kl"], len(rollouts))
    tokens = sum(len(e) for e in experience)
    values |= actors.clock.read() | {"reward_overlapped_seconds": answers.overlapped, "peak_memory_mb": peak_memory_mb(actors.world.device)}
    values |= {"tokens": tokens, "tokens_per_second": tokens / (time.perf_counter() - began)}
    return values, [sample_line(p, r, e.score) for p, r, e in zip(asked, rollouts, experience, strict=True)]


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
    actors = replace(actors, clock=Clock())
    answers = actors.answer(prompts, [key(actors.config.run.seed, "held-out", i) for i in range(len(prompts))])
    rollouts, scores = answers.rollouts, actors.reward.finish(answers.prepared)
    count = len(rollouts)
    return {
        "score": sum(scores) / count,
        "response_length": sum(len(r.tokens) for r in rollouts) / count,
        "stopped": sum(r.finish == "stop" for r in rollouts) / count,
        "seconds": sum(actors.clock.read().values()),
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
