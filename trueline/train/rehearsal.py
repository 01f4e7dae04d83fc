"""A step's memory without the step: the real code on tensors that have shapes but no numbers. One rule: what is counted is what is run.

Torch's fake tensors take every path that real ones take, the attention kernel's too, and `Watch` counts their storages while they live.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as outside  # noqa: PLC2701
from torch.utils._pytree import tree_flatten

from trueline.config.schema import OptimizerConfig
from trueline.model.attention import sequence_ends
from trueline.model.batch import Batch
from trueline.model.heads import LanguageModel, LinearLogProbability, LinearLoss, Scorer, likelihood
from trueline.train.memory_plan import Peak
from trueline.train.optimizer import Optimizer, entries, piece_of
from trueline.train.step import each_gradient
from trueline.train.stores import PERIOD, whole_update

PROBE = 1 << 14  # weights of the parameter on which an update is watched
NEARLY = 1.005  # a peak is looked into when it is this much above the last


class Watch(TorchDispatchMode):
    """Counts the bytes of storages made inside, as long as they live; at every higher peak `look` says what they are."""

    def __init__(self, look: Callable[[dict[int, "Made"]], Peak]):
        super().__init__()
        self.live: dict[int, Made] = {}
        self.now = self.top = 0
        self.look, self.peak = look, Peak()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_flatten((args, kwargs))[0] if _in_memory(x)}
        for x in tree_flatten(result)[0]:
            if _in_memory(x) and x.untyped_storage()._cdata not in given:
                self._add(x)
        return result

    def _add(self, made: Tensor) -> None:
        storage = made.untyped_storage()
        key = storage._cdata
        if key in self.live:
            return
        self.live[key] = Made(storage.nbytes(), tuple(made.shape))
        weakref.finalize(storage, self._remove, key)
        self.now += storage.nbytes()
        if self.now > self.top:
            if self.now > NEARLY * self.peak.total:
                self.peak = self.look(self.live)
            self.top = self.now

    def _remove(self, key: int) -> None:
        if found := self.live.pop(key, None):
            self.now -= found.size

    def found(self) -> Peak:
        return self.peak.scaled(self.top)


def _in_memory(x: object) -> TypeGuard[Tensor]:
    """Not sparse tensors, whose entries are tensors of their own."""
    return isinstance(x, Tensor) and not x.is_sparse


@dataclass(frozen=True)
class Made:
    size: int
    shape: tuple[int, ...]


@contextmanager
def shapes_only(dtype: torch.dtype) -> Iterator[FakeTensorMode]:
    """Inside, new tensors have no numbers and take no memory; weights made inside are in `dtype`."""
    before = torch.get_default_dtype()
    sequence_ends.cache_clear()
    with FakeTensorMode() as mode:
        torch.set_default_dtype(dtype)
        try:
            yield mode
        finally:
            torch.set_default_dtype(before)
            sequence_ends.cache_clear()


def rehearse_step(
    module: LanguageModel | Scorer, optimizer: Optimizer, batches: Sequence[tuple[Batch, int]], summed: bool = False
) -> Peak:
    """What a step adds to weights and states that are there: forward and backward passes over the (fake) batches, and the update.

    Each batch comes with the number of its trained tokens. Two stand for more: from the second on gradients are there already. `summed`:
    the loss is made by `LanguageModel.losses`.
    """
    early = optimizer.config.in_backward and len(batches) == 1
    vocabulary, wide = module.decoder.config.vocab_size, tuple(module.decoder.embed.weight.shape)

    def look(live: dict[int, Made]) -> Peak:
        held = [p.grad for p in optimizer.parameters.values() if p.grad is not None] + list(optimizer.sums.values())
        keys = {entries(x).untyped_storage()._cdata for x in held}
        gradients = sum(made.size for key, made in live.items() if key in keys or made.shape == wide)
        logits = sum(made.size for made in live.values() if made.shape[-1:] == (vocabulary,))
        return Peak(gradients=gradients, logits=logits, activations=sum(made.size for made in live.values()) - gradients - logits)

    largest = update_bytes(optimizer) if early else 0

    def use(name: str) -> None:
        torch.empty(largest, dtype=torch.uint8)  # what an update works with, at most, and as long as it would
        optimizer.clear(name)

    with Watch(look) as watch:
        for batch, trained in batches:
            loss = _loss(module, batch, trained, summed)
            with each_gradient(optimizer, use if early else None):
                loss.backward()
            optimizer.collect()
    if early:
        return watch.found()
    found = optimizer.gradients()
    gradients = sum(entries(gradient).untyped_storage().nbytes() for gradient in found.values())
    dense = [name for name, gradient in found.items() if not gradient.is_sparse]
    update = Peak(gradients=gradients, activations=update_bytes(optimizer, dense, len(batches) > 1))
    return max(watch.found(), update, key=lambda peak: peak.total)


def rehearse_pass(module: LanguageModel | Scorer, batch: Batch, trained: int) -> Peak:
    """What a pass over `batch` (fake) without gradients adds."""
    vocabulary = module.decoder.config.vocab_size

    def look(live: dict[int, Made]) -> Peak:
        logits = sum(made.size for made in live.values() if made.shape[-1:] == (vocabulary,))
        return Peak(logits=logits, activations=sum(made.size for made in live.values()) - logits)

    with torch.no_grad(), Watch(look) as watch:
        _loss(module, batch, trained)
    return watch.found()


def _loss(module: LanguageModel | Scorer, batch: Batch, trained: int, summed: bool = False) -> Tensor:
    """The module's own forward pass; only which tokens are trained is given, for fake tensors cannot be asked."""
    if isinstance(module, Scorer):
        return batch.states(module.score(module.decoder(batch.inputs, batch.layout, module.role))[:, 0]).float().sum()
    rows = torch.arange(trained, device=batch.tokens.device)
    states = batch.states(module.decoder(batch.inputs, batch.layout, module.role), rows)  # all that is kept of the decoder's
    predictions = states, module.decoder.head.weight, batch.tokens[rows]  # type: ignore[union-attr]
    if summed:
        total: Tensor = LinearLoss.apply(*predictions, 1.0, likelihood)[0]
        return total
    picked = LinearLogProbability.apply(*predictions, 1.0)
    return picked.new_zeros(len(batch.tokens)).index_copy(0, rows, picked).sum()


def fake_batch(batch: Batch, mode: FakeTensorMode, device: torch.device) -> Batch:
    """The batch without its numbers, where the weights would be."""
    layout = replace(batch.layout, positions=mode.from_tensor(batch.layout.positions))
    kept, rows = (None if x is None else mode.from_tensor(x) for x in (batch.kept, batch.rows))
    return Batch(mode.from_tensor(batch.tokens), mode.from_tensor(batch.trained), layout, kept, rows).to(device)


def update_bytes(optimizer: Optimizer, together: Iterable[str] = (), several: bool = False) -> int:
    """What an update works with beside gradients and states: watched on a small real parameter, in proportion to the largest there is,
    or to those that are updated `together`. `several`: after several micro-batches, whose sums are float32 already."""
    parameter = max(optimizer.parameters.values(), key=lambda p: p.numel())
    at_once, dtype, stored = parameter.numel(), parameter.dtype, optimizer.store is not None
    if dtype == torch.bfloat16:
        joint = 0 if stored else sum(optimizer.halves[name].numel() for name in together if name in optimizer.halves)
        at_once = min(max(at_once, joint), piece_of(parameter, stored))
    if whole_update(optimizer.config.states, parameter) is not None:
        at_once = 0
    repeated = 2 if dtype == torch.bfloat16 and optimizer.store is None and at_once > PERIOD else 0  # thresholds
    return int(at_once * (update_bytes_per_weight(dtype, optimizer.config, several) + repeated))


def update_bytes_per_weight(dtype: torch.dtype, config: OptimizerConfig, several: bool = False) -> float:
    with outside():
        small = Optimizer({"x": nn.Parameter(torch.zeros(PROBE // 128, 128, dtype=dtype))}, config)
        for _ in range(2):  # states are made in the first
            for _ in range(2 if several else 1):
                for parameter in small.parameters.values():
                    parameter.grad = torch.zeros_like(parameter)
                small.collect()
            with Watch(lambda live: Peak(activations=sum(made.size for made in live.values()))) as watch:
                small.step(0.0)
        return watch.top / PROBE


def weight_bytes(*modules: nn.Module) -> int:
    """Bytes of all weights, those that are shared counted once."""
    return sum({id(p): p.numel() * p.element_size() for module in modules for p in module.parameters()}.values())
