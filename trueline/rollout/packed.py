"""A decoder for the length of one `hold()`: LoRA folded in, weights in the order the processor's matrix kernel reads. One rule: it is
made anew at every hold, and says when the weights it was made from have changed since.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trueline.model.adapters import halves, low_ranks
from trueline.model.decoder import Decoder

ROWS = 64  # rows per call: above, a reordered weight gains nothing
STEP = 8  # rows are rounded up to this, because the kernel is compiled for each number of rows, in about a millisecond


class PackedLinear(nn.Module):
    """`nn.Linear` for generation on the CPU, with a reordered copy of its weight: about 1.3 to 2 times as fast for few rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > ROWS:
            return torch.cat([self.forward(part) for part in x.split(ROWS)])
        padded = F.pad(x, (0, 0, 0, -len(x) % STEP)) if len(x) % STEP else x
        return torch.ops.mkldnn._linear_pointwise(padded, self.weight, self.bias, "none", [], "")[: len(x)]


def can_pack(decoder: Decoder) -> bool:
    """The kernel is for float32 on the CPU, in builds of PyTorch that have oneDNN."""
    weight = decoder.embed.weight
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return there and weight.device.type == "cpu" and weight.dtype == torch.float32


@torch.no_grad()
def for_generation(decoder: Decoder, role: str | None) -> Decoder:
    """The same network in evaluation mode, sharing every parameter of `decoder` but the linears that were packed."""
    # the copy keeps the parameters themselves: only the tree of modules is new, so that modes and linears can differ
    shadow = copy.deepcopy(decoder, {id(p): p for p in decoder.parameters()}).eval()
    if not can_pack(decoder):
        return shadow
    for half in halves(shadow):
        adapters = low_ranks(half, role) if role is not None else {}
        for name, linear in half.named_children():
            if isinstance(linear, nn.Linear):
                weight = linear.weight
                if name in adapters:
                    weight = weight + adapters[name].scale * adapters[name].up.weight @ adapters[name].down.weight
                setattr(half, name, PackedLinear(weight, linear.bias))
        if adapters:
            del half.adapters[role]
    if shadow.head is not None:
        shadow.head = PackedLinear(shadow.head.weight, None)
    return shadow


def state_of(decoder: Decoder) -> list[tuple[int, int]]:
    """Changes when a parameter is written to or replaced."""
    return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in decoder.parameters()]
