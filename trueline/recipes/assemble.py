"""From a config's model section to decoders in their roles, and back to a folder.

One rule: what is frozen is shared, what is trained is somebody's own.
"""

import hashlib
import shutil
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from trueline.config.schema import AdapterConfig, ModelConfig, StageConfig
from trueline.data.conversation import Conversation, Message
from trueline.data.files import file_hash
from trueline.data.stream import key
from trueline.data.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from trueline.errors import UserError
from trueline.families.export import save_folder
from trueline.families.family import Family, stop_ids
from trueline.families.folder import ModelFolder, load_decoder, load_score, open_folder, random_decoder, resolve
from trueline.families.peft import Base, adapter_base, adapter_score, adapter_template, is_adapter, load_adapter, save_adapter
from trueline.model.adapters import add_adapter, copy_adapter, low_ranks, merge_adapter, remove_adapter, trainable
from trueline.model.compiled import check_compiler
from trueline.model.decoder import Decoder, halves
from trueline.model.heads import Scorer
from trueline.parallel.world import fast_bfloat16, find_device
from trueline.train.run import CONFIG, saved_settings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
WIDE = 256  # hidden size from which bfloat16 trains 1.7 times as fast or faster on a CPU with AMX; at 64 it is 1.1 (bench/train.py)
C = TypeVar("C", bound=StageConfig)
FOUND = "found"  # the role of an adapter that came with a model


@dataclass(frozen=True)
class Opened:
    """A model as it was found: an adapter that came with it has the role `FOUND`."""

    path: Path  # what was asked for
    folder: ModelFolder  # the model, or the adapter's base
    name: str  # how to find that folder again: a hub id or an absolute path
    tokenizer: Tokenizer | None
    decoder: Decoder
    score: Tensor | None  # [1, D], a reward model's head
    adapter: AdapterConfig | None
    drawn: int | None = None  # the seed of random weights

    @property
    def stop(self) -> frozenset[int]:
        """Ids that end an answer; without a tokenizer those of the folder's own settings."""
        if self.tokenizer:
            return stop_ids(self.folder.family, self.tokenizer, self.folder.generation)
        found = self.folder.generation.get("eos_token_id", self.folder.config.get("eos_token_id"))
        return frozenset([found] if isinstance(found, int) else found or [])

    @property
    def role(self) -> str | None:
        """The role that speaks as the model was found."""
        return FOUND if self.adapter else None

    @property
    def fingerprint(self) -> str:
        """Of the weight files it was read from; an adapter's, then its base's. Random weights have their seed's."""
        if self.drawn is not None:
            return f"random, seed {self.drawn}"
        places = dict.fromkeys((self.path, self.folder.path))
        return " on ".join(files_fingerprint(place) or "random" for place in places)

    def text(self) -> Tokenizer:
        """The tokenizer, or a sentence on how to get one."""
        if self.tokenizer is None:
            raise UserError(f"{self.path} has no tokenizer files; set model.tokenizer to a folder that has them")
        return self.tokenizer


def open_model(config: ModelConfig, seed: int, with_head: bool = True) -> Opened:
    """Reads (or draws) the weights. An adapter folder opens its base too: `config.base`, or the one it records."""
    path, adapted, name, where = _places(config)
    template = adapter_template(path) if adapted and config.template == "auto" else config.template
    folder = open_folder(where, template)
    name = str(where.resolve()) if Path(name).expanduser().is_dir() else name
    device = find_device()
    dtype = DTYPES[config.dtype] if config.dtype != "auto" else torch.float32 if device.type == "cpu" else torch.bfloat16
    drawn = key(seed, "model") if config.init == "random" else None
    if drawn is None:
        decoder = load_decoder(folder, dtype, device, with_head=with_head)
        score = load_score(folder)
    elif adapted:
        raise UserError(f"model.init: random makes no sense for the adapter folder {path}; point model.path at a model folder")
    else:
        decoder, score = random_decoder(folder, dtype, drawn, device, with_head), None
    decoder.recompute = len(decoder.layers) if config.recompute is True else 0  # auto: chosen when the batches are known
    decoder.compile_layers = config.compile
    if config.compile:
        check_compiler(device)
    found = None
    if adapted:
        recorded = adapter_base(path)[1]
        base = Base(folder.family, name, files_fingerprint(where) if recorded else None)  # PEFT's own are judged by their shapes
        found = load_adapter(path, decoder, FOUND, base)
        score = saved if (saved := adapter_score(path, folder.decoder_config.hidden_size)) is not None else score
    tokenizer = _tokenizer(config, path, where)
    _check_blocks(folder, tokenizer)
    return Opened(path, folder, name, tokenizer, decoder, score, found, drawn)


def _check_blocks(folder: ModelFolder, tokenizer: Tokenizer | None) -> None:
    """A prefix-LM's config.json and tokenizer must name the same tokens, or the context would silently be another one."""
    blocks = folder.decoder_config.blocks
    if blocks is None or tokenizer is None:
        return
    probe = folder.family.render(Conversation((Message("user", "a"), Message("assistant", "b"))), tokenizer)
    if blocks.place(probe.tokens) != (probe.context, probe.anchor):
        raise UserError(
            f"{folder.path}: bos_token_id and gmask_token_id of config.json ({blocks.start}, {blocks.masks[0]}) are not <sop> and [gMASK] "
            f"of the tokenizer ({probe.tokens[probe.context]}, {probe.tokens[probe.context - 1]}); one of the two belongs to another model"
        )


def _places(config: ModelConfig) -> tuple[Path, bool, str, Path]:
    """What is opened, whether that is an adapter, and the name and folder of the base."""
    path = resolve(config.path)
    adapted = is_adapter(path)
    if config.base and not adapted:
        raise UserError(f"{path} is not an adapter folder: it has no adapter_config.json, so it has no base")
    name = config.base or (adapter_base(path)[0] if adapted else config.path)
    return path, adapted, name, _base_of(path, name) if adapted and not config.base else resolve(name)


def settle_dtype(config: C) -> C:
    """`config` with the dtype that model.dtype: auto means for training it: the one its run began with, else by device and size.

    A rule, not a timing: the same command must choose the same on every day.
    """
    if config.model.dtype != "auto":
        return config
    dtype = saved_settings(config.run.output / CONFIG).get("model.dtype")
    if dtype not in DTYPES:
        device = find_device()
        wide = base_folder(config.model).decoder_config.hidden_size >= WIDE
        dtype = "bfloat16" if device.type != "cpu" or wide and fast_bfloat16() else "float32"
    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})


def base_folder(config: ModelConfig) -> ModelFolder:
    """The model that is opened, or an adapter's base, without its weights."""
    return open_folder(_places(config)[3], config.template)


def open_text(config: ModelConfig) -> tuple[Family, Tokenizer]:
    """How a model writes conversations down, without its weights."""
    path = resolve(config.path)
    base = _base_of(path, adapter_base(path)[0]) if is_adapter(path) else path
    family, tokenizer = open_folder(base).family, _tokenizer(config, path, base)
    if tokenizer is None:
        raise UserError(f"{path} has no tokenizer files; set model.tokenizer to a folder that has them")
    return family, tokenizer


def _base_of(adapter: Path, name: str) -> Path:
    try:
        return resolve(name)
    except UserError as error:
        advice = "put the base back, or say where it is: --base DIR, or model.base"
        raise UserError(f"{adapter} is an adapter, and its base is not to be had: {error}; {advice}") from None


def speaking(opened: Opened) -> Opened:
    """The model itself, when it is a language model."""
    if opened.score is not None:
        raise UserError(f"{opened.path} is a reward model: it scores answers and cannot write them; give a language model instead")
    return opened


def _tokenizer(config: ModelConfig, path: Path, base: Path) -> Tokenizer | None:
    if config.tokenizer:
        return load_tokenizer(resolve(config.tokenizer))
    return next((load_tokenizer(place) for place in (path, base) if has_tokenizer(place)), None)


def files_fingerprint(folder: Path) -> str | None:
    """sha256 over the weight files' names and bytes, whatever dtype they are later loaded in; None when there are none (random init)."""
    digest = hashlib.sha256()
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        found = file.stat()
        digest.update(f"{file.name} {_file_hash(file.resolve(), found.st_size, found.st_mtime_ns)}\n".encode())
    return digest.hexdigest() if files else None


@lru_cache(maxsize=256)
def _file_hash(file: Path, size: int, changed: int) -> str:
    """`file_hash`, made again only when the file has changed."""
    return file_hash(file)


def train_role(
    opened: Opened, wanted: AdapterConfig, role: str, seed: int, section: str = "model.adapter"
) -> tuple[str | None, dict[str, nn.Parameter]]:
    """Gives the decoder what `wanted` says is trained and freezes the rest.

    Returns the role to run it in (None: the bare weights) and the parameters. An adapter that came with the model goes on being trained
    when it is of the wanted kind and shape; with kind full a LoRA is merged first. `section` of the config says what is wanted.
    """
    decoder, found = opened.decoder, opened.adapter
    if wanted.kind == "full":
        if found is not None and found.kind == "ptuning":
            raise UserError(
                f"{opened.path} holds a ptuning adapter, which cannot be merged into weights, and {section} asks for kind: full; "
                f"set {section}.kind=ptuning to go on training it"
            )
        if found is not None:
            merge_adapter(decoder, FOUND)
        return None, trainable(decoder, None, "full")
    if found is None:
        add_adapter(decoder, role, wanted, key(seed, f"adapter {role}"))
        return role, trainable(decoder, role, wanted.kind)
    shape = ("kind", "rank", "alpha", "rslora", "dora", "targets") if wanted.kind == "lora" else ("kind", "tokens")
    differs = [name for name in shape if _plain(getattr(found, name)) != _plain(getattr(wanted, name))]
    if differs:
        there, asked = (", ".join(f"{n}: {_plain(getattr(adapter, n))}" for n in differs) for adapter in (found, wanted))
        other = ", or export it with --merge and start from that" if found.kind == "lora" else ""
        raise UserError(
            f"{opened.path} holds a {found.kind} adapter with {there}, and {section} asks for {asked}; "
            f"set {section} alike to go on training it{other}"
        )
    copy_adapter(decoder, FOUND, role)
    for half in halves(decoder):
        for adapter in low_ranks(half, role).values():
            adapter.dropout.p = wanted.dropout  # the config says how it goes on, whatever it was trained with before
    return role, trainable(decoder, role, wanted.kind)


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, tuple) else value


def make_scorer(decoder: Decoder, role: str | None, score: Tensor | None) -> Scorer:
    """A scorer on `decoder`, its head from `score` `[1, D]` when there is one, else zero."""
    scorer = Scorer(decoder, role)
    if score is not None:
        with torch.no_grad():
            scorer.score.weight.copy_(score)
    return scorer


def forget_found(opened: Opened) -> None:
    """Takes off the adapter that came with the model, once every role has its copy."""
    remove_adapter(opened.decoder, FOUND)


def publish(out: Path, opened: Opened, role: str | None, adapter: AdapterConfig, score: Tensor | None = None) -> None:
    """The finished model as a folder: whole when all weights were trained, otherwise an adapter folder that names its base.

    Random weights under an adapter are drawn again into `base` beside it, for nobody could use the adapter without them.
    """
    for leftover in out.parent.glob(f".{out.name}.*"):  # of a run that was killed while it wrote this
        shutil.rmtree(leftover, ignore_errors=True)
    if role is None:
        save_folder(out, opened.decoder, opened.folder, opened.tokenizer, score, replace=True)
        return
    name = opened.name
    if opened.drawn is not None:
        name = str((out.parent / "base").resolve())
        fresh = random_decoder(opened.folder, opened.decoder.embed.weight.dtype, opened.drawn)
        save_folder(name, fresh, opened.folder, opened.tokenizer, replace=True)
    where = resolve(name)
    files = opened.tokenizer.files if opened.tokenizer else {}
    save_adapter(out, opened.decoder, role, adapter, Base(opened.folder.family, name, files_fingerprint(where)), score, files=files)
