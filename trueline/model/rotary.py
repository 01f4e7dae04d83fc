"""The speeds at which pairs of channels turn, plain or stretched. One rule: float32, in the order the published code computes."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeScaling:
    """How a model's angles were stretched beyond the context it was first trained on (`rope_scaling` of config.json)."""

    kind: Literal["linear", "yarn", "llama3"]
    factor: float
    original: int = 0  # positions of the first training; not used by linear
    low: float = 1.0  # llama3: low_freq_factor; yarn: beta_slow
    high: float = 4.0  # llama3: high_freq_factor; yarn: beta_fast
    amplitude: float = 1.0  # cosine and sine are multiplied by it (yarn's attention_factor)
    truncate: bool = True  # yarn: the ramp begins and ends at whole pairs


def speeds(theta: float, size: int, scaling: RopeScaling | None = None, device: torch.device | str = "cpu") -> Tensor:
    """Radians per position of each of the `size / 2` pairs of channels, float32 (arXiv:2104.09864 sect. 3.4)."""
    exponents = torch.arange(0, size, 2, dtype=torch.int64, device=device).float() / size
    plain = 1.0 / theta**exponents
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    return _yarn(theta, size, scaling, theta**exponents) if scaling.kind == "yarn" else _llama3(plain, scaling)


def _yarn(theta: float, size: int, scaling: RopeScaling, periods: Tensor) -> Tensor:
    """Fast pairs as they are, slow ones divided by the factor, a ramp between (arXiv:2309.00071 sect. 3.2)."""

    def pair(turns: float) -> float:
        """The pair that makes so many turns over the original context."""
        return size * math.log(scaling.original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair(scaling.high), pair(scaling.low)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    pairs = torch.arange(size // 2, dtype=torch.float32, device=periods.device)
    kept = 1 - ((pairs - first) / (last - first if last != first else 0.001)).clamp(0, 1)
    return 1.0 / (scaling.factor * periods) * (1 - kept) + 1.0 / periods * kept


def _llama3(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's own: waves longer than the context divided by the factor, short ones kept, a blend between."""
    waves = 2 * math.pi / plain
    slow, fast = waves > scaling.original / scaling.low, waves < scaling.original / scaling.high
    blend = (scaling.original / waves - scaling.low) / (scaling.high - scaling.low)
    between = (1 - blend) * plain / scaling.factor + blend * plain
    return torch.where(slow, plain / scaling.factor, torch.where(fast, plain, between))
