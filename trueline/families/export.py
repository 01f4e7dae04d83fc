"""Decoders out as Hugging Face folders that any other tool can load. A folder appears complete, under its name, or not at all."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from trueline.data.conversation import Conversation, Message
from trueline.data.files import sync
from trueline.errors import RunError, UserError, disk_full
from trueline.families.family import Encoder, Family, stop_ids
from trueline.families.folder import SCORE, TEMPLATE, ModelFolder, fingerprint, weight_slots
from trueline.model.decoder import Decoder
from trueline.model.weights import write_tensors

# places on somebody's disk, code that is not in the folder, labels of a classifier
DROPPED = ("_name_or_path", "auto_map", "id2label", "label2id", "num_labels", "problem_type")
PADS = ("<|endoftext|>", "<pad>", "<|finetune_right_pad_id|>", "<|reserved_special_token_0|>", "<s>", "<|end_of_text|>")


class SavedTokenizer(Encoder, Protocol):
    """What an exported folder needs of a tokenizer."""

    files: dict[str, Path]
    config: dict[str, Any]  # tokenizer_config.json


def export_tensors(decoder: Decoder, family: Family, score: Tensor | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every weight under their name, fused ones joined, a tied head left out; with `score` `[1, D]`, as a classifier (no vocabulary head).

    Adapters have to be merged or removed before: leaving them out would export the bare model without a word. Values that are not finite
    are a RunError.
    """
    if any(".adapters." in name or name.startswith("prefixes.") for name, _ in decoder.named_parameters()):
        raise ValueError("this decoder carries adapters; merge or remove them first")
    for name, (weight, parameters) in weight_slots(decoder, family).items():
        if score is not None and weight.ours == ("head.weight",):
            continue
        parts = [parameter.detach() for parameter in parameters]
        yield name, _finite(name, weight.join(parts, decoder.config) if weight.join else parts[0])
    if score is not None:
        yield SCORE, _finite(SCORE, score.detach().to(decoder.embed.weight.dtype))


def save_folder(
    out: str | Path,
    decoder: Decoder,
    folder: ModelFolder,
    tokenizer: SavedTokenizer | None = None,
    score: Tensor | None = None,
    replace: bool = False,
    shard_bytes: float = 5e9,
    hashes: dict[str, str] | None = None,
) -> None:
    """Writes config.json, generation_config.json, the tokenizer's files and safetensors, then renames the whole into place.

    `folder` is where the decoder came from; `score` `[1, D]` makes it a reward model (a sequence classifier of one label). An `out` that is
    there and not empty is refused unless `replace`. A disk that is full, or cannot be written, is a RunError and leaves nothing behind.
    `hashes` is filled with what `fingerprint` says of each tensor, before it is written.
    """
    out = Path(out)
    if score is None and decoder.head is None:
        raise ValueError("a decoder without a vocabulary head can only be saved with a score head")
    if out.exists() and not (out.is_dir() and (replace or not any(out.iterdir()))):
        raise UserError(f"{out}: is already there; name a new folder, or remove this one first")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write(temporary, decoder, folder, tokenizer, score, shard_bytes, hashes)
        for path in temporary.iterdir():
            path.chmod((temporary / "config.json").stat().st_mode)  # safetensors' own are for their writer's eyes only
            sync(path)
        sync(temporary)
        _publish(temporary, out)
    except (OSError, SafetensorError) as problem:
        reason = "the disk is full; free some space and start the same command again" if disk_full(problem) else problem
        raise RunError(f"{out}: could not be written ({reason}); nothing was left there") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(
    place: Path,
    decoder: Decoder,
    folder: ModelFolder,
    tokenizer: SavedTokenizer | None,
    score: Tensor | None,
    shard_bytes: float,
    hashes: dict[str, str] | None,
) -> None:
    family = folder.family
    pad = _padding(folder, tokenizer) if score is not None else folder.config.get("pad_token_id")
    for name, path in (tokenizer.files if tokenizer else {}).items():
        shutil.copyfile(path, place / name)
    config = {key: value for key, value in folder.config.items() if key not in DROPPED}
    config["architectures"] = [family.architecture if score is None else family.scorer_architecture]
    config["dtype" if "dtype" in config else "torch_dtype"] = str(decoder.embed.weight.dtype).removeprefix("torch.")
    if family.template != "auto":
        config[TEMPLATE] = family.template
    if config["model_type"] != family.name:
        config["_name_or_path"] = family.name  # of the four that are called chatglm; nothing else tells two of them apart
    if pad is not None:
        config["pad_token_id"] = pad
    if score is not None:
        config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        _name_padding(place / "tokenizer_config.json", tokenizer, pad)
    else:
        generation = folder.generation | ({"eos_token_id": sorted(stop_ids(family, tokenizer, folder.generation))} if tokenizer else {})
        if generation:
            _write_json(place / "generation_config.json", generation)
    _write_json(place / "config.json", config)
    tensors = export_tensors(decoder, family, score)
    write_tensors(place, tensors if hashes is None else _noted(tensors, hashes), shard_bytes)


def _noted(tensors: Iterator[tuple[str, Tensor]], hashes: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        hashes[name] = fingerprint([(name, tensor)])
        yield name, tensor


def _padding(folder: ModelFolder, tokenizer: SavedTokenizer | None) -> int | None:
    """The id that pads a classifier's rows. transformers scores the last token that is not this one, so no answer may end in it."""
    configured = folder.config.get("pad_token_id")
    if tokenizer is None:
        return configured
    probe = folder.family.render(Conversation((Message("user", "a"), Message("assistant", "b"))), tokenizer)
    names = {i: name for name, i in tokenizer.specials.items()}
    likely = [tokenizer.config.get("pad_token"), names.get(configured) if configured is not None else None, *PADS]
    ids = [tokenizer.specials[name] for name in likely if isinstance(name, str) and name in tokenizer.specials]
    return next((i for i in ids if i != probe.tokens[-1]), configured)


def _name_padding(path: Path, tokenizer: SavedTokenizer | None, pad: int | None) -> None:
    """Makes the copied tokenizer pad with the same token, so that padded rows score as they do alone."""
    name = next((name for name, i in tokenizer.specials.items() if i == pad), None) if tokenizer else None
    if tokenizer and path.is_file() and name is not None and tokenizer.config.get("pad_token") != name:
        _write_json(path, tokenizer.config | {"pad_token": name})


def _publish(temporary: Path, out: Path) -> None:
    """A folder that is there goes only once its successor is complete."""
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    if out.exists():
        os.rename(out, old)
    os.rename(temporary, out)
    shutil.rmtree(old, ignore_errors=True)
    sync(out.parent)


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise RunError(f"not saved, because tensor {name!r} holds values that are not finite")
    return tensor


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
