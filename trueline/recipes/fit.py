"""The one training loop of the stages that learn from a fixed set of records (SFT, reward, DPO): open, resume, step, log, save, publish.

What a step trains on is a pure function of (seed, step), so a resumed run goes through the same batches to the same bits.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from trueline.config.load import to_yaml
from trueline.config.schema import StageConfig
from trueline.data.cache import items_fingerprint, lengths
from trueline.data.sample import Pair, Sample
from trueline.data.stream import key, plan, step_indices, total_samples, total_steps
from trueline.errors import UserError
from trueline.model.adapters import Kind, base_parameters
from trueline.model.batch import Batch
from trueline.model.decoder import Decoder
from trueline.parallel.world import World, start_alone
from trueline.recipes.assemble import Opened, publish
from trueline.recipes.report import run_report
from trueline.train import checkpoint
from trueline.train.budget import Budget, choose_recompute, recompute_all
from trueline.train.memory_plan import disk_still_needed
from trueline.train.optimizer import Optimizer, learning_rate, make_optimizer
from trueline.train.run import Run
from trueline.train.step import Count, Objective, accumulate, count_items, evaluate, train_step


class Item(Protocol):
    """A sample, a pair, or a pair with its reference: something with a length in tokens."""

    def __len__(self) -> int: ...


class Movable(Protocol):
    def to(self, device: torch.device | str) -> Self: ...


TRIVIAL = 4096  # tokens in a micro-batch; fewer are not worth a burn-in

T = TypeVar("T", bound=Item)
B = TypeVar("B", bound=Movable)


@dataclass(frozen=True)
class Stage:
    """What a recipe has opened: its config, the model, what of it is trained, and the records."""

    name: str
    config: StageConfig
    opened: Opened
    role: str | None
    parameters: dict[str, nn.Parameter]
    items: Sequence[Sample | Pair]
    held_out: Sequence[Sample | Pair]
    notes: list[str]
    score: Tensor | None = None  # the head of a reward model, published with it
    facts: dict[str, Any] = field(default_factory=dict)  # more lines for --dry-run


@dataclass(frozen=True)
class Task(Generic[T, B]):
    """What is done with the records: how they are packed, what is lost on them, and what the loss is divided by."""

    items: Sequence[T]
    held_out: Sequence[T]
    pack: Callable[[Sequence[T]], B]
    objective: Objective[B]
    count: Count[B]


def train(stage: Stage, module: nn.Module, build: Callable[[Path], Task[T, B]], dry_run: bool = False) -> None:
    """Trains `stage.parameters` of `module`; `build` makes the task once the run folder is held (DPO stores its reference there)."""
    config, count = stage.config, len(stage.items)
    total = total_steps(count, config.batch.sequences, config.run.steps, config.run.epochs)
    sizes = [int(lengths(items).max()) for items in (stage.items, stage.held_out) if len(items)]
    plan(sizes, config.batch.max_tokens)  # refuses what would not fit later
    if dry_run:
        show_plan(config, derived(stage, total))
        return
    world = start_alone(config.mesh)
    optimizer = make_optimizer(stage.parameters, config.optimizer, config.run.seed)
    order = {"seed": config.run.seed, "batch.sequences": config.batch.sequences, "data": items_fingerprint(stage.items)}
    order |= {"model": stage.opened.fingerprint}
    with Run(stage.name, config.run, to_yaml(config), world) as run:
        require_disk(run, total, {"model": stage.parameters}, {"model": optimizer}, stage.opened.decoder, config.model.adapter.kind)
        task = build(run.folder)  # before resuming: here the model still is as it was before training
        done = resume(run, order, {"model": stage.parameters}, {"model": optimizer})
        if run.finished(done, total):
            return
        run.begin(done, total, {str(stage.opened.path): stage.opened.fingerprint})
        for note in stage.notes:
            run.say(note)
        limit = None if config.run.epochs is None else total_samples(count, config.run.epochs)
        module.train()
        budget, say_once = Budget(config.batch.max_tokens, run.say), cache(run.say)
        if config.model.recompute == "auto":
            run.say(settle_recompute(stage, task, optimizer, world))
            budget.relieve = partial(recompute_all, [stage.opened.decoder])
        burn_in(task, optimizer, budget, config.batch.sequences, world)
        for step in range(done + 1, total + 1):
            began = time.perf_counter()
            indices = step_indices(config.run.seed, step - 1, count, config.batch.sequences, limit)
            items = [task.items[i] for i in indices]
            rate = learning_rate(step - 1, total, config.optimizer)
            settings: dict[str, Any] = {"world": world, "max_norm": config.optimizer.max_norm, "lr": rate, "step": step}
            settings |= {"seed": key(config.run.seed, "dropout", step)}

            def attempt(tokens: int, items: Sequence[T] = items, settings: dict[str, Any] = settings) -> dict[str, float]:
                batches = micro_batches(task, items, tokens, world)
                if config.optimizer.in_backward and len(batches) > 1:
                    say_once("optimizer.in_backward: a step of several micro-batches holds all gradients; raise batch.max_tokens")
                return train_step(optimizer, batches, task.objective, task.count, **settings)

            values = budget.fit([len(item) for item in items], attempt)
            tokens, seconds = sum(len(item) for item in items), time.perf_counter() - began
            run.log(step, values | {"lr": rate, "tokens": tokens, "tokens_per_second": tokens / seconds, "seconds": seconds})
            stopping = run.stopping
            if task.held_out and run.due(config.run.eval_every, step) and not stopping:
                run.log(step, held_out_values(task, module, budget.room([len(item) for item in task.held_out]), world), "eval")
            if run.due(config.run.save_every, step) or stopping:
                save(run, step, order, {"model": stage.parameters}, {"model": optimizer})
            if stopping and step < total:
                raise run.interrupted(step)
        publish(run.folder / "model", stage.opened, stage.role, config.model.adapter, stage.score)
        run_report(run.folder)


def micro_batches(task: Task[T, B], items: Sequence[T], max_tokens: int, world: World) -> list[B]:
    """This rank's packed micro-batches of `items`, on its device."""
    return list(_packed(task, items, max_tokens, world))


def _packed(task: Task[T, B], items: Sequence[T], max_tokens: int, world: World) -> Iterator[B]:
    planned = plan(lengths(items).tolist(), max_tokens, world.size)[world.rank]
    return (task.pack([items[i] for i in indices]).to(world.device) for indices in planned if indices)


def settle_recompute(stage: Stage, task: Task[T, B], optimizer: Optimizer, world: World) -> str:
    """Chooses for the fullest micro-batch that a step can have; it may be of other records than the longest, which are measured."""
    batch, items = stage.config.batch, longest_items(task.items, stage.config.batch.sequences)
    fullest = cast(Any, next(_packed(task, items, batch.max_tokens, world)))
    tokens = min(batch.max_tokens, sum(len(item) for item in items))
    packed: Batch = getattr(fullest, "batch", fullest)
    several = len(plan(lengths(items).tolist(), batch.max_tokens)[0]) > 1
    return choose_recompute(stage.opened.decoder, stage.role, packed, tokens, [optimizer], batch.memory, several)


def longest_items(items: Sequence[T], count: int) -> list[T]:
    """The longest of `items`, longest first, without making the others."""
    return [items[int(i)] for i in np.argsort(-lengths(items), kind="stable")[:count]]


def burn_in(task: Task[T, B], optimizer: Optimizer, budget: Budget, sequences: int, world: World) -> None:
    """One forward and backward pass over the fullest micro-batch a step can have, without an update: memory runs out now or not at all.

    Nothing is kept of it: every step seeds its own draws. The optimizer's moments come with the first update, and are not rehearsed.
    """
    items = longest_items(task.items, sequences)
    sizes = [len(item) for item in items]

    def rehearse(tokens: int) -> None:
        batches = list(islice(_packed(task, items, tokens, world), 2))
        whole, batches = len(batches) == 1, batches[:1]
        if all(count_items(batches, task.count, world).values()):
            drop = optimizer.clear if optimizer.config.in_backward and whole else None  # as the update will
            accumulate(optimizer, batches, task.objective, task.count, world, 0, drop)
        optimizer.clear()

    if min(budget.room(sizes), sum(sizes)) >= TRIVIAL:
        budget.fit(sizes, rehearse)


def held_out_values(task: Task[T, B], module: nn.Module, max_tokens: int, world: World) -> dict[str, float]:
    """Loss and metrics over all held-out records, without dropout."""
    module.eval()
    values = evaluate(_packed(task, task.held_out, max_tokens, world), task.objective, task.count, world)
    module.train()
    return values


def save(
    run: Run,
    step: int,
    order: dict[str, Any],
    trained: dict[str, dict[str, nn.Parameter]],
    optimizers: dict[str, Optimizer],
    extra: dict[str, Any] | None = None,
) -> None:
    """A checkpoint of every trained model, its optimizer, and what fixes the order of the data."""
    tensors: dict[str, dict[str, Tensor]] = {name: {k: p.detach() for k, p in parameters.items()} for name, parameters in trained.items()}
    tensors |= {f"{name}-optimizer": optimizer.state() for name, optimizer in optimizers.items()}
    run.save(step, tensors, {"order": order} | (extra or {}))


def resume(
    run: Run,
    order: dict[str, Any],
    trained: dict[str, dict[str, nn.Parameter]],
    optimizers: dict[str, Optimizer],
    restore: Callable[[dict[str, Any]], None] = lambda state: None,
) -> int:
    """Loads the checkpoint `run.resume` asks for into the models and optimizers; returns the step it is of, 0 for a fresh start.

    UserError when the run would go on with other data, another order or another set of trained weights than it began with.
    """
    checkpoint.remove_leftovers(run.folder)
    found, skipped = checkpoint.choose(run.folder, run.config.resume)
    for line in skipped:
        run.say(line)
    if found is None:
        return 0
    checkpoint.tidy(run.folder, found, run.config.keep)
    tensors, state = checkpoint.load(found)
    changed = [name for name, value in order.items() if state["order"].get(name) != value]
    if changed:
        raise UserError(
            f"{found.path} was made with another {' and '.join(changed)}, so the run cannot go on exactly; "
            "restore the setting, or start afresh in another run.output"
        )
    for name, parameters in trained.items():
        optimizers[name].load(tensors[f"{name}-optimizer"])
        with torch.no_grad():
            for key_, parameter in parameters.items():
                parameter.copy_(tensors[name][key_])
    restore(state)
    run.say(f"going on from {found.path}")
    return found.step


def require_disk(
    run: Run, total: int, trained: dict[str, dict[str, nn.Parameter]], optimizers: dict[str, Optimizer], decoder: Decoder, kind: Kind
) -> None:
    """RunError, before anything is computed, when the disk has no room for the checkpoints and the model that the run still has to write.

    The last checkpoint comes before the model: without this, a disk that is a model too small is found out after the last step. Logs and
    a base of random weights, which is written beside its adapter, are not counted.
    """
    held, settings = checkpoint.steps(run.folder), run.config
    done = settings.resume if isinstance(settings.resume, int) else max(held, default=0)
    if done >= total and (run.folder / "model").is_dir():
        return
    weights = {name: sum(p.nbytes for p in parameters.values()) for name, parameters in trained.items()}
    each = sum(weights.values()) + sum(optimizer.memory()[1] for optimizer in optimizers.values())
    model = sum(p.nbytes for p in base_parameters(decoder).values()) if kind == "full" else next(iter(weights.values()))
    needed = disk_still_needed(held, done, total, settings.save_every, settings.keep, each, model)
    checkpoint.require_space(run.folder, needed, "what this run will write (a lower run.keep makes it less)")


def derived(stage: Stage, total: int) -> dict[str, Any]:
    """What follows from a config: counts of records, tokens, steps and parameters."""
    decoder = stage.opened.decoder
    sizes = lengths(stage.items)
    tokens = int(sizes.sum())
    trained = sum(p.numel() for p in stage.parameters.values())
    passes = min(total * stage.config.batch.sequences / len(stage.items), stage.config.run.epochs or float("inf"))
    return {
        "records": len(stage.items),
        "held out": len(stage.held_out),
        "tokens per pass": tokens,
        "tokens in all": round(tokens * passes),
        "longest record": int(sizes.max()),
        "steps": total,
        "passes": round(passes, 3),
        "parameters": sum(p.numel() for p in decoder.parameters()),
        "parameters trained": trained,
        "device": str(decoder.embed.weight.device),
        "dtype": str(decoder.embed.weight.dtype).removeprefix("torch."),
        **stage.facts,
    }


def show_plan(config: StageConfig, facts: dict[str, Any]) -> None:
    """`--dry-run`: the resolved config, and what follows from it as comments below, so that the whole is still valid YAML."""
    print(to_yaml(config), end="")
    for name, value in facts.items():
        print(f"# {name}: {value:,}" if isinstance(value, int) else f"# {name}: {value}")
