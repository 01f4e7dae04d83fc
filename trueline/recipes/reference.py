"""Reference log-probabilities of preference pairs: computed once, stored with the fingerprints of the model and the pairs they belong to.

A file whose fingerprints are not this run's is refused: a reference from another checkpoint is DPO's worst silent bug.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trueline.data.cache import lengths
from trueline.data.sample import Pair
from trueline.data.stream import plan
from trueline.errors import RunError, UserError, disk_full
from trueline.families.folder import fingerprint
from trueline.model.adapters import adapter_parameters, base_parameters
from trueline.model.batch import pack_pairs
from trueline.model.heads import LanguageModel


@torch.no_grad()
def pair_logprobs(model: LanguageModel, pairs: Sequence[Pair], max_tokens: int) -> Tensor:
    """Log-probability of each pair's answers, summed over their trained tokens: `[pairs, 2]` (chosen, rejected) on the CPU."""
    place = model.decoder.embed.weight.device
    rows: list[Tensor] = [torch.empty(0)] * len(pairs)
    for indices in plan(lengths(pairs).tolist(), max_tokens)[0]:
        if indices:
            batch = pack_pairs([pairs[i] for i in indices]).to(place)
            for i, row in zip(indices, batch.per_sequence(model(batch)).view(-1, 2).cpu(), strict=True):
                rows[i] = row
    return torch.stack(rows)


def model_fingerprint(model: LanguageModel) -> str:
    """Hash of every weight that has a say in `model`'s log-probabilities: the trunk, and its role's adapter."""
    decoder, role = model.decoder, model.role
    tensors: dict[str, Tensor] = dict(base_parameters(decoder))
    if role is not None:
        # named without the role: the same adapter is the same model, whatever it is called here
        tensors |= {name.replace(f".{role}.", ".role."): p for name, p in adapter_parameters(decoder, role).items()}
    return fingerprint(sorted((name, p.detach()) for name, p in tensors.items()))


def store_reference(path: Path, logprobs: Tensor, model: str, pairs: str) -> None:
    """Writes `logprobs` `[pairs, 2]` with both fingerprints, atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"logprobs": logprobs.contiguous()}, temporary, metadata={"reference": model, "pairs": pairs})
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        reason = "the disk is full; free some space and start the same command again" if disk_full(error) else error
        raise RunError(f"{path}: the reference could not be written ({reason}); nothing was left there") from None
    finally:
        temporary.unlink(missing_ok=True)


def stored_reference(path: Path, model: str, pairs: str) -> Tensor:
    """The stored `[pairs, 2]`; UserError when they belong to another model or to other pairs."""
    if not path.is_file():
        raise UserError(f"reference.path: {path} does not exist; write it with `trueline prepare` and this configuration")
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            logprobs: Tensor = file.get_tensor("logprobs")
    except (SafetensorError, OSError) as error:
        raise UserError(f"reference.path: {path} cannot be read ({error}); write it again with `trueline prepare`") from error
    for what, wanted, name in (("reference", model, "model"), ("pairs", pairs, "pairs")):
        if found.get(what) != wanted:
            raise UserError(
                f"reference.path: {path} was made for other {name} (fingerprint {str(found.get(what))[:12]}, this run's is {wanted[:12]}); "
                "write it again with `trueline prepare`"
            )
    return logprobs
