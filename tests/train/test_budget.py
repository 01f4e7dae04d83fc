"""Running out of memory: smaller micro-batches, the same update, and a sentence when nothing helps. The allocator fails above N tokens."""

import pytest
import torch
from torch import Tensor, nn

from trueline.config.schema import OptimizerConfig
from trueline.data.stream import plan
from trueline.errors import RunError
from trueline.parallel.world import World
from trueline.train.budget import Budget
from trueline.train.optimizer import Optimizer
from trueline.train.step import Losses, Totals, train_step

LENGTHS = [9, 7, 5, 4, 3, 2]


def failure(kind: str) -> BaseException:
    cpu = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
    return {"python": MemoryError(), "accelerator": torch.OutOfMemoryError("CUDA out of memory"), "cpu": cpu}[kind]


def update(holds: int, said: list[str], kind: str = "cpu", lengths: list[int] = LENGTHS) -> Tensor:
    """The weights after a step with room for 32 tokens, on a machine that holds `holds` of them at once."""
    w = nn.Parameter(torch.arange(1.0, 4.0, dtype=torch.float64))
    optimizer = Optimizer({"w": w}, OptimizerConfig())

    def objective(batch: list[int]) -> tuple[Losses, Totals]:
        if sum(batch) > holds:
            raise failure(kind)
        return {"tokens": torch.stack([(w**n).sum() for n in batch]).sum()}, {}

    def attempt(tokens: int) -> dict[str, float]:
        batches = [[lengths[i] for i in indices] for indices in plan(lengths, tokens)[0]]
        batches.sort(key=sum)  # the failure comes after other micro-batches have left gradients
        settings = {"world": World(), "max_norm": 1e9, "lr": 0.1, "step": 1, "seed": 0}
        return train_step(optimizer, batches, objective, lambda batch: {"tokens": sum(batch)}, **settings)

    Budget(32, said.append).fit(lengths, attempt)
    return w.detach()


@pytest.mark.parametrize("kind", ["python", "accelerator", "cpu"])
def test_a_smaller_budget_makes_the_same_update(kind: str) -> None:
    said: list[str] = []
    torch.testing.assert_close(update(12, said, kind), update(100, []), rtol=1e-12, atol=0)
    assert said == [
        "out of memory with 30 tokens in a micro-batch; going on with 15 (batch.max_tokens), same loss",
        "out of memory with 15 tokens in a micro-batch; going on with 9 (batch.max_tokens), same loss",
    ]


def test_one_item_that_does_not_fit_ends_the_run() -> None:
    with pytest.raises(RunError, match=r"single item of 9 tokens .* set model\.recompute=true"):
        update(8, [])


def test_other_errors_are_not_taken_for_it() -> None:
    def attempt(tokens: int) -> float:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        Budget(32, print).fit(LENGTHS, attempt)


def test_the_smaller_budget_stays() -> None:
    budget = Budget(8, print)
    assert budget.room([3]) == 8 and budget.room([9]) == 9  # an item is never cut
