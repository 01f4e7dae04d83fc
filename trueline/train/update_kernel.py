"""AdamW with weights and moments in bfloat16 as one pass over memory, in Triton: 14 bytes a weight, not some 200 in 26 operations.

The arithmetic is float32 as in `Optimizer._update`, the rounding that of `rounding.stochastic`; the draws are Philox's in Triton, keyed
by a seed and the weight's place. Imported by `train/optimizer.py` alone. It was run in Triton's interpreter and compiled, never on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # weights of a program


@triton.jit
def widen(halves):  # type: ignore[no-untyped-def]
    """bfloat16 as its bits (int16) to float32."""
    return (halves.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def narrow(wide, draw):  # type: ignore[no-untyped-def]
    """float32 to the bits of one of its two neighbours, the farther from zero if its lower 16 bits and the draw's reach 65,536."""
    return ((wide.to(tl.int32, bitcast=True) + (draw & 0xFFFF)) >> 16).to(tl.int16)


@triton.jit(do_not_specialize=["seed", "rate", "decay", "new", "old_square", "new_square", "root", "eps"])
def adamw_program(  # type: ignore[no-untyped-def]
    weights, gradients, means, squares, scale, count, seed, rate, decay, new, old_square, new_square, root, eps,
    SCALED: tl.constexpr, NARROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    weight = widen(tl.load(weights + at, mask=inside, other=0))
    mean = widen(tl.load(means + at, mask=inside, other=0))
    square = widen(tl.load(squares + at, mask=inside, other=0))
    gradient = tl.load(gradients + at, mask=inside, other=0)
    if NARROW:
        gradient = widen(gradient)
    if SCALED:
        gradient *= tl.load(scale)
    mean += new * (gradient - mean)
    square = old_square * square + new_square * gradient * gradient
    weight -= decay * weight
    weight -= rate * mean / (tl.sqrt(square) / root + eps)
    one, two, three, _ = tl.randint4x(seed, at)
    tl.store(weights + at, narrow(weight, one), mask=inside)
    tl.store(means + at, narrow(mean, two), mask=inside)
    tl.store(squares + at, narrow(square, three), mask=inside)


def adamw_bfloat16(
    weight: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, scale: Tensor | None, *, seed: int, step: int, lr: float,
    decay: float, betas: tuple[float, float], eps: float,
) -> None:  # fmt: skip
    """Update number `step`, from 1, in place: flat bfloat16 `weight`, `mean` and `square`, and a flat bfloat16 or float32 gradient, of
    fewer than 2^31 numbers each. `scale`: what the gradient is multiplied by, one number on the device. Asks nothing of the device."""
    halves = gradient.element_size() == 2
    bits = [x.view(torch.int16) for x in (weight, mean, square)]
    adamw_program[(triton.cdiv(weight.numel(), BLOCK),)](
        bits[0], gradient.view(torch.int16) if halves else gradient, *bits[1:], gradient if scale is None else scale,
        weight.numel(), seed, lr / (1 - betas[0] ** step), lr * decay, 1 - betas[0], betas[1], 1 - betas[1],
        (1 - betas[1] ** step) ** 0.5, eps,
        SCALED=scale is not None, NARROW=halves, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
