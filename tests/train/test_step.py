"""One step on a model of a few numbers: what is divided by what, what stops it, and what it leaves behind."""

import math

import pytest
import torch
from torch import Tensor, nn

from trueline.config.schema import OptimizerConfig
from trueline.errors import RunError
from trueline.parallel.world import World
from trueline.train.optimizer import Optimizer, make_optimizer
from trueline.train.step import Losses, NonFinite, OutOfMemory, Totals, average, evaluate, train_step


class Kept(Optimizer):
    """Remembers the gradients it was stepped with."""

    last: dict[str, Tensor]

    def step(self, lr: float, only: str | None = None, scale: Tensor | None = None) -> None:
        self.last = {name: g.clone() if scale is None else g * scale for name, g in self.gradients().items()}
        super().step(lr, only, scale)


def weight(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def step(optimizer: Optimizer, batches, objective, count, **changes):  # type: ignore[no-untyped-def]
    settings = {"world": World(), "max_norm": 1e9, "lr": 0.1, "step": 7, "seed": 0}
    return train_step(optimizer, batches, objective, count, **(settings | changes))


def test_each_kind_of_item_has_its_own_denominator() -> None:
    """Pairs: 2 + 1 of them, each losing 3 w; tokens: 4 + 0, each losing 5 w, and half as dear: 3 w + 0.5 * 5 w."""
    w = weight(2.0)
    optimizer = Kept({"w": w}, OptimizerConfig())

    def objective(batch: tuple[int, int]) -> tuple[Losses, Totals]:
        pairs, tokens = batch
        losses = {"pairs": 3 * w.sum() * pairs}
        if tokens:
            losses["tokens"] = 0.5 * 5 * w.sum() * tokens
        return losses, {"seen": (torch.tensor(10.0 * pairs), pairs)}

    found = step(optimizer, [(2, 4), (1, 0)], objective, lambda batch: {"pairs": batch[0], "tokens": torch.tensor(batch[1])})
    assert optimizer.last["w"].item() == pytest.approx(3 + 2.5, abs=1e-15)
    assert found == pytest.approx({"loss": 2 * 5.5, "seen": 10.0, "grad_norm": 5.5})


def test_nothing_to_train_on_is_an_error() -> None:
    w = weight(1.0)
    with pytest.raises(RunError, match="step 7: there are no tokens to train on"):
        step(Optimizer({"w": w}, OptimizerConfig()), [0], lambda b: ({"tokens": w.sum()}, {}), lambda b: {"tokens": 0})


def test_gradients_are_scaled_down_to_the_norm_and_never_up() -> None:
    w = weight(0.0, 0.0)
    optimizer = Kept({"w": w}, OptimizerConfig())

    def objective(batch: float) -> tuple[Losses, Totals]:
        return {"items": batch * (3 * w[0] + 4 * w[1])}, {}

    assert step(optimizer, [2.0], objective, lambda b: {"items": 1}, max_norm=5.0)["grad_norm"] == 10.0
    torch.testing.assert_close(optimizer.last["w"], torch.tensor([3.0, 4.0], dtype=torch.float64), rtol=1e-6, atol=0)
    step(optimizer, [0.5], objective, lambda b: {"items": 1}, max_norm=5.0)
    assert optimizer.last["w"].tolist() == [1.5, 2.0]


@pytest.mark.parametrize(("bad", "said"), [(2, "loss of micro-batch 1 of 1"), (3, "gradient of w")])
def test_in_the_backward_pass_nothing_that_is_not_finite_is_used(bad: int, said: str) -> None:
    w = weight(1.0)
    optimizer = Optimizer({"w": w}, OptimizerConfig(max_norm=None, in_backward=True))

    def objective(batch: int) -> tuple[Losses, Totals]:
        return {"items": (w.sum() * math.inf) if batch == 2 else (w - 1).sqrt().sum() if batch == 3 else w.sum()}, {}

    step(optimizer, [1], objective, lambda b: {"items": 1}, max_norm=None)
    assert w.item() != 1
    w.data.fill_(1.0)
    with pytest.raises(NonFinite, match=said):
        step(optimizer, [bad], objective, lambda b: {"items": 1}, max_norm=None)
    assert w.item() == 1.0


def test_out_of_memory_after_an_update_is_the_end() -> None:
    """Before the first update the step may be tried again; after it that would be a second update."""
    first, last = weight(1.0), weight(1.0)
    optimizer = Optimizer({"first": first, "last": last}, OptimizerConfig(max_norm=None, in_backward=True))

    class Full(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            raise MemoryError

    def inner(batch: int) -> tuple[Losses, Totals]:
        return {"items": (Full.apply(first) + last).sum()}, {}

    def whole(batch: int) -> tuple[Losses, Totals]:
        return {"items": Full.apply(first + last).sum()}, {}

    with pytest.raises(OutOfMemory):
        step(optimizer, [1], whole, lambda b: {"items": 1}, max_norm=None)
    assert first.item() == last.item() == 1
    with pytest.raises(RunError, match="after the first weights were updated") as caught:
        step(optimizer, [1], inner, lambda b: {"items": 1}, max_norm=None)
    assert not isinstance(caught.value, OutOfMemory) and last.item() != 1


def test_several_micro_batches_are_summed_first() -> None:
    w = weight(1.0)
    optimizer = Kept({"w": w}, OptimizerConfig(max_norm=None, in_backward=True))
    step(optimizer, [1, 2], lambda b: ({"items": b * w.sum()}, {}), lambda b: {"items": 1}, max_norm=None)
    assert optimizer.last["w"].item() == 1.5


def test_gradients_are_gone_after_the_step() -> None:
    w = weight(1.0)
    step(Optimizer({"w": w}, OptimizerConfig()), [1], lambda b: ({"items": w.sum()}, {}), lambda b: {"items": 1})
    assert w.grad is None


def spoiled_loss(w: nn.Parameter, batch: int) -> Tensor:
    return w.sum() * (math.inf if batch == 2 else 1.0)


def spoiled_gradient(w: nn.Parameter, batch: int) -> Tensor:
    return (w[1] * 0).sqrt() if batch == 2 else w.sum()  # the loss is 0, its slope is not a number


@pytest.mark.parametrize(
    ("objective", "named", "batches"),
    [(spoiled_loss, "loss of micro-batch 2 of 3", [2]), (spoiled_gradient, "gradient of layers.w", [1, 2, 3])],
)
def test_a_bad_number_stops_before_the_update(objective, named: str, batches: list[int]) -> None:  # type: ignore[no-untyped-def]
    w, other = weight(1.0, 2.0), weight(3.0)
    optimizer = make_optimizer({"other": other, "layers.w": w}, OptimizerConfig(weight_decay=0.5))
    with pytest.raises(NonFinite, match=f"step 7: {named} is not finite; stopped before the update") as caught:
        step(optimizer, [1, 2, 3], lambda b: ({"items": objective(w, b) + other.sum()}, {}), lambda b: {"items": 1})
    assert caught.value.batches == batches and caught.value.exit_code == 1
    assert (w.tolist(), other.tolist()) == ([1.0, 2.0], [3.0]) and not optimizer.state() and w.grad is None


def test_a_bad_weight_is_named_before_the_loss_it_spoils() -> None:
    good, bad = weight(1.0), weight(math.nan)
    optimizer = make_optimizer({"good": good, "bad": bad}, OptimizerConfig())
    with pytest.raises(NonFinite, match="weight bad is not finite"):
        step(optimizer, [1], lambda b: ({"items": good.sum() + bad.sum()}, {}), lambda b: {"items": 1})
    assert good.item() == 1.0


def test_metrics_are_averaged_once() -> None:
    """Micro-batches of 1 and 3 items: the mean over four items, not the mean of two means."""
    assert average({"x": (torch.tensor(1.0 + 6.0), 1 + 3)}, World()) == {"x": 1.75}
    assert math.isnan(average({"x": (torch.tensor(0.0), 0)}, World())["x"])


def test_dropout_is_fixed_by_the_seed() -> None:
    losses = []
    for seed in (1, 1, 2):
        w = nn.Parameter(torch.ones(100, dtype=torch.float64))
        objective = lambda b, w=w: ({"items": nn.functional.dropout(w, 0.5).sum()}, {})  # noqa: E731
        losses.append(step(Optimizer({"w": w}, OptimizerConfig()), [1, 1], objective, lambda b: {"items": 1}, seed=seed)["loss"])
    assert losses[0] == losses[1] != losses[2]


def test_evaluate_is_the_same_loss_without_gradients() -> None:
    w = weight(2.0)
    objective = lambda b: ({"items": w.sum() * b}, {"twice": (2 * w.sum() * b, b)})  # noqa: E731
    assert evaluate([1, 3], objective, lambda b: {"items": b}, World()) == {"loss": 2.0, "twice": 4.0}
    assert w.grad is None
