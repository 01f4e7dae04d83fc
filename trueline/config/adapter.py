"""What of a model is trained: all of it, or an adapter on it."""

from typing import Literal

from pydantic import Field

from trueline.config.section import Config

Projection = Literal["q", "k", "v", "o", "gate", "up", "down"]


class AdapterConfig(Config):
    kind: Literal["full", "lora", "ptuning"] = "full"
    """What is trained: all weights, low-rank adapters (arXiv:2106.09685), or learned keys and values per layer (arXiv:2110.07602)."""
    rank: int = Field(8, ge=1)
    """LoRA: rank of each adapter."""
    alpha: float = Field(32.0, gt=0)
    """LoRA: the adapter's output is scaled by alpha / rank."""
    rslora: bool = False
    """LoRA: scale by alpha / sqrt(rank) instead (rank-stabilised, arXiv:2312.03732)."""
    dora: bool = False
    """LoRA: also learn the length of each row of the weight (DoRA, arXiv:2402.09353)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """LoRA: dropout on the adapter's input while training."""
    targets: tuple[Projection, ...] = Field(("q", "k", "v", "o"), min_length=1)
    """LoRA: the projections that get an adapter, by their logical names."""
    tokens: int = Field(128, ge=1)
    """P-tuning v2: learned key/value positions per layer."""
