"""AdamW and its learning rate. One rule: the arithmetic is float32 (float64 for float64 weights), whatever the model's dtype."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from trueline.config.schema import OptimizerConfig
from trueline.errors import UserError

FUSED = ("cpu", "cuda")  # device types on which one kernel does the whole update, element by element, so the same bits every time


class Optimizer:
    """AdamW (arXiv:1711.05101) over named parameters.

    A 16-bit parameter has a float32 master copy: its gradients are summed there, the update happens there, and the parameter is the master
    rounded. For every other parameter the master is the parameter itself.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], config: OptimizerConfig):
        if not named:
            raise ValueError("nothing to train")
        self.parameters = dict(named)
        self.masters = {name: _master(p) for name, p in self.parameters.items()}
        self.halves = [(p, self.masters[name]) for name, p in self.parameters.items() if self.masters[name] is not p]
        self.config = config
        self.fused = all(m.device.type in FUSED for m in self.masters.values())
        self.moments: dict[str, dict[str, Tensor]] = {}  # name -> step, exp_avg, exp_avg_sq, from the first update on

    def collect(self) -> None:
        """Moves 16-bit gradients to their masters: to be called after each backward, for they would lose bits if they were summed."""
        for parameter, master in self.halves:
            if parameter.grad is not None:
                gradient = parameter.grad.to(master.dtype)
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None

    def gradients(self, all_of_them: bool = False) -> dict[str, Tensor]:
        """Gradients by name, at least float32, of the parameters that have one; with `all_of_them`, zeros for the others."""
        if all_of_them:
            for master in self.masters.values():
                master.grad = torch.zeros_like(master) if master.grad is None else master.grad
        return {name: m.grad for name, m in self.masters.items() if m.grad is not None}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update at learning rate `lr`; the gradients are dropped.

        The function under torch.optim.AdamW: the class itself would load torch's compiler, over a second of every start.
        """
        beta1, beta2 = self.config.betas
        gradients = self.gradients()
        for decayed in (True, False):
            names = [name for name in gradients if decays(self.masters[name]) is decayed]
            moments = [self._moments(name) for name in names]
            if names:
                adamw(
                    [self.masters[name] for name in names],
                    [gradients[name] for name in names],
                    [m["exp_avg"] for m in moments],
                    [m["exp_avg_sq"] for m in moments],
                    [],
                    [m["step"] for m in moments],
                    fused=self.fused or None,
                    amsgrad=False,
                    maximize=False,
                    beta1=beta1,
                    beta2=beta2,
                    lr=lr,
                    weight_decay=self.config.weight_decay if decayed else 0.0,
                    eps=self.config.eps,
                )
        self.clear()
        self._round()

    def _moments(self, name: str) -> dict[str, Tensor]:
        master = self.masters[name]
        if name not in self.moments:
            step = torch.zeros((), device=self._place("step", master))
            self.moments[name] = {"step": step, "exp_avg": torch.zeros_like(master), "exp_avg_sq": torch.zeros_like(master)}
        return self.moments[name]

    def clear(self) -> None:
        """Drops the gradients."""
        for name, parameter in self.parameters.items():
            parameter.grad = self.masters[name].grad = None

    @torch.no_grad()
    def _round(self) -> None:
        for parameter, master in self.halves:
            parameter.copy_(master)

    def state(self) -> dict[str, Tensor]:
        """All that an exact resume needs besides the parameters: `NAME.exp_avg`, `.exp_avg_sq`, `.step`, and `.master` of 16-bit ones."""
        found: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            if master is not self.parameters[name]:
                found[f"{name}.master"] = master.detach()
            for field, value in self.moments.get(name, {}).items():
                found[f"{name}.{field}"] = value
        return found

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what `state` gave, bit for bit. UserError when it belongs to other parameters."""
        self._check(state)
        for name, master in self.masters.items():
            if master is not self.parameters[name]:
                master.copy_(state[f"{name}.master"])
            fields = {field: state[f"{name}.{field}"] for field in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{field}" in state}
            if fields:
                self.moments[name] = {field: x.to(self._place(field, master), copy=True) for field, x in fields.items()}
            else:
                self.moments.pop(name, None)
        self._round()

    def _place(self, field: str, master: Tensor) -> torch.device:
        on_cpu = field == "step" and not self.fused  # where torch's AdamW keeps its step counter, too
        return torch.device("cpu") if on_cpu else master.device

    def _check(self, state: Mapping[str, Tensor]) -> None:
        owners = {key.rpartition(".")[0] for key in state}
        problems = [f"unexpected {name}" for name in sorted(owners - set(self.masters))]
        for name, master in self.masters.items():
            if master is not self.parameters[name] and f"{name}.master" not in state:
                problems.append(f"missing {name}.master")
            for field in ("master", "exp_avg", "exp_avg_sq"):
                found = state.get(f"{name}.{field}")
                if found is not None and found.shape != master.shape:
                    problems.append(f"{name}.{field} has shape {list(found.shape)}, expected {list(master.shape)}")
                elif found is not None and found.dtype != master.dtype:
                    problems.append(f"{name}.{field} is {found.dtype}, expected {master.dtype}")
        if problems:
            shown = problems[:10] + [f"and {len(problems) - 10} more"] * (len(problems) > 10)
            raise UserError(
                "the checkpoint's optimizer state belongs to other trained parameters than the config asks for; "
                "restore model.adapter and model.dtype as they were, or start again in another run.output",
                shown,
            )


def make_optimizer(named: Mapping[str, nn.Parameter], config: OptimizerConfig) -> Optimizer:
    """An optimizer for the parameters in `named` that are trained (`requires_grad`)."""
    return Optimizer({name: p for name, p in named.items() if p.requires_grad}, config)


def decays(parameter: Tensor) -> bool:
    """Weight decay is for matrices: not for biases, norms and other vectors."""
    return parameter.dim() > 1


def _master(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.dtype not in (torch.bfloat16, torch.float16):
        return parameter
    return nn.Parameter(parameter.detach().to(torch.float32))


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
