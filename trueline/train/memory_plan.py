"""What a run takes, in numbers. One rule: numbers in, numbers out; whoever knows a model or a disk asks it and passes on what it said."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from trueline.rollout.memory import AHEAD, whole


@dataclass(frozen=True)
class Peak:
    """Bytes on one device at the moment when they are most."""

    weights: int = 0
    gradients: int = 0
    states: int = 0
    activations: int = 0
    logits: int = 0
    keys_values: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    def __add__(self, other: "Peak") -> "Peak":
        return Peak(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def scaled(self, measured: int) -> "Peak":
        """With `measured` bytes in all: what a measurement adds or takes is in the activations, for the rest is counted exactly."""
        return replace(self, activations=max(self.activations + measured - self.total, 0))


def highest(phases: dict[str, Peak]) -> tuple[str, Peak]:
    """The phase of a step that takes most."""
    return max(phases.items(), key=lambda phase: phase[1].total)


def key_value_bytes(layers: int, heads: int, head_dim: int, itemsize: int, rows: int, prompt: int, longest: int) -> int:
    """The most that key/value memory takes while `rows` answers grow from `prompt` to `longest` tokens.

    It grows by half of what it has, and while it does, the old of keys or values is held beside the new (`rollout/memory.py`).

    >>> key_value_bytes(layers=1, heads=1, head_dim=1, itemsize=1, rows=1, prompt=100, longest=150)
    320
    """
    column = layers * heads * head_dim * itemsize * rows
    columns, most = 0, 0
    for needed in range(prompt, longest + 1):
        if needed > columns:
            grown = whole(max(needed, min(needed + max(needed // 2, AHEAD), longest)))
            most, columns = max(most, columns + 2 * grown), grown
    return most * column


def times(every: int, total: int) -> int:
    """How often in `total` steps something is done that is due every so many (0: at the end only), and always after the last."""
    return -(-total // every) if every else 1


def disk_bytes(checkpoint: int, total: int, save_every: int, keep: int, model: int, cache: int, logs: int) -> dict[str, int]:
    """What the run leaves (`kept`), and the most it takes on the way (`most`); the last checkpoints stay beside the finished model."""
    left = min(times(save_every, total), keep) * checkpoint
    parts = {"checkpoint": checkpoint, "checkpoints": left, "model": model, "cache": cache, "logs": logs}
    most = disk_still_needed((), 0, total, save_every, keep, checkpoint, model)
    return parts | {"kept": left + model + cache + logs, "most": most + cache + logs}


def disk_still_needed(held: Sequence[int], done: int, total: int, save_every: int, keep: int, checkpoint: int, model: int) -> int:
    """Most bytes that a run adds to its folder on the way from step `done` to `total`, where checkpoints of the steps `held` are.

    Each checkpoint is whole before older ones go, and those of later steps with them; the model is written at the end, beside an older one.

    >>> [disk_still_needed(held, done, 100, 30, 2, 10, 3) for held, done in (([], 0), ([30, 60], 60), ([90, 100], 100), ([30, 60], 30))]
    [30, 10, 3, 10]
    """
    kept, most = sorted(held), 0
    due = range(done // save_every * save_every + save_every, total, save_every) if save_every else range(0)
    for step in (*due, *([total] if done < total else [])):
        kept = [other for other in kept if other != step]
        most = max(most, len(kept) + 1 - len(held))
        kept = [*(other for other in kept if other < step), step][-keep:]
    return max(most * checkpoint, (len(kept) - len(held)) * checkpoint + model)


def fullest_of(plans: Sequence[Sequence[Sequence[int]]], lengths: Sequence[int]) -> tuple[list[list[int]], float]:
    """Of the micro-batches of some steps: the fullest that comes first in its step, then the fullest that comes later, when gradients
    are there already (if any step has several); and how many micro-batches a step has on average.

    >>> fullest_of([[[0, 1], [2]], [[3]]], lengths=[5, 5, 4, 11])
    ([[3], [2]], 1.5)
    """
    places = [[parts[0] for parts in plans], [part for parts in plans for part in parts[1:] if part]]
    fullest = [list(max(parts, key=lambda part: sum(lengths[i] for i in part))) for parts in places if parts]
    return fullest, sum(len(parts) for parts in places) / len(plans)
