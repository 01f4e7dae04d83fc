"""RMSNorm in fewer passes over memory. One rule: the forward pass gives torch's own bits, so that it does not matter who made them."""

from typing import Any, cast

import torch
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm (arXiv:1910.07467 eq. 4), on a CPU with a gradient of its own: there torch has none, and goes through each step.

    Keeps the input and a number a row for the backward pass, where torch keeps the normed input, too, and in 16 bits float32 copies.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not torch.is_grad_enabled():
            return super().forward(x)
        return cast(Tensor, _Normed.apply(x, self.weight, cast(float, self.eps)))


class _Normed(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32 (float64 for float64)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = (wide * wide).mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale if wide is x else wide.mul_(scale)).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """With n = x * scale and h = grad * weight: (h - n mean(h n)) scale, and for the weight the sum of grad * n over the rows."""
        x, weight, scale = ctx.saved_tensors
        grad, factors = grads[0].to(scale.dtype), weight.to(scale.dtype)
        normed = x * scale
        both = grad * normed
        for_weight = both.flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, for_weight, None
        means = (both @ factors).div_(x.shape[-1]).unsqueeze(-1)
        return torch.mul(grad, factors, out=both).addcmul_(normed, means, value=-1).mul_(scale).to(x.dtype), for_weight, None
