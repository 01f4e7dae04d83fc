"""float32 to bfloat16 at random, in proportion. One rule: the mean of what is written is what was to be written.

To the nearest, a change smaller than half of a weight's last place is lost every time, and with it small updates or a young adapter.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

LEVELS = 1 << 16  # of a draw

Draw = Callable[[], Tensor]
"""The next `[n]` integers from 0 to 65,535, int32."""


def draws(number: int, n: int, device: torch.device) -> Draw:
    """The stream of number `number`. Philox on the CPU and on CUDA, but not the same draws on both."""
    if device.type == "cpu":
        stream = np.random.Philox(key=number)
        return lambda: torch.from_numpy(stream.random_raw(-(-n // 4)).view(np.uint16)[:n].astype(np.int32))
    generator = torch.Generator(device).manual_seed(number)
    return lambda: torch.randint(LEVELS, (n,), dtype=torch.int32, device=device, generator=generator)


def stochastic(wide: Tensor, draw: Tensor) -> Tensor:
    """float32 `[n]` to one of its two bfloat16 neighbours, to the farther from zero with the share of the way to it that `wide` has gone.

    `draw` `[n]` is overwritten. A draw of half of `LEVELS` is the nearest. The answer is every other number of a larger tensor.
    """
    # the upper halves of the bits: what torch runs on is little-endian
    return draw.add_(wide.view(torch.int32)).view(torch.bfloat16)[1::2]
