"""How AdamW's numbers are kept between updates. One rule: a store only keeps; every update is done in float32, on pieces of a weight.

Each store gives the fields it keeps for `n` weights, reads float32 (weight, exp_avg, exp_avg_sq) and writes them back.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.optim.adamw import adamw

from trueline.data.stream import key
from trueline.model.rounding import LEVELS, Draw, draws, stochastic
from trueline.parallel.kernels import usable

BLOCK = 256  # 8-bit moments that share a scale, as in arXiv:2110.02861
PIECE = 1 << 22  # weights that are widened to float32 at once; whole blocks
PERIOD = 1 << 20  # weights of a parameter until their thresholds begin again
LAUNCHED_PIECE = 1 << 24  # the same on an accelerator, where a piece costs 26 launches and more

Values = tuple[Tensor, Tensor, Tensor]
"""weight, exp_avg and exp_avg_sq as float32 `[n]`."""


class Store(Protocol):
    def fields(self, n: int) -> dict[str, tuple[int, torch.dtype]]:
        """Length and dtype of what is kept beside `n` bfloat16 weights."""

    def read(self, weight: Tensor, kept: Mapping[str, Tensor]) -> Values:
        """New float32 tensors, or the kept ones where they are float32 already."""

    def write(self, weight: Tensor, kept: Mapping[str, Tensor], values: Values, draw: Draw) -> None:
        """Stores `values`, the weight in `weight` and the rest in `kept`."""


class Bfloat16:
    """Weight and moments in bfloat16, each rounded at random in proportion: its mean is the float32 number."""

    def fields(self, n: int) -> dict[str, tuple[int, torch.dtype]]:
        return {"exp_avg": (n, torch.bfloat16), "exp_avg_sq": (n, torch.bfloat16)}

    def read(self, weight: Tensor, kept: Mapping[str, Tensor]) -> Values:
        return weight.float(), kept["exp_avg"].float(), kept["exp_avg_sq"].float()

    def write(self, weight: Tensor, kept: Mapping[str, Tensor], values: Values, draw: Draw) -> None:
        for to, value in zip((weight, kept["exp_avg"], kept["exp_avg_sq"]), values, strict=True):
            to.copy_(stochastic(value, draw()))


class Int8:
    """The weight as in `Bfloat16`; moments as 8-bit codes, with one float32 scale for each `BLOCK` of them."""

    def fields(self, n: int) -> dict[str, tuple[int, torch.dtype]]:
        scales = (-(-n // BLOCK), torch.float32)
        codes = (n, torch.uint8)
        return {"exp_avg": codes, "exp_avg_scale": scales, "exp_avg_sq": codes, "exp_avg_sq_scale": scales}

    def read(self, weight: Tensor, kept: Mapping[str, Tensor]) -> Values:
        signed, unsigned = (levels(s, weight.device) for s in (True, False))
        mean = decode(kept["exp_avg"], kept["exp_avg_scale"], signed)
        return weight.float(), mean, decode(kept["exp_avg_sq"], kept["exp_avg_sq_scale"], unsigned)

    def write(self, weight: Tensor, kept: Mapping[str, Tensor], values: Values, draw: Draw) -> None:
        weight.copy_(stochastic(values[0], draw()))
        for name, value, signed in (("exp_avg", values[1], True), ("exp_avg_sq", values[2], False)):
            codes, scales = encode(value, levels(signed, value.device), draw(), signed)
            kept[name].copy_(codes)
            kept[f"{name}_scale"].copy_(scales)


def whole_update(states: str, weight: Tensor) -> Callable[..., None] | None:
    """The kernel that updates all of `weight` in one pass, where these states have one: it counts weights in 32 bits."""
    return _update_kernel(weight.device) if states == "bfloat16" and weight.numel() < 1 << 31 else None


@cache
def _update_kernel(device: torch.device) -> Callable[..., None] | None:
    """A whole update of `Bfloat16` in one pass, where Triton and a CUDA device are; tried on some weights."""

    def right(kernel: Callable[..., None]) -> bool:
        start = torch.linspace(-2, 2, 1000, dtype=torch.float32, device=device)
        gradient, steps = start.flip(0), torch.tensor(2.0, dtype=torch.float32)
        found = [x.bfloat16() for x in (start, start / 8, start.square() / 64)]
        wide = [x.float() for x in found]
        lists: Any = wide[:1], [gradient], wide[1:2], wide[2:], [], [steps]
        adamw(*lists, beta1=0.9, beta2=0.99, amsgrad=False, maximize=False, lr=0.01, eps=1e-8, weight_decay=0.1)
        kernel(found[0], gradient, *found[1:], None, seed=2**62, step=3, lr=0.01, decay=0.1, betas=(0.9, 0.99), eps=1e-8)
        return all(torch.allclose(x.float(), y, rtol=0.01, atol=1e-4) for x, y in zip(found, wide, strict=True))

    return usable("trueline.train.update_kernel", "adamw_bfloat16", right) if device.type == "cuda" else None


STORES: dict[Literal["bfloat16", "int8"], Store] = {"bfloat16": Bfloat16(), "int8": Int8()}


@lru_cache
def thresholds(device: torch.device) -> Tensor:
    """Fixed draws from -32,768 to 32,767, int16, for weights by their place in a parameter: twice the same `PERIOD`."""
    drawn = draws(key(0, "thresholds"), PERIOD, torch.device("cpu"))().sub_(LEVELS // 2).to(torch.int16)
    return torch.cat((drawn, drawn)).to(device)


def thresholds_from(place: int, length: int, device: torch.device) -> Tensor:
    """Thresholds of `length` weights from `place` of a parameter on."""
    table, first = thresholds(device), place % PERIOD
    if length <= PERIOD:
        return table[first : first + length]
    return table[first : first + PERIOD].repeat(-(-length // PERIOD))[:length]


def join(narrow: Sequence[Tensor], rest: Sequence[Tensor], marks: Sequence[Tensor], room: Tensor, spare: Tensor) -> Tensor:
    """The flat float32 numbers that `part` parted by the thresholds `marks`, bit for bit, in `room`; both rooms are int32 and written."""
    lengths = [len(x) for x in narrow]
    turned = torch._foreach_add(list(rest), list(marks))  # wraps around where the weight was rounded away from zero
    for to, found in ((room.view(torch.float32), narrow), (spare, turned)):
        torch._foreach_copy_(list(to.split(lengths)), list(found))
    room.add_(spare)
    torch._foreach_copy_(list(spare.split(lengths)), list(marks))
    return room.sub_(spare).view(torch.float32)


def part(wide: Tensor, narrow: Sequence[Tensor], rest: Sequence[Tensor], marks: Sequence[Tensor], spare: Tensor) -> None:
    """Writes flat, finite float32 numbers to flat bfloat16 and int16 tensors: one of the two neighbours, and the lower half of the bits.

    Which neighbour follows from the weight's own threshold: over many weights the mean of what is written is that of the numbers, whose
    smallest changes are then seen at once. To the nearest, weights stay where they are until they have moved by half of a last place: of
    what ten steps at 1e-6 change in the loss, a quarter was to be seen. Rooms of `wide` and `spare` (int32 of its length) are written.
    """
    bits = wide.view(torch.int32)
    lengths = [len(x) for x in narrow]
    torch._foreach_copy_(list(rest), list(bits.split(lengths)))
    torch._foreach_copy_(list(spare.split(lengths)), list(marks))
    raised = bits.add_(spare).add_(LEVELS // 2).bitwise_and_(-LEVELS).view(torch.float32)
    torch._foreach_copy_(list(narrow), list(raised.split(lengths)))


@lru_cache
def levels(signed: bool, device: torch.device) -> Tensor:
    """The 256 numbers from -1 (or 0) to 1 that an 8-bit code stands for, ascending: the dynamic tree of arXiv:2110.02861 section 2.2.

    Each decade down to 1e-6 has half as many as the one above it. The lowest is -1, not the paper's -0.993: nothing lies outside.
    """
    found = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1)
        middles = 10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
        found += [*middles, *(-middles if signed else ())]
    table = torch.tensor(sorted(found), dtype=torch.float32)
    table[0] = -1.0 if signed else 0.0
    return table.to(device)  # once: each copy would be waited for


def decode(codes: Tensor, scales: Tensor, table: Tensor) -> Tensor:
    return table[codes.int()] * scales.repeat_interleave(BLOCK)[: len(codes)]


def encode(wide: Tensor, table: Tensor, draw: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes `[n]` and scales `[n / BLOCK]`; each number goes to one of its two neighbours in the table, at random in proportion.

    A positive number never becomes 0 in a table without negative ones (not `signed`): AdamW divides by its root.
    """
    blocks = torch.nn.functional.pad(wide, (0, -len(wide) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(-1)
    share = (blocks / torch.where(scales > 0, scales, 1.0)[:, None]).view(-1)[: len(wide)]
    below = (torch.searchsorted(table, share, right=True, out_int32=True) - 1).clamp_(0, len(table) - 2)
    way = (share - table[below]) / (table[below + 1] - table[below])
    codes = below + (draw < way * LEVELS)
    if not signed:
        codes = torch.where(wide > 0, codes.clamp(min=1), codes)
    return codes.to(torch.uint8), scales
