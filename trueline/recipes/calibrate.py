"""Some seconds of a run's real work, for `trueline plan`: the fullest micro-batch, measured. One rule: nothing is written."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch.profiler import ProfilerActivity, profile

from trueline.config.schema import DpoStageConfig, PpoStageConfig, RewardConfig, StageConfig
from trueline.data.stream import plan
from trueline.model.batch import pack, pack_pairs
from trueline.model.heads import LanguageModel
from trueline.parallel.world import World, find_device
from trueline.recipes import dpo, reward, sft
from trueline.recipes.actors import Actors
from trueline.recipes.assemble import forget_found, make_scorer, open_model, speaking, train_role
from trueline.recipes.generate import sampling_of
from trueline.recipes.judges import Reward, score_samples
from trueline.recipes.roles import open_roles
from trueline.rollout.engine import Engine
from trueline.rollout.packed import PAYS
from trueline.rollout.sampling import Rollout
from trueline.train.budget import Budget
from trueline.train.optimizer import make_optimizer
from trueline.train.step import evaluate, train_step

SECONDS = 2.0  # work is repeated until it took so long
NEW_TOKENS = 16  # by which the two answers of PPO's calibration differ


@dataclass(frozen=True)
class Measured:
    """Work done once: its seconds, and the most bytes that it had beside what was there before."""

    seconds: float
    added: int


def measure(work: Callable[[], object]) -> Measured:
    """The median of some rounds after a first one, in which states are made; then one more whose memory is watched."""
    work()
    times: list[float] = []
    while not times or sum(times) < SECONDS and len(times) < 9:
        began = time.perf_counter()
        work()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - began)
    with watched(find_device()) as added:
        work()
    return Measured(sorted(times)[len(times) // 2], added[0])


@contextmanager
def watched(device: torch.device) -> Iterator[list[int]]:
    """The most bytes torch's allocator gave out inside beside what was there, once it is left: every one, also inside of operators."""
    found = [0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found[0] = torch.cuda.max_memory_allocated(device) - before
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells standard output when it starts
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield found
    events = cast(Any, profiler.profiler).kineto_results.events()
    now = 0
    for _, size in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        now += size
        found[0] = max(found[0], now)


def calibrate_fit(config: StageConfig, groups: Sequence[Sequence[Any]], recompute: int, reads: bool) -> tuple[Measured, float]:
    """A step of SFT, reward or DPO in which each group of items is a micro-batch, and if it `reads`, the seconds of doing the same without
    gradients."""
    opened = open_model(config.model, config.run.seed, with_head=not isinstance(config, RewardConfig))
    role, parameters = train_role(opened, config.model.adapter, "policy", config.run.seed)
    forget_found(opened)
    opened.decoder.recompute = recompute
    packing: Callable[[Sequence[Any]], Any] = pack_pairs
    objective: Any
    count: Any
    if isinstance(config, RewardConfig):
        scorer = make_scorer(opened.decoder, role, opened.score)
        parameters["score.weight"] = scorer.score.get_parameter("weight")
        objective, count = reward.ranking_objective(scorer, config.ranking), reward.count_pairs
    elif isinstance(config, DpoStageConfig):
        groups = [[dpo.Judged(pair, torch.zeros(2)) for pair in group] for group in groups]
        packing, count = dpo.pack_judged, partial(dpo.count_items, dpo=config.dpo)
        objective = dpo.dpo_objective(LanguageModel(speaking(opened).decoder, role), config.dpo)
    else:
        packing, objective, count = pack, sft.sft_objective(LanguageModel(speaking(opened).decoder, role)), sft.count_tokens
    world = World(device=find_device())
    batches = [packing(group).to(world.device) for group in groups]
    optimizer = make_optimizer(parameters, config.optimizer)
    opened.decoder.train()
    max_norm = config.optimizer.max_norm
    step = measure(lambda: train_step(optimizer, batches, objective, count, world=world, max_norm=max_norm, lr=0.0, step=1, seed=0))
    opened.decoder.eval()
    return step, measure(lambda: evaluate(batches, objective, count, world)).seconds if reads else 0.0


def calibrate_ppo(config: PpoStageConfig, rollouts: Sequence[Rollout], recompute: Mapping[str, int]) -> dict[str, Measured]:
    """A few tokens of answers to the longest prompts, then scores and updates of the fullest micro-batches."""
    roles = open_roles(config)
    for module, layers in ((roles.model, recompute["policy"]), (roles.critic, recompute["critic"])):
        module.decoder.recompute = layers
    parameters = {"policy": roles.policy_parameters, "critic": roles.critic_parameters}
    settings = {"policy": config.optimizer, "critic": config.critic.optimizer or config.optimizer}
    optimizers = {name: make_optimizer(trained, settings[name]) for name, trained in parameters.items()}
    budget = Budget(config.batch.max_tokens, print)
    nothing = Reward(lambda rollouts, prompts: [], lambda prepared: [])
    actors = Actors(config, roles, optimizers, nothing, World(device=find_device()), budget)
    sizes = [len(r.prompt) + len(r.tokens) for r in rollouts]
    scored = [rollouts[i] for i in plan(sizes, config.batch.max_tokens)[0][0]]
    learned = scored[: -(-len(rollouts) // config.ppo.minibatches)]
    experience, _ = actors.appraise(learned, [0.0] * len(learned), 0.0, config.batch.max_tokens)

    def score() -> None:
        found, _ = actors.appraise(scored, [0.0] * len(scored), 0.0, config.batch.max_tokens)
        if roles.reward is not None:
            score_samples(roles.reward, [e.sample for e in found], budget)

    def generate(tokens: int) -> None:
        rollout = config.rollout
        engine = Engine(roles.model, rollout.running, rollout.memory_bytes, rollout.packed)
        sampling = replace(sampling_of(config.sampling, roles.policy), max_new_tokens=tokens, stop=frozenset())
        running = rollouts[: config.rollout.running]
        with engine.hold():
            engine.generate([r.prompt for r in running], sampling, range(len(running)))

    found = {"update": measure(lambda: actors.update(experience, [], 1, 0, 1)), "score": measure(score)}
    first = first_tokens(config)
    return found | {"read": measure(lambda: generate(first)), "generate": measure(lambda: generate(first + NEW_TOKENS))}


def first_tokens(config: PpoStageConfig) -> int:
    """Tokens of the shorter answers that are measured, which are made as the run's are: packing, or merging, is in both."""
    return PAYS if config.sampling.max_new_tokens >= PAYS else 1
