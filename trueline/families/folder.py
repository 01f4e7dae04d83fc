"""Hugging Face model folders in. One rule: no tensor may be missing, left over or of another shape; and no code in a folder runs."""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trueline.errors import UserError
from trueline.families.family import Family, Weight
from trueline.families.table import family_of, with_template
from trueline.model.decoder import Decoder, DecoderConfig, adjoin, init_weights
from trueline.model.weights import read_shapes, read_tensors

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
WANTED = ["*.json", "*.safetensors", "merges.txt", "tokenizer.model", "ice_text.model", "chat_template.jinja"]  # never code, never pickles
SCORE = "score.weight"
TEMPLATE = "trueline_template"  # key of config.json: the template a model was trained with, where it is not its family's own
SHOWN = 50  # problems listed one by one
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelFolder:
    """A model folder whose config.json was understood; its weights have not been looked at."""

    path: Path
    config: dict[str, Any]
    generation: dict[str, Any]  # generation_config.json, {} without one
    family: Family
    decoder_config: DecoderConfig
    kind: Literal["causal", "classifier"]


def _download(*which: str, **files: list[str]) -> str:
    """The hub's client is loaded here, where it is needed: a tenth of a second of every start, and 8 MB."""
    return str(import_module("huggingface_hub").snapshot_download(*which, **files))


def resolve(name: str | Path, download: Callable[..., str] = _download) -> Path:
    """The folder itself when it is there, else the hub's model of that id (`org/name`): its JSON, safetensors and tokenizer files only."""
    if not str(name):
        raise UserError("the model's name is empty, expected a folder or a hub id (org/name)")
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{path}: is a file, expected a model folder")
    if not HUB_ID.fullmatch(str(name)):
        raise UserError(f"{path}: no such folder, and not a hub id (org/name) either")
    try:
        return Path(download(str(name), allow_patterns=WANTED, ignore_patterns=["*/*"]))
    except Exception as problem:  # the hub's client lets every kind of network error through
        reason = f"{type(problem).__name__}: {problem}".splitlines()[0]
        raise UserError(f"{name}: no such folder here, and no model of that id could be had from the hub ({reason})") from None


def open_folder(path: str | Path, template: str = "auto") -> ModelFolder:
    """Reads config.json; an unknown model type, or an option this decoder has not, is refused with what would do."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder, expected a model folder with config.json")
    if not (path / "config.json").is_file():
        hint = ""
        if (path / "adapter_config.json").is_file():
            hint = "; it is an adapter's folder, and adapter_config.json names its model"
        elif (path / "run.json").is_file():
            hint = f"; it is a run's folder, whose model is {path / 'model'}"
            hint += "" if (path / "model").is_dir() else " once it is finished"
        raise UserError(f"{path}: no config.json, so not a model folder{hint}")
    config = _read_json(path / "config.json")
    generation = _read_json(path / "generation_config.json") if (path / "generation_config.json").is_file() else {}
    try:
        family = with_template(family_of(config), template if template != "auto" else config.get(TEMPLATE, "auto"))
        if config.get("quantization_config"):
            raise UserError("config.json: quantization_config, but quantised weights are not supported; use the model's unquantised folder")
        decoder_config = family.read_config(config)
        if family.head_optional and "tie_word_embeddings" not in config and any(path.glob("*.safetensors")):
            decoder_config = replace(decoder_config, tied_embeddings="lm_head.weight" not in read_shapes(path))
    except UserError as problem:
        raise UserError(f"{path}: {problem}") from None
    if config.get("auto_map") and any(path.glob("*.py")):
        log.warning("%s: brings its own code (auto_map), which is never run; the built-in %s model is used", path, family.name)
    names = config.get("architectures") or [family.architecture]
    kind: Literal["causal", "classifier"] = "classifier" if any("SequenceClassification" in str(n) for n in names) else "causal"
    return ModelFolder(path, config, generation, family, decoder_config, kind)


def load_decoder(folder: ModelFolder, dtype: torch.dtype, device: torch.device | str = "cpu", with_head: bool = True) -> Decoder:
    """The folder's decoder in `dtype`, holding each weight once plus one tensor on its way in.

    A classifier has no vocabulary head, so neither has its decoder. Everything that does not fit is one UserError.
    """
    decoder = hollow_decoder(folder, with_head)
    slots = weight_slots(decoder, folder.family)
    _check_weights(folder, slots)
    materialise(decoder, dtype, device)
    slots = weight_slots(decoder, folder.family)
    spare, head = None, _head_name(folder.family)
    with torch.no_grad():
        for name, tensor in read_tensors(folder.path):
            if not tensor.is_floating_point():
                raise UserError(f"{folder.path}: {name} holds {tensor.dtype}, expected floating point; quantised weights are not supported")
            if name in slots:
                weight, parameters = slots[name]
                parts = weight.split(tensor, decoder.config) if weight.split else [tensor]
                for parameter, part in zip(parameters, parts, strict=True):
                    parameter.copy_(part)
            elif name == head:
                spare = tensor
    if spare is not None and decoder.head is not None and not torch.equal(spare.to(dtype), decoder.head.weight.cpu()):
        raise UserError(
            f"{folder.path}: {head} is not the embedding, but config.json says tie_word_embeddings: true; set it to false"
        )
    return decoder


def random_decoder(
    folder: ModelFolder, dtype: torch.dtype, seed: int, device: torch.device | str = "cpu", with_head: bool = True
) -> Decoder:
    """A decoder of the folder's sizes with random weights; one seed is one model, whatever the dtype, the device and the head."""
    decoder = hollow_decoder(folder, with_head)
    materialise(decoder, dtype, "cpu")
    init_weights(decoder, torch.Generator().manual_seed(seed))
    _replace_weights(decoder, lambda drawn: drawn.detach().to(device))
    return decoder


def load_score(folder: ModelFolder) -> Tensor | None:
    """A classifier's head `[1, D]` as it is in the file; None for a language model."""
    if folder.kind == "causal":
        return None
    shape, wanted = read_shapes(folder.path).get(SCORE), (1, folder.decoder_config.hidden_size)
    if shape != wanted:
        found = "missing" if shape is None else f"shape {list(shape)}"
        raise UserError(f"{folder.path}: {SCORE}: {found}, expected {list(wanted)}; a reward model has exactly one label")
    return next(tensor for name, tensor in read_tensors(folder.path) if name == SCORE)


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over names, dtypes, shapes and bytes; the order they come in does not matter."""
    digests = []
    for name, tensor in tensors:
        digest = hashlib.sha256(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        digests.append(f"{name} {digest.hexdigest()}")
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()


def weight_slots(decoder: Decoder, family: Family) -> dict[str, tuple[Weight, list[nn.Parameter]]]:
    """Their tensor name -> its row of the table and our parameters in it, in the model's order. A tied head is absent."""
    parameters = dict(decoder.named_parameters())
    found = {}
    for weight, layer in _rows(family, decoder.config.num_layers):
        names = [name.format(layer) for name in weight.ours]
        if all(name in parameters for name in names):
            found[weight.theirs.format(layer)] = (weight, [parameters[name] for name in names])
    return found


def _rows(family: Family, layers: int) -> Iterator[tuple[Weight, int]]:
    for per_layer, rows in groupby(family.weights, lambda weight: "{}" in weight.theirs):
        block = list(rows)
        for layer in range(layers) if per_layer else (0,):
            yield from ((weight, layer) for weight in block)


def hollow_decoder(folder: ModelFolder, with_head: bool) -> Decoder:
    """Shapes without memory."""
    with torch.device("meta"):
        return Decoder(folder.decoder_config, with_head and folder.kind == "causal")


def materialise(decoder: Decoder, dtype: torch.dtype, device: torch.device | str) -> None:
    """Gives every parameter its memory, uninitialised."""
    _replace_weights(decoder, lambda hollow: torch.empty(hollow.shape, dtype=dtype, device=device))


def _replace_weights(decoder: Decoder, make: Callable[[nn.Parameter], Tensor]) -> None:
    """Each parameter by another one, a tied head by the embedding's.

    Module.to_empty gives a tied head memory of its own, and so does Module.to on a device that is not torch's own (PrivateUse1).
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in decoder.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            if old not in made:
                made[old] = nn.Parameter(make(old))
            setattr(module, name, made[old])
    if decoder.embed.weight.device.type != "cpu":  # there each product is a launch; on a CPU answers come from packed copies
        adjoin(decoder)


def _check_weights(folder: ModelFolder, slots: dict[str, tuple[Weight, list[nn.Parameter]]]) -> None:
    """Names and shapes, from the files' headers, before anything is read."""
    shapes = read_shapes(folder.path)
    wanted = {}
    for name, (weight, parts) in slots.items():
        whole = weight.join([p.detach() for p in parts], folder.decoder_config) if weight.join else parts[0]
        wanted[name] = tuple(whole.shape)
    config = folder.decoder_config
    # a trunk alone leaves the head where it is; a tied head may be written out a second time
    optional: dict[str, tuple[int, ...]] = {_head_name(folder.family): (config.vocab_size, config.hidden_size)}
    if folder.kind == "classifier":
        optional |= {SCORE: shapes.get(SCORE, ())}
    problems = [f"{name}: missing" for name in wanted if name not in shapes]
    for name, shape in shapes.items():
        expected = wanted.get(name, optional.get(name))
        if expected is None and not name.endswith(("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")):  # a buffer that older files carry
            problems.append(f"{name}: no part of this {folder.family.name} model")
        elif expected is not None and shape != expected:
            problems.append(f"{name}: shape {list(shape)}, expected {list(expected)}")
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise UserError(f"{folder.path}: the weights are not those config.json describes:", [*problems[:SHOWN], *more])


def _head_name(family: Family) -> str:
    return next(weight.theirs for weight in family.weights if weight.ours == ("head.weight",))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise UserError(f"{path}: cannot be read as JSON ({problem})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value
