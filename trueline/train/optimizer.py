"""AdamW and its learning rate. One rule: the arithmetic is float32 (float64 for float64 weights), whatever the model's dtype."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from trueline.config.schema import OptimizerConfig
from trueline.data.stream import key
from trueline.errors import UserError
from trueline.model.rounding import draws
from trueline.parallel.memory import zeros_on_demand
from trueline.train.stores import BLOCK, LAUNCHED_PIECE, PIECE, STORES, join, part, thresholds_from, whole_update

FUSED = ("cpu", "cuda")  # device types on which one kernel does the whole update, element by element, so the same bits every time
CACHED = 1 << 20  # weights updated at once: they stay in a CPU's cache, and waking its threads for each piece costs little
LAUNCHED = 1 << 26  # the same on an accelerator, where a piece costs some launches
ON_DEMAND = 1 << 25  # bytes of moments from which rows that never have a gradient are worth saving

Slice = tuple[str, int, int]
"""A parameter's name, and the flat range of its weights that is updated."""


class Optimizer:
    """AdamW (arXiv:1711.05101) over named parameters.

    The gradients of a bfloat16 parameter are summed in float32; the only one of a step stays as it is until the update, which widens it
    a piece at a time. With `optimizer.states: float32` the update happens on a float32 number for each weight: the parameter is one of
    its two bfloat16 neighbours (`stores.part`), and its lower bits are kept, 4 bytes in all and not 6. With other states, for which all
    parameters must be bfloat16, `stores.STORES` says what is kept.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], config: OptimizerConfig, seed: int = 0):
        if not named:
            raise ValueError("nothing to train")
        self.parameters = dict(named)
        self.config, self.seed = config, seed
        self.store = None if config.states == "float32" else STORES[config.states]
        if self.store is not None:
            _require_bfloat16(self.parameters, config)
        self.halves = {name: p for name, p in self.parameters.items() if p.dtype == torch.bfloat16}
        for parameter in self.halves.values():
            parameter.data = parameter.data.contiguous()  # rounded and updated in flat pieces
        self.numbers = {name: i for i, name in enumerate(self.parameters)}
        self.sums: dict[str, Tensor] = {}  # gradients of `halves`: 16 bits of one micro-batch's, float32 of several and of sparse ones
        self.fused = all(p.device.type in FUSED for p in self.parameters.values())
        self.kept: dict[str, dict[str, Tensor]] = {}  # name -> step and what the update needs of the ones before, from the first on
        self.updates: dict[str, int] = {}  # how many each has had: the `step` of `kept`, known without asking the device
        self.begun: dict[str, Tensor] = {}  # where gradients are sparse: the rows that had one

    @torch.no_grad()
    def collect(self, only: str | None = None) -> None:
        """Sums 16-bit gradients in float32 from the second on: to be called after each backward, for in 16 bits they would lose bits.

        Sparse ones are brought to one entry a row, so that they stay smaller than dense ones; a store needs dense ones.
        """
        for name in self.parameters if only is None else (only,):
            parameter = self.parameters[name]
            if parameter.grad is not None and name in self.halves:
                gradient = parameter.grad.to(torch.float32) if parameter.grad.is_sparse else parameter.grad
                gradient = gradient if self.store is None else gradient.to_dense()
                self.sums[name] = joined(self.sums[name].to(torch.float32).add_(gradient) if name in self.sums else gradient)
                parameter.grad = None
            elif parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = joined(parameter.grad)

    def gradients(self, names: Iterable[str] | None = None, all_of_them: bool = False) -> dict[str, Tensor]:
        """Gradients by name of all parameters (or `names`) that have one; with `all_of_them` dense ones of at least float32, zeros for
        the others."""
        if all_of_them:
            for name, parameter in self.parameters.items():
                found, dtype = self.gradient(name), torch.promote_types(parameter.dtype, torch.float32)
                whole = torch.zeros_like(parameter, dtype=dtype) if found is None else found.to(dtype)
                if name in self.halves:
                    self.sums[name] = whole.to_dense()
                else:
                    parameter.grad = whole.to_dense()
        every = {name: self.gradient(name) for name in names or self.parameters}
        return {name: gradient for name, gradient in every.items() if gradient is not None}

    def gradient(self, name: str) -> Tensor | None:
        return self.sums.get(name) if name in self.halves else self.parameters[name].grad

    @torch.no_grad()
    def step(self, lr: float, only: str | None = None, scale: Tensor | None = None) -> None:
        """One update at learning rate `lr`, of all parameters or `only` of one, with their gradients times `scale`; these are dropped."""
        gradients = self.gradients([only] if only else None)
        if scale is not None:
            for gradient in gradients.values():
                if gradient.dtype != torch.bfloat16:
                    entries(gradient).mul_(scale)
        for name in gradients:
            if name not in self.kept:
                sparse = gradients[name].is_sparse
                self.kept[name] = {field: self._zeros(name, field, sparse) for field in self._fields(name)}
                self.updates[name] = 0
                if sparse:
                    self.begun[name] = torch.zeros(len(gradients[name]), dtype=torch.bool, device=gradients[name].device)
        wide: list[str] = []
        halves: list[str] = []
        for name, gradient in gradients.items():
            if gradient.is_sparse:
                self._update_rows(name, gradient, lr)
                continue
            self.begun.pop(name, None)  # it reached every row
            if self.store is not None:
                self._update_in_pieces(name, gradient, lr, scale)
            else:
                (halves if name in self.halves else wide).append(name)
        means, squares = ([self.kept[name][field] for name in wide] for field in ("exp_avg", "exp_avg_sq"))
        self._update(wide, [self.parameters[name].detach() for name in wide], [gradients[name] for name in wide], means, squares, lr=lr)
        self._update_halves(halves, gradients, lr, scale)
        for name in gradients:
            self.updates[name] += 1
        del gradients
        self.clear(only)

    def _update(
        self,
        names: Sequence[str],
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        means: Sequence[Tensor],
        squares: Sequence[Tensor],
        *,
        lr: float,
    ) -> None:
        """The function under torch.optim.AdamW, on (parts of) some parameters: the class itself would load torch's compiler, over a
        second of every start."""
        beta1, beta2 = self.config.betas
        settings = {"amsgrad": False, "maximize": False, "fused": self.fused or None}
        for decayed in (True, False):
            some = [i for i, name in enumerate(names) if decays(self.parameters[name]) is decayed]
            lists = [[column[i] for i in some] for column in (weights, gradients, means, squares)]
            lists += [[], [self.kept[names[i]]["step"] for i in some]]
            decay = self.config.weight_decay if decayed else 0.0
            if some:
                adamw(*lists, beta1=beta1, beta2=beta2, lr=lr, weight_decay=decay, eps=self.config.eps, **settings)  # type: ignore[arg-type]

    def _update_halves(self, names: Sequence[str], gradients: Mapping[str, Tensor], lr: float, scale: Tensor | None) -> None:
        """float32 states of bfloat16 parameters: as many weights at once as stay in a CPU's cache, of several parameters if they are small.

        Whole float32 copies never exist, and an adapter's many small matrices cost no calls of their own.
        """
        if not names:
            return
        first = self.parameters[names[0]]
        size = min(piece_of(first), sum(self.parameters[name].numel() for name in names))
        rooms = torch.empty(2, size, dtype=torch.int32, device=first.device)
        for slices in self._slices(names, size):
            lengths = [stop - start for _, start, stop in slices]
            room, spare = rooms[:, : sum(lengths)]
            kept = [{f: x.view(-1)[a:b] for f, x in self.kept[name].items() if f != "step"} for name, a, b in slices]
            rest, means, squares = ([x[field] for x in kept] for field in ("low", "exp_avg", "exp_avg_sq"))
            narrow = [self.parameters[name].detach().view(-1)[a:b] for name, a, b in slices]
            marks = [thresholds_from(a, b - a, first.device) for _, a, b in slices]
            wide = join(narrow, rest, marks, room, spare)
            places = zip(slices, spare.view(torch.float32).split(lengths), strict=True)
            changes = [_widened(gradients[name].reshape(-1)[a:b], scale, place) for (name, a, b), place in places]
            for name, start, _ in slices:
                if start:
                    self.kept[name]["step"] -= 1  # its pieces share a step
            self._update([name for name, _, _ in slices], wide.split(lengths), changes, means, squares, lr=lr)
            part(wide, narrow, rest, marks, spare)

    def _slices(self, names: Iterable[str], size: int) -> Iterator[list[Slice]]:
        """All weights of the parameters in their order, `size` at a time."""
        slices: list[Slice] = []
        room = size
        for name in names:
            start, length = 0, self.parameters[name].numel()
            while start < length:
                stop = min(start + room, length)
                slices.append((name, start, stop))
                room -= stop - start
                start = stop
                if room == 0:
                    yield slices
                    slices, room = [], size
        if slices:
            yield slices

    def _update_rows(self, name: str, gradient: Tensor, lr: float) -> None:
        """The same update where only some rows `[rows, D]` have a gradient: the others' is 0. To the same bits if D fills CPU vectors.

        Rows that never had one are left out: their moments are 0, so only weight decay changes them. The memory of moments that were
        never written is not taken from the system.
        """
        kept, weight = self.kept[name], self.parameters[name].detach()
        low = [kept["low"]] if name in self.halves else []
        moments, before = [kept["exp_avg"], kept["exp_avg_sq"]], kept["step"].clone()
        if name not in self.begun:
            self.begun[name] = (moments[0] != 0).any(1) | (moments[1] != 0).any(1)
        begun, places = self.begun[name], gradient.indices()[0]
        begun[places] = True
        entry = torch.full_like(begun, -1, dtype=torch.int64)
        entry[places] = torch.arange(len(places), device=places.device)
        size = max(1, CACHED // weight.shape[1])
        for start in range(0, len(weight), size):
            known, found = begun[start : start + size], entry[start : start + size]
            views = [x[start : start + size] for x in (weight, *low, *moments)]
            marks = [thresholds_from(start * weight.shape[1], views[0].numel(), weight.device).view_as(views[0]) for _ in low]
            groups: list[tuple[Tensor | None, list[Tensor]]]
            if 2 * int(known.sum()) >= len(known):  # picking them out would take longer than all of them
                groups = [(None, views)]
            else:
                groups = [(known.nonzero()[:, 0], views)]
                groups += [((~known).nonzero()[:, 0], views[:-2])] if self.config.weight_decay else []
            for rows, written in groups:
                columns, mark = (xs if rows is None else [x.index_select(0, rows) for x in xs] for xs in (views, marks))
                numbers = found if rows is None else found[rows]
                has = (numbers >= 0).nonzero()[:, 0]
                wide = columns[0]
                if low:
                    narrow, rest, marked = ([x.view(-1)] for x in (*columns[:2], *mark))
                    room, spare = torch.empty(2, wide.numel(), dtype=torch.int32, device=weight.device)
                    wide = join(narrow, rest, marked, room, spare).view_as(wide)
                change = torch.zeros_like(wide)
                change.index_copy_(0, has, gradient.values().index_select(0, numbers[has]))
                kept["step"].copy_(before)
                self._update([name], [wide], [change], columns[-2:-1], columns[-1:], lr=lr)
                if low:
                    part(wide.view(-1), narrow, rest, marked, spare)
                if rows is not None:
                    for whole, column in zip(written, columns, strict=False):
                        whole.index_copy_(0, rows, column)

    def _update_in_pieces(self, name: str, gradient: Tensor, lr: float, scale: Tensor | None) -> None:
        """States in a store: widens a piece of them at a time, so that float32 copies of the whole never exist."""
        assert self.store is not None
        weight, flat, kept = self.parameters[name].detach().view(-1), gradient.reshape(-1), self.kept[name]
        updates = self.updates[name]
        if (kernel := whole_update(self.config.states, weight)) is not None:
            seed = key(self.seed, "rounding", updates, self.numbers[name], 0)
            decay = self.config.weight_decay if decays(self.parameters[name]) else 0.0
            shrink = scale if flat.dtype == torch.bfloat16 else None  # others were scaled before
            settings = {"lr": lr, "decay": decay, "betas": self.config.betas, "eps": self.config.eps}
            kernel(weight, flat, kept["exp_avg"], kept["exp_avg_sq"], shrink, seed=seed, step=updates + 1, **settings)
            kept["step"] += 1
            return
        before = kept["step"].clone()
        size = piece_of(weight, stored=True)
        for start in range(0, len(weight), size):
            stop = min(start + size, len(weight))
            change = _widened(flat[start:stop], scale)
            blocks = slice(start // BLOCK, -(-stop // BLOCK))
            piece = {f: x[blocks if f.endswith("scale") else slice(start, stop)] for f, x in kept.items() if f != "step"}
            values = self.store.read(weight[start:stop], piece)
            kept["step"].copy_(before)
            self._update([name], values[:1], [change], values[1:2], values[2:], lr=lr)
            draw = draws(key(self.seed, "rounding", updates, self.numbers[name], start), stop - start, weight.device)
            self.store.write(weight[start:stop], piece, values, draw)

    def clear(self, only: str | None = None) -> None:
        """Drops the gradients, or `only` one."""
        for name in self.parameters if only is None else (only,):
            self.sums.pop(name, None)
            self.parameters[name].grad = None

    def memory(self, several: bool = True) -> tuple[int, int]:
        """Bytes of the gradients of a step of one micro-batch or `several`, and of all that is kept between updates, once there was one."""
        sums = sum(p.numel() * 4 for p in self.halves.values()) if several else 0  # float32, beside the backward pass's own
        sizes = [p.numel() * p.element_size() for p in self.parameters.values()]
        gradients = max(sizes) if self.config.in_backward and not several else sum(sizes)
        fields = [(math.prod(shape), dtype) for name in self.parameters for shape, dtype in self._fields(name).values()]
        return sums + gradients, sum(n * dtype.itemsize for n, dtype in fields)

    def state(self) -> dict[str, Tensor]:
        """All that an exact resume needs besides the parameters: `NAME.exp_avg`, `.exp_avg_sq`, `.step`, `.low` of bfloat16 ones, or
        what `optimizer.states` keeps in their place."""
        return {f"{name}.{field}": value for name, kept in self.kept.items() for field, value in kept.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what `state` gave, bit for bit. UserError when it belongs to other parameters or states."""
        self._check(state)
        self.begun.clear()
        for name in self.parameters:
            if f"{name}.step" in state:
                self.kept[name] = {f: state[f"{name}.{f}"].to(self._place(f, name), copy=True) for f in self._fields(name)}
                self.updates[name] = int(state[f"{name}.step"])
            else:
                self.kept.pop(name, None)

    def _fields(self, name: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of what is kept for a parameter that was updated."""
        step = {"step": ((), torch.float32)}
        if self.store is not None:
            return step | {f: ((n,), dtype) for f, (n, dtype) in self.store.fields(self.parameters[name].numel()).items()}
        shape, dtype = tuple(self.parameters[name].shape), self.parameters[name].dtype
        rest = {"low": (shape, torch.int16)} if name in self.halves else {}
        return step | rest | {field: (shape, torch.promote_types(dtype, torch.float32)) for field in ("exp_avg", "exp_avg_sq")}

    def _zeros(self, name: str, field: str, sparse: bool) -> Tensor:
        shape, dtype = self._fields(name)[field]
        if sparse and math.prod(shape) * dtype.itemsize >= ON_DEMAND:
            return zeros_on_demand(shape, dtype)
        return torch.zeros(shape, dtype=dtype, device=self._place(field, name))

    def _place(self, field: str, name: str) -> torch.device:
        on_cpu = field == "step" and not self.fused  # where torch's AdamW keeps its step counter, too
        return torch.device("cpu") if on_cpu else self.parameters[name].device

    def _check(self, state: Mapping[str, Tensor]) -> None:
        expected = {f"{name}.{field}": kind for name in self.parameters for field, kind in self._fields(name).items()}
        problems = [f"unexpected {key}" for key in sorted(state.keys() - expected.keys())]
        begun = {key.rpartition(".")[0] for key in state}
        needed = [f"{name}.{field}" for name in self.parameters if name in begun for field in self._fields(name)]
        problems += [f"missing {key}" for key in needed if key not in state]
        for place in expected.keys() & state.keys():
            found, (shape, dtype) = state[place], expected[place]
            if tuple(found.shape) != shape:
                problems.append(f"{place} has shape {list(found.shape)}, expected {list(shape)}")
            elif found.dtype != dtype:
                problems.append(f"{place} is {found.dtype}, expected {dtype}")
        if problems:
            shown = problems[:10] + [f"and {len(problems) - 10} more"] * (len(problems) > 10)
            raise UserError(
                "the checkpoint's optimizer state belongs to other trained parameters than the config asks for; "
                "restore model.adapter, model.dtype and optimizer.states as they were, or start again in another run.output",
                shown,
            )


def make_optimizer(named: Mapping[str, nn.Parameter], config: OptimizerConfig, seed: int = 0) -> Optimizer:
    """An optimizer for the parameters in `named` that are trained (`requires_grad`); `seed` is for stochastic rounding."""
    return Optimizer({name: p for name, p in named.items() if p.requires_grad}, config, seed)


def joined(gradient: Tensor) -> Tensor:
    """A gradient with one entry for each row if it is sparse; a dense one is returned as it is."""
    return gradient.coalesce() if gradient.is_sparse else gradient


def piece_of(weight: Tensor, stored: bool = False) -> int:
    """How many weights are widened at once; `stored`: whose states are in a store."""
    if weight.device.type == "cpu":
        return PIECE if stored else CACHED
    return LAUNCHED_PIECE if stored else LAUNCHED


def norm_parts(gradient: Tensor) -> Tensor:
    """At least float32, and of the gradient's norm: its entries, or of a 16-bit one the norms of its pieces."""
    numbers = entries(gradient)
    if numbers.dtype != torch.bfloat16:
        return numbers
    pieces = numbers.reshape(-1).split(piece_of(numbers))
    return torch.stack([torch.linalg.vector_norm(piece, dtype=torch.float32) for piece in pieces])


def entries(gradient: Tensor) -> Tensor:
    """The numbers of a gradient in its own memory: of a sparse one (`joined`) those of its rows, for the rest is 0."""
    return gradient.values() if gradient.is_sparse else gradient


def _widened(gradient: Tensor, scale: Tensor | None, room: Tensor | None = None) -> Tensor:
    """A 16-bit gradient in float32 (in `room` if given) times `scale`; a float32 one is returned as it is, for it was scaled before."""
    if gradient.dtype != torch.bfloat16:
        return gradient
    wide = gradient.to(torch.float32) if room is None else room.copy_(gradient)
    return wide if scale is None else wide.mul_(scale)


def decays(parameter: Tensor) -> bool:
    """Weight decay is for matrices: not for biases, norms and other vectors."""
    return parameter.dim() > 1


def _require_bfloat16(parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> None:
    for name, parameter in parameters.items():
        if parameter.dtype != torch.bfloat16:
            raise UserError(
                f"optimizer.states: {config.states} needs bfloat16 weights, but {name} is {str(parameter.dtype).removeprefix('torch.')}; "
                "set model.dtype=bfloat16 or optimizer.states=float32"
            )


def warmup_steps(total: int, config: OptimizerConfig) -> int:
    """Steps of linear warm-up: a share of `total` (rounded up) below 1, a number of steps from 1 on."""
    return math.ceil(config.warmup * total) if config.warmup < 1 else int(config.warmup)


def learning_rate(step: int, total: int, config: OptimizerConfig) -> float:
    """Learning rate of update `step` of `total`, counted from 0.

    Rises linearly to `lr`, reached at the last warm-up step, then falls along the schedule towards `floor * lr`, which would be reached one
    step after the last: no update is spent at a rate of zero.

    >>> [learning_rate(s, 6, OptimizerConfig(lr=1.0, warmup=2, schedule="linear")) for s in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    warmup = warmup_steps(total, config)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    shape = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}[config.schedule]
    return config.lr * (config.floor + (1.0 - config.floor) * shape)
