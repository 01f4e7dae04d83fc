"""The record of what is particular to a model family. Families are tables and small functions; code outside never asks which one it is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from trueline.data.sample import Sample
from trueline.model.decoder import DecoderConfig


class Encoder(Protocol):
    """What a renderer needs of a tokenizer."""

    @property
    def specials(self) -> dict[str, int]:
        """Control tokens by their text."""

    def encode(self, text: str) -> list[int]:
        """Plain text only: no text becomes a control token."""


@dataclass(frozen=True)
class Weight:
    """One of their tensors and what it is here. `{}` stands for the layer number.

    A fused tensor becomes several of ours through `split` and back through `join`; otherwise there is exactly one name in `ours`.
    """

    theirs: str
    ours: tuple[str, ...]
    split: Callable[[Tensor, DecoderConfig], list[Tensor]] | None = None
    join: Callable[[list[Tensor], DecoderConfig], Tensor] | None = None


@dataclass(frozen=True)
class Family:
    """A model family, found by `model_type` in its config.json (`table.family_of`)."""

    name: str
    architecture: str  # transformers' class of the language model
    scorer_architecture: str  # transformers' class of the sequence classifier
    read_config: Callable[[dict[str, Any]], DecoderConfig]
    weights: tuple[Weight, ...]
    render: Callable[..., Sample]  # (conversation, tokenizer: Encoder, open: bool = False, last_only: bool = False)
    stop: tuple[str, ...]  # control tokens that end the assistant's turn, those the tokenizer has
    targets: dict[str, str]  # our logical projection -> their module's name, as adapters are written
    template: str = "auto"  # another family's way to write conversations down (`model.template`)
    answers_apart: bool = False  # each trained answer is a sample of its own: in a later one's history it is written otherwise
    head_optional: bool = False  # a folder without a vocabulary head is tied, unless its config.json says otherwise


def stop_ids(family: Family, tokenizer: Encoder, generation: dict[str, Any] | None = None) -> frozenset[int]:
    """Ids that end an answer: the family's, and those of the folder's generation_config.json (`eos_token_id`)."""
    ids = {tokenizer.specials[name] for name in family.stop if name in tokenizer.specials}
    extra = (generation or {}).get("eos_token_id")
    ids.update([extra] if isinstance(extra, int) else extra or [])
    return frozenset(ids)
