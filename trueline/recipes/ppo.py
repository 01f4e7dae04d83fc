"""Proximal policy optimisation from a reward model or a Python function (arXiv:1707.06347, 2203.02155, details as in 1909.08593).

One iteration: 1. answer prompts with the policy as it is now; 2. score the answers as they come in; 3. appraise them (log-probabilities,
reference, values, rewards less the KL penalty, advantages); 4. replay them in minibatches, one update of policy and critic each;
5. adapt the KL coefficient.

Left out: entropy bonus, several ranks, rollouts that run beside training.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from trueline.config.load import to_yaml
from trueline.config.schema import PpoConfig, PpoStageConfig
from trueline.data.cache import TokenPrompt, items_fingerprint, lengths
from trueline.data.sample import Sample
from trueline.data.stream import key, plan, step_indices, total_samples, total_steps
from trueline.parallel.memory import peak_memory_mb
from trueline.parallel.world import start_alone
from trueline.recipes.actors import Actors, Clock, burn_in
from trueline.recipes.assemble import publish, settle_dtype
from trueline.recipes.fit import require_disk, resume, save, show_plan
from trueline.recipes.judges import open_reward, sample_line
from trueline.recipes.prepare import prompt_tokens, ptx_samples
from trueline.recipes.report import run_report
from trueline.recipes.roles import Roles, open_roles, parents
from trueline.train.budget import Budget
from trueline.train.experience import Experience, rollout_suffices
from trueline.train.losses import adaptive_kl
from trueline.train.optimizer import make_optimizer
from trueline.train.run import Run


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


def run(config: PpoStageConfig, dry_run: bool = False) -> None:
    """Trains `config.model` on the prompts in `config.data`: the policy is left in `<run.output>/model`, every answer in samples.jsonl."""
    config = settle_dtype(config)
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
    source = (config.reward, roles.policy, roles.reward, roles.reward_opened, config.run.output)
    with (
        Run("ppo", config.run, to_yaml(config), world) as run,
        open_reward(*source, budget := Budget(config.batch.max_tokens, run.say)) as reward,
    ):
        require_disk(run, total, trained, optimizers, roles.policy.decoder, config.model.adapter.kind)
        done = resume(run, order, trained, optimizers, lambda state: learning.restore(config.ppo, state))
        if run.finished(done, total):
            return
        run.begin(done, total, parents(config, roles.policy))
        for note in (*prompts.notes, *(f"data.ptx: {note}" for note in ptx.notes)):
            run.say(note)
        actors = Actors(config, roles, optimizers, reward, world, budget)
        burn_in(actors, prompts.train, ptx.train)
        actors.clock.skip()
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
    config = actors.config
    began = time.perf_counter()
    limit = None if config.run.epochs is None else total_samples(len(prompts), config.run.epochs)
    indices = step_indices(config.run.seed, step - 1, len(prompts), config.rollout.prompts, limit)
    asked = [prompts[i] for i in indices for _ in range(config.rollout.samples)]
    answers = actors.answer(asked, [key(config.run.seed, "rollout", step, j) for j in range(len(asked))], config.rollout.samples)
    rollouts, shared = answers.rollouts, actors.reward.shared
    scores = shared or actors.reward.finish(answers.prepared)
    actors.clock.lap("reward")
    suffices = rollout_suffices(step, learning.gaps.get("logprob_gap"), config.rollout.logprob_gap, config.rollout.logprob_check)
    sizes = [len(r.prompt) + len(r.tokens) for r in rollouts]
    score = partial(actors.appraise, rollouts, scores, learning.kl_coefficient, suffices=suffices)
    experience, values = actors.budget.fit(sizes, score)
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
