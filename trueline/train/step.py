"""One optimizer step, the same for every stage. One rule: losses are sums, divided once by how many items there are on all ranks.

Any split of a step's samples into micro-batches and ranks therefore gives the same gradient.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from trueline.errors import RunError, out_of_memory
from trueline.parallel.world import World, all_sum
from trueline.train.optimizer import Optimizer, entries, norm_parts

B = TypeVar("B")
Totals = dict[str, tuple[Tensor, Tensor | int]]
"""Metric -> (sum, count); averaged once, over every micro-batch and rank."""

Losses = dict[str, Tensor]
"""What is counted ("pairs", "tokens") -> loss summed over it; each is divided by the global number of such items, then they are added."""

Objective = Callable[[B], tuple[Losses, Totals]]
Count = Callable[[B], Mapping[str, int | Tensor]]
"""Micro-batch -> how many items of each kind it holds, before anything is computed."""


class NonFinite(RunError):
    """The step was stopped before the update, which would have ruined the weights. `batches` are the micro-batches to look into."""

    def __init__(self, step: int, tensor: str, batches: Sequence[object]):
        self.step, self.tensor, self.batches = step, tensor, list(batches)
        super().__init__(
            f"step {step}: {tensor} is not finite; stopped before the update, the last checkpoint is sound. "
            "Lower optimizer.lr, or look at the data of this step"
        )


class OutOfMemory(RunError):
    """Memory ran out before the update: nothing has changed, and the same step may be tried again in smaller micro-batches."""


def train_step(
    optimizer: Optimizer,
    batches: Sequence[B],
    objective: Objective[B],
    count: Count[B],
    *,
    world: World,
    max_norm: float | None,
    lr: float,
    step: int,
    seed: int,
) -> dict[str, float]:
    """One update at learning rate `lr` from this rank's micro-batches; returns the mean loss, the metrics and the gradient's norm.

    Every kind of item an objective returns a loss for must be counted by `count`, and kinds and metrics must be the same on every rank.
    Gradients are scaled down to the global norm `max_norm`. With `optimizer.in_backward`, one rank and one micro-batch, each weight is
    updated within the backward pass (`_update_in_backward`), to the same bits. `seed` fixes whatever the model draws
    (dropout), so a resumed run draws it too.
    Raises NonFinite before the update, naming the first bad tensor, and OutOfMemory.
    """
    torch.manual_seed(seed + world.rank)
    if optimizer.config.in_backward and max_norm is None and world.size == len(batches) == 1:
        return _update_in_backward(optimizer, batches, objective, count, world, lr, step)
    losses, totals = accumulate(optimizer, batches, objective, count, world, step)
    try:
        return _update(optimizer, batches, losses, totals, world, max_norm, lr, step)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
    # not OutOfMemory: weights may have been written, and smaller micro-batches, of which nothing is left here, would make no room either
    raise RunError(
        f"step {step}: out of memory in the update of the weights; the last checkpoint is sound. "
        "Train an adapter (model.adapter.kind=lora), or set optimizer.states=bfloat16 or int8"
    )


def _update(
    optimizer: Optimizer,
    batches: Sequence[B],
    losses: list[Tensor],
    totals: Totals,
    world: World,
    max_norm: float | None,
    lr: float,
    step: int,
) -> dict[str, float]:
    """The update by the gradients that were summed; returns what `train_step` does."""
    gradients = optimizer.gradients(all_of_them=world.size > 1)
    for gradient in gradients.values() if world.size > 1 else ():
        gradient.copy_(all_sum(world, gradient))  # every rank holds all of the weights
    norm = get_total_norm([norm_parts(gradient) for gradient in gradients.values()])
    totals["loss"] = (torch.stack(losses).double().sum(), 1 if world.first else 0)  # already divided: summed over ranks, not averaged
    result = average(totals, world) | {"grad_norm": float(norm)}
    if not (math.isfinite(result["loss"]) and math.isfinite(result["grad_norm"])):
        optimizer.clear()
        raise _diagnose(optimizer, batches, losses, gradients, step)
    shrink = (math.inf if max_norm is None else max_norm) / (norm + 1e-6)  # as torch.nn.utils.clip_grad_norm_
    del gradients  # the step drops them
    optimizer.step(lr, scale=shrink if shrink < 1 else None)
    return result


def _update_in_backward(
    optimizer: Optimizer, batches: Sequence[B], objective: Objective[B], count: Count[B], world: World, lr: float, step: int
) -> dict[str, float]:
    """The step of one micro-batch whose gradients are not scaled: each is used and dropped as soon as it is made.

    What does not fit or is not finite after the first update ends the run: the step cannot be tried again. No checkpoint is made of it.
    """
    norms: dict[str, Tensor] = {}

    def update(name: str) -> None:
        gradient = optimizer.gradient(name)
        assert gradient is not None
        norm = torch.linalg.vector_norm(norm_parts(gradient))
        if not norm.isfinite():
            raise NonFinite(step, f"gradient of {name}", batches)
        norms[name] = norm
        del gradient
        optimizer.step(lr, name)

    try:
        losses, totals = accumulate(optimizer, batches, objective, count, world, step, update)
    except OutOfMemory:
        if not norms:
            raise
        raise RunError(
            f"step {step}: out of memory after the first weights were updated; the last checkpoint is sound. "
            "Lower batch.sequences or data.max_length, or set model.recompute=true"
        ) from None
    totals["loss"] = (losses[0].double(), 1)
    norm = torch.linalg.vector_norm(torch.stack([norms[name] for name in optimizer.parameters if name in norms]))
    return average(totals, world) | {"grad_norm": float(norm)}


@contextmanager
def each_gradient(optimizer: Optimizer, use: Callable[[str], None] | None) -> Iterator[None]:
    """While it lasts, `use` is called with a parameter's name as soon as its gradient is whole."""

    def hook(name: str) -> Callable[[Tensor], None]:
        def collected(parameter: Tensor) -> None:
            assert use is not None
            optimizer.collect(name)
            use(name)

        return collected

    found = () if use is None else optimizer.parameters.items()
    handles = [parameter.register_post_accumulate_grad_hook(hook(name)) for name, parameter in found]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def accumulate(
    optimizer: Optimizer,
    batches: Sequence[B],
    objective: Objective[B],
    count: Count[B],
    world: World,
    step: int,
    use: Callable[[str], None] | None = None,
) -> tuple[list[Tensor], Totals]:
    """Sums the gradients of all micro-batches; returns each one's part of the loss, and the metrics. OutOfMemory drops what was summed.

    `use` is called with a parameter's name as soon as a micro-batch's gradient of it is whole, if that micro-batch's loss is finite.
    """
    items = count_items(batches, count, world)
    losses: list[Tensor] = []
    totals: Totals = {}
    try:
        for batch in batches:
            sums, metrics = objective(batch)
            loss = sum_loss(sums, items, step)
            if use is not None and not loss.isfinite():
                raise _diagnose(optimizer, batches, [loss], {}, step)
            with each_gradient(optimizer, use):
                loss.backward()
            optimizer.collect()
            losses.append(loss.detach())
            _add(totals, metrics)
        return losses, totals
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
    # raised out here, where the failed step's activations are no longer held by the error's traceback
    sums, loss = {}, torch.zeros(())
    optimizer.clear()
    raise OutOfMemory(f"step {step}: out of memory")


@torch.no_grad()
def evaluate(batches: Iterable[B], objective: Objective[B], count: Count[B], world: World) -> dict[str, float]:
    """The same loss and metrics over all of `batches`, without gradients or dropout's draws (the caller puts its modules in eval mode).

    Each batch is asked for when the one before it is done with.
    """
    items: dict[str, int] = {}
    losses: Losses = {}
    totals: Totals = {}
    for batch in batches:
        sums, metrics = objective(batch)
        items = _counted(items, count(batch))
        losses |= {name: losses.get(name, 0) + total.double() for name, total in sums.items()}
        _add(totals, metrics)
    totals["loss"] = (sum_loss(losses, _everywhere(items, world), 0), 1 if world.first else 0)
    return average(totals, world)


def count_items(batches: Sequence[B], count: Count[B], world: World) -> dict[str, int]:
    """How many items of each kind the micro-batches of all ranks hold together."""
    found: dict[str, int] = {}
    for batch in batches:
        found = _counted(found, count(batch))
    return _everywhere(found, world)


def _counted(found: dict[str, int], more: Mapping[str, int | Tensor]) -> dict[str, int]:
    return found | {name: found.get(name, 0) + int(n) for name, n in more.items()}  # a batch may lack a kind that others hold


def _everywhere(found: dict[str, int], world: World) -> dict[str, int]:
    names = sorted(found)
    summed = all_sum(world, torch.tensor([found[name] for name in names], dtype=torch.int64))
    return {name: int(n) for name, n in zip(names, summed.tolist(), strict=True)}


def sum_loss(sums: Losses, items: Mapping[str, int], step: int) -> Tensor:
    """The part of the step's loss that these sums make: each over its global number of items."""
    for name in sums:
        if not items[name]:
            raise RunError(f"step {step}: there are no {name} to train on in the whole batch")
    return torch.stack([total / items[name] for name, total in sums.items()]).sum()


def average(totals: Totals, world: World) -> dict[str, float]:
    """Sums over counts, over all ranks; nan where nothing was counted."""
    names = sorted(totals)
    flat = torch.stack([torch.as_tensor(x, device=world.device).detach().double() for name in names for x in totals[name]])
    pairs = all_sum(world, flat).view(-1, 2).tolist()
    return {name: total / n if n else math.nan for name, (total, n) in zip(names, pairs, strict=True)}


def _add(totals: Totals, metrics: Totals) -> None:
    for name, (total, n) in metrics.items():
        total = total.detach().double()  # sums of many float32 values
        if name in totals:
            before, count = totals[name]
            total, n = before + total, count + n
        totals[name] = (total, n)


def _diagnose(
    optimizer: Optimizer, batches: Sequence[B], losses: Sequence[Tensor], gradients: Mapping[str, Tensor], step: int
) -> NonFinite:
    """Names the first bad tensor in the order in which one spoils the next: weights, loss, gradients."""
    for name, parameter in optimizer.parameters.items():
        if not parameter.isfinite().all():
            return NonFinite(step, f"weight {name}", batches)
    for i, loss in enumerate(losses):
        if not loss.isfinite():
            return NonFinite(step, f"loss of micro-batch {i + 1} of {len(batches)}", [batches[i]])
    for name, gradient in gradients.items():
        if not entries(gradient).isfinite().all():
            return NonFinite(step, f"gradient of {name}", batches)
    return NonFinite(step, "gradient norm (its parts are finite)" if gradients else "loss of another rank", batches)
