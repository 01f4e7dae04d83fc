"""AdamW and its learning rate. One rule: the arithmetic is float32 (float64 for float64 weights), whatever the model's dtype."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from trueline.config.schema import OptimizerConfig
from trueline.errors import UserError
from trueline.parallel.memory import zeros_on_demand
from trueline.train.stores import BLOCK, PIECE, STORES, draws, without_halves

FUSED = ("cpu", "cuda")  # device types on which one kernel does the whole update, element by element, so the same bits every time
CACHED = 1 << 20  # weights rounded at once: they stay in a CPU's cache, and waking its threads for each piece costs little
LAUNCHED = 1 << 26  # the same on an accelerator, where a piece costs some launches
ON_DEMAND = 1 << 25  # bytes of moments from which rows that never have a gradient are worth saving
HALVES = (torch.bfloat16, torch.float16)


class Optimizer:
    """AdamW (arXiv:1711.05101) over named parameters.

    The gradients of a 16-bit parameter are summed in float32; the only one of a step stays as it is until the update, which widens it a
    piece at a time. With `optimizer.states: float32` the parameter has a float32 master copy, on which the update happens, and is the
    master rounded; for every other parameter the master is the parameter itself. With other states there are no masters:
    `stores.STORES` says what is kept.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], config: OptimizerConfig, seed: int = 0):
        if not named:
            raise ValueError("nothing to train")
        self.parameters = dict(named)
        self.config, self.seed = config, seed
        self.store = None if config.states == "float32" else STORES[config.states]
        if self.store is not None:
            _require_bfloat16(self.parameters, config)
        self.halves = {name: p for name, p in self.parameters.items() if p.dtype in HALVES}
        for parameter in self.halves.values():
            parameter.data = parameter.data.contiguous()  # rounded and updated in flat pieces
        self.masters: dict[str, Tensor] = {} if self.store else {name: _master(p) for name, p in self.parameters.items()}
        self.numbers = {name: i for i, name in enumerate(self.parameters)}
        self.sums: dict[str, Tensor] = {}  # gradients of `halves`: 16 bits of one micro-batch's, float32 of several and of sparse ones
        self.fused = all(p.device.type in FUSED for p in self.parameters.values())
        self.kept: dict[str, dict[str, Tensor]] = {}  # name -> step and what the update needs of the ones before, from the first on
        self.begun: dict[str, Tensor] = {}  # where gradients are sparse: the rows that had one

    @torch.no_grad()
    def collect(self, only: str | None = None) -> None:
        """Sums 16-bit gradients in float32 from the second on: to be called after each backward, for in 16 bits they would lose bits.

        Sparse ones are brought to one entry a row, so that they stay smaller than dense ones; states in pieces need dense ones.
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
                if gradient.dtype not in HALVES:
                    entries(gradient).mul_(scale)
        for name in gradients:
            if name not in self.kept:
                sparse = gradients[name].is_sparse
                self.kept[name] = {field: self._zeros(name, field, sparse) for field in self._fields(name)}
                if sparse:
                    self.begun[name] = torch.zeros(len(gradients[name]), dtype=torch.bool, device=gradients[name].device)
        at_once: list[str] = []
        for name, gradient in gradients.items():
            if gradient.is_sparse:
                self._update_rows(name, gradient, lr)
                continue
            self.begun.pop(name, None)  # it reached every row
            if self.store is not None or gradient.dtype in HALVES:
                self._update_in_pieces(name, gradient, lr, scale)
            else:
                at_once.append(name)
        for decayed in (True, False):
            names = [name for name in at_once if decays(self.parameters[name]) is decayed]
            columns = [[self.kept[name][field] for name in names] for field in ("exp_avg", "exp_avg_sq", "step")]
            if names:
                self._update([self.masters[n] for n in names], [gradients[n] for n in names], *columns, lr=lr, decayed=decayed)
        self._round(gradients)
        del gradients
        self.clear(only)

    def _update(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        means: Sequence[Tensor],
        squares: Sequence[Tensor],
        steps: Sequence[Tensor],
        *,
        lr: float,
        decayed: bool,
    ) -> None:
        """The function under torch.optim.AdamW: the class itself would load torch's compiler, over a second of every start."""
        beta1, beta2 = self.config.betas
        lists = [list(column) for column in (weights, gradients, means, squares, (), steps)]
        decay = self.config.weight_decay if decayed else 0.0
        settings = {"amsgrad": False, "maximize": False, "fused": self.fused or None}
        adamw(*lists, beta1=beta1, beta2=beta2, lr=lr, weight_decay=decay, eps=self.config.eps, **settings)  # type: ignore[arg-type]

    def _update_rows(self, name: str, gradient: Tensor, lr: float) -> None:
        """The same update where only some rows `[rows, D]` have a gradient: the others' is 0. To the same bits if D fills CPU vectors.

        Rows that never had one are left out: their moments are 0, so only weight decay changes them. The memory of moments that were
        never written is not taken from the system.
        """
        kept, master = self.kept[name], self.masters[name]
        moments, before = [kept["exp_avg"], kept["exp_avg_sq"]], kept["step"].clone()
        if name not in self.begun:
            self.begun[name] = (moments[0] != 0).any(1) | (moments[1] != 0).any(1)
        begun, places = self.begun[name], gradient.indices()[0]
        begun[places] = True
        entry = torch.full_like(begun, -1, dtype=torch.int64)
        entry[places] = torch.arange(len(places), device=places.device)
        size = max(1, CACHED // master.shape[1])
        for start in range(0, len(master), size):
            known, found = begun[start : start + size], entry[start : start + size]
            views = [x[start : start + size] for x in (master, *moments)]
            parts: list[tuple[Tensor | None, list[Tensor]]]
            if 2 * int(known.sum()) >= len(known):  # picking them out would take longer than all of them
                parts = [(None, views)]
            else:
                parts = [(known.nonzero()[:, 0], views)]
                parts += [((~known).nonzero()[:, 0], views[:1])] if self.config.weight_decay else []
            for rows, written in parts:
                columns = views if rows is None else [x.index_select(0, rows) for x in views]
                numbers = found if rows is None else found[rows]
                has = (numbers >= 0).nonzero()[:, 0]
                change = torch.zeros_like(columns[0])
                change.index_copy_(0, has, gradient.values().index_select(0, numbers[has]))
                kept["step"].copy_(before)
                self._update(columns[:1], [change], columns[1:2], columns[2:], [kept["step"]], lr=lr, decayed=True)
                if rows is not None:
                    for whole, column in zip(written, columns, strict=False):
                        whole.index_copy_(0, rows, column)

    def _update_in_pieces(self, name: str, gradient: Tensor, lr: float, scale: Tensor | None) -> None:
        """Widens a piece of the weight or of its 16-bit gradient at a time, so that float32 copies of the whole never exist."""
        parameter, kept = self.parameters[name], self.kept[name]
        weight, flat, before = parameter.detach().view(-1), gradient.reshape(-1), kept["step"].clone()
        size = PIECE if self.store is not None else piece_of(weight)
        for start in range(0, len(weight), size):
            stop = min(start + size, len(weight))
            change = flat[start:stop]
            if change.dtype in HALVES:
                change = change.to(torch.float32)
                change = change if scale is None else change.mul_(scale)
            if self.store is None:
                master, mean, square = (x.view(-1)[start:stop] for x in (self.masters[name], kept["exp_avg"], kept["exp_avg_sq"]))
                values = master, mean, square
            else:
                blocks = slice(start // BLOCK, -(-stop // BLOCK))
                piece = {f: x[blocks if f.endswith("scale") else slice(start, stop)] for f, x in kept.items() if f != "step"}
                values = self.store.read(weight[start:stop], piece)
            kept["step"].copy_(before)
            lists = [[x] for x in (values[0], change, *values[1:], kept["step"])]
            self._update(*lists, lr=lr, decayed=decays(parameter))
            if self.store is not None:
                draw = draws(self.seed, int(before), self.numbers[name], start, stop - start, weight.device)
                self.store.write(weight[start:stop], piece, values, draw)

    def clear(self, only: str | None = None) -> None:
        """Drops the gradients, or `only` one."""
        for name in self.parameters if only is None else (only,):
            self.sums.pop(name, None)
            self.parameters[name].grad = None

    @torch.no_grad()
    def _round(self, names: Iterable[str]) -> None:
        """Brings 16-bit parameters to their masters, a piece at a time: whole copies would be made again for each operation."""
        for name in self.halves.keys() & set(names) & self.masters.keys():
            parameter, master = self.parameters[name].detach(), self.masters[name]
            size = min(piece_of(parameter), max(parameter.numel(), 1))
            room = torch.empty(size, dtype=torch.int32, device=parameter.device)
            for narrow, wide in zip(parameter.view(-1).split(size), master.view(-1).split(size), strict=True):
                narrow.copy_(without_halves(wide, room[: len(wide)]) if narrow.dtype == torch.bfloat16 else wide)

    def memory(self) -> tuple[int, int]:
        """Bytes of one step's gradients, and of all that is kept between updates, once there was one."""
        sums = sum(p.numel() * 4 for p in self.halves.values())  # float32, beside the backward pass's own: in steps of several
        gradients = sum(p.numel() * p.element_size() for p in self.parameters.values())
        fields = [(math.prod(shape), dtype) for name in self.parameters for shape, dtype in self._fields(name).values()]
        masters = sum(m.numel() * m.element_size() for name, m in self.masters.items() if m is not self.parameters[name])
        return sums + gradients, masters + sum(n * dtype.itemsize for n, dtype in fields)

    def state(self) -> dict[str, Tensor]:
        """All that an exact resume needs besides the parameters: `NAME.exp_avg`, `.exp_avg_sq`, `.step`, `.master` of 16-bit ones, or
        what `optimizer.states` keeps in their place."""
        found: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            if name in self.masters and self.masters[name] is not parameter:
                found[f"{name}.master"] = self.masters[name]
            for field, value in self.kept.get(name, {}).items():
                found[f"{name}.{field}"] = value
        return found

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what `state` gave, bit for bit. UserError when it belongs to other parameters or states."""
        self._check(state)
        self.begun.clear()
        for name, parameter in self.parameters.items():
            if name in self.masters and self.masters[name] is not parameter:
                self.masters[name].copy_(state[f"{name}.master"])
            if f"{name}.step" in state:
                self.kept[name] = {f: state[f"{name}.{f}"].to(self._place(f, name), copy=True) for f in self._fields(name)}
            else:
                self.kept.pop(name, None)
        self._round(self.parameters)

    def _fields(self, name: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of what is kept for a parameter that was updated."""
        step = {"step": ((), torch.float32)}
        if self.store is not None:
            return step | {f: ((n,), dtype) for f, (n, dtype) in self.store.fields(self.parameters[name].numel()).items()}
        master = self.masters[name]
        return step | {field: (tuple(master.shape), master.dtype) for field in ("exp_avg", "exp_avg_sq")}

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
        masters = [name for name in self.masters if self.masters[name] is not self.parameters[name]]
        expected |= {f"{name}.master": (tuple(self.masters[name].shape), self.masters[name].dtype) for name in masters}
        problems = [f"unexpected {key}" for key in sorted(state.keys() - expected.keys())]
        begun = {key.rpartition(".")[0] for key in state if not key.endswith(".master")}
        needed = [f"{name}.{field}" for name in self.parameters if name in begun for field in self._fields(name)]
        problems += [f"missing {key}" for key in [*(f"{name}.master" for name in masters), *needed] if key not in state]
        for key in expected.keys() & state.keys():
            found, (shape, dtype) = state[key], expected[key]
            if tuple(found.shape) != shape:
                problems.append(f"{key} has shape {list(found.shape)}, expected {list(shape)}")
            elif found.dtype != dtype:
                problems.append(f"{key} is {found.dtype}, expected {dtype}")
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


def piece_of(weight: Tensor) -> int:
    """How many weights are widened at once where they need not be."""
    return CACHED if weight.device.type == "cpu" else LAUNCHED


def norm_parts(gradient: Tensor) -> Tensor:
    """At least float32, and of the gradient's norm: its entries, or of a 16-bit one the norms of its pieces."""
    numbers = entries(gradient)
    if numbers.dtype not in HALVES:
        return numbers
    pieces = numbers.reshape(-1).split(piece_of(numbers))
    return torch.stack([torch.linalg.vector_norm(piece, dtype=torch.float32) for piece in pieces])


def entries(gradient: Tensor) -> Tensor:
    """The numbers of a gradient in its own memory: of a sparse one (`joined`) those of its rows, for the rest is 0."""
    return gradient.values() if gradient.is_sparse else gradient


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


def _master(parameter: nn.Parameter) -> Tensor:
    if parameter.dtype not in HALVES:
        return parameter
    return parameter.detach().to(torch.float32)


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
