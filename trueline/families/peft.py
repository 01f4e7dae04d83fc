"""Adapters as folders in PEFT's format, in and out. One rule: what does not fit exactly is refused, never loaded in part.

Beside PEFT's two files lies `trueline.json`: the base's path and fingerprint, and how adapters of fused linears were laid into one.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trueline.config.schema import AdapterConfig
from trueline.errors import RunError, UserError
from trueline.families.adapter_files import (
    CONFIG,
    TENSORS,
    fingerprint_of_base,
    note,
    number,
    read_json,
    read_tensors,
    short,
    way_to_base,
    write_folder,
)
from trueline.families.adapter_files import adapter_base as adapter_base
from trueline.families.adapter_files import adapter_template as adapter_template
from trueline.families.adapter_files import is_adapter as is_adapter
from trueline.families.family import Family
from trueline.families.places import PROJECTIONS, Exported, Place, export_lora, half_of, places, unfuse
from trueline.model.adapters import attach_low_rank, attach_prefix, low_ranks, scaled_alpha
from trueline.model.decoder import Decoder, DecoderConfig, halves

ROOT = "base_model.model."
SCORES = ("base_model.model.score.weight", "base_model.score.weight")  # as LoRA and as prefix tuning name it

# Keys that are read here, and keys that say nothing about the finished weights. Any other key must be empty, so that an option of a
# PEFT that is newer than this file is refused rather than overlooked.
PLAIN = {"peft_type", "task_type", "peft_version", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode"}
PLAIN |= {"modules_to_save"}
LORA = {"r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"}
LORA |= {"use_dora"}
LORA |= {"layers_to_transform", "layers_pattern", "init_lora_weights", "bias", "eva_config", "megatron_core", "qalora_group_size"}
PREFIX = {"num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim", "num_transformer_submodules", "encoder_hidden_size"}
PREFIX |= {"prefix_projection", "init_weights"}  # PEFT stores the projection's result, so either kind reads the same
INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # others (pissa, olora, loftq, ...) also change the base weights


@dataclass(frozen=True)
class Base:
    """The model an adapter belongs to: its family, the path or hub id to find it again, and the fingerprint of its weights."""

    family: Family
    path: str
    fingerprint: str | None = None


def adapter_score(folder: str | Path, hidden_size: int) -> Tensor | None:
    """The reward head `[1, D]` saved with an adapter, None if there is none."""
    tensors = read_tensors(Path(folder) / TENSORS)
    found = next((tensors[name] for name in SCORES if name in tensors), None)
    if found is not None and tuple(found.shape) != (1, hidden_size):
        raise UserError(f"{Path(folder) / TENSORS}: the score head has shape {list(found.shape)}, expected [1, {hidden_size}]")
    return found


# ---------------------------------------------------------------------------------------------------------------------------- out


@torch.no_grad()
def save_adapter(
    out: str | Path,
    decoder: Decoder,
    role: str,
    config: AdapterConfig,
    base: Base,
    score: Tensor | None = None,
    inference: bool = True,
    files: Mapping[str, Path] | None = None,
) -> None:
    """Writes `role`'s adapter as a folder that PEFT loads with the same logits; with `score` `[1, D]`, as a sequence classifier's.

    `files` (name -> path), the tokenizer's, are copied beside it.

    The folder appears complete or not at all; one that holds an adapter already is replaced. `inference`: PEFT loads it frozen.
    """
    options: dict[str, Any] = {
        "task_type": "CAUSAL_LM" if score is None else "SEQ_CLS",
        "base_model_name_or_path": base.path,
        "inference_mode": inference,
        "modules_to_save": None if score is None else ["score"],
    }
    blocks: dict[str, dict[str, int]] = {}
    if role in decoder.prefixes:
        prefix = decoder.prefixes[role]
        both = torch.stack((prefix.keys, prefix.values), 1)  # type: ignore[arg-type]  # [L, 2, P, G, d]
        tensors = {"prompt_embeddings": both.permute(2, 0, 1, 3, 4).flatten(1)}
        options |= _prefix_options(decoder.config, both.shape[2])
    else:
        exported = export_lora(decoder, role, base.family)
        tensors, blocks = {ROOT + name: t for name, t in exported.tensors.items()}, exported.blocks
        options |= _lora_options(config, exported)
    if score is not None:
        tensors[SCORES[role in decoder.prefixes]] = score
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise RunError(f"{out}: not saved, because tensor {name!r} holds values that are not finite")
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    where = {"path": base.path, "relative": way_to_base(Path(out), base.path), "fingerprint": base.fingerprint}
    ours = {"base": where | {"template": base.family.template}, "blocks": blocks}
    write_folder(Path(out), tensors, options, ours, files or {})


def _lora_options(config: AdapterConfig, exported: Exported) -> dict[str, Any]:
    root = 0.5 if config.rslora else 1  # alpha is divided by this power of the rank
    usual = scaled_alpha(config) / config.rank
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    by_name: dict[str, dict[str, tuple[int, float]]] = {}
    for path, (rank, alpha) in exported.sizes.items():
        # alpha is made from the config's where it can be: scale * rank may be an ulp off
        alike = math.isclose(alpha, usual * rank, rel_tol=1e-12)
        exact = config.alpha * (rank / config.rank) ** root if alike else alpha / rank * rank**root
        by_name.setdefault(path.rpartition(".")[2], {})[path] = (rank, exact)
    for name, sizes in by_name.items():
        keys = {name: next(iter(sizes.values()))} if len(set(sizes.values())) == 1 else sizes
        rank_pattern |= {k: rank for k, (rank, alpha) in keys.items() if (rank, alpha) != (config.rank, config.alpha)}
        alpha_pattern |= {k: alpha for k, (rank, alpha) in keys.items() if (rank, alpha) != (config.rank, config.alpha)}
    return {
        "peft_type": "LORA",
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted(by_name),
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": config.rslora,
        "use_dora": exported.dora,
    }


def _prefix_options(config: DecoderConfig, tokens: int) -> dict[str, Any]:
    return {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": tokens,
        "num_layers": config.num_layers,
        "num_attention_heads": config.num_kv_heads,  # PEFT cuts token_dim by this number, so it means the key/value heads
        "token_dim": config.num_kv_heads * config.head_dim,
        "num_transformer_submodules": 1,
        "prefix_projection": False,
        "encoder_hidden_size": config.num_kv_heads * config.head_dim,
    }


# ----------------------------------------------------------------------------------------------------------------------------- in


@torch.no_grad()
def load_adapter(folder: str | Path, decoder: Decoder, role: str, base: Base) -> AdapterConfig:
    """Gives `role` the adapter in `folder` (LoRA or prefix tuning, ours or PEFT's own), in the decoder's dtype, and returns what it is.

    Everything is checked before the decoder is touched. A file that lacks a tensor or has one too many, an option that would change the
    result, or an adapter of another base (by fingerprint, names or shapes) is a `UserError`.
    """
    folder = Path(folder)
    options = read_json(folder / CONFIG)
    made_on = fingerprint_of_base(folder)
    if made_on and base.fingerprint and made_on != base.fingerprint:
        raise UserError(
            f"{folder}: this adapter was trained on {adapter_base(folder)[0]} (fingerprint {made_on[:12]}), not on {base.path} "
            f"({base.fingerprint[:12]}); load it on its own base"
        )
    kind = options.get("peft_type")
    if kind not in ("LORA", "PREFIX_TUNING"):
        raise UserError(f"{folder / CONFIG}: peft_type is {kind!r}, expected LORA or PREFIX_TUNING")
    _refuse_options(folder / CONFIG, options, PLAIN | (LORA if kind == "LORA" else PREFIX))
    tensors = {n: t for n, t in read_tensors(folder / TENSORS).items() if n not in SCORES}
    load = _load_lora if kind == "LORA" else _load_prefix
    return load(folder, options, tensors, decoder, role, base)


def _refuse_options(file: Path, options: dict[str, Any], known: set[str]) -> None:
    for name, value in options.items():
        if name not in known and value:
            raise UserError(f"{file}: {name}: {short(value)} is not supported; train or convert the adapter without it")
    if options.get("bias", "none") != "none":
        raise UserError(f"{file}: bias: {short(options['bias'])} is not supported, expected none")
    extra = [m for m in options.get("modules_to_save") or [] if m not in ("score", "classifier")]
    if extra:
        raise UserError(f"{file}: modules_to_save: {short(extra)} is not supported; merge the adapter into its base with PEFT first")
    if options.get("init_lora_weights", True) not in INITS:
        raise UserError(
            f"{file}: init_lora_weights: {short(options['init_lora_weights'])} also changes the base model's weights; "
            "convert the adapter to a plain LoRA with PEFT first (path_initial_model_for_weight_conversion)"
        )


def _load_lora(folder: Path, options: dict[str, Any], tensors: dict[str, Tensor], decoder: Decoder, role: str, base: Base) -> AdapterConfig:
    file = folder / CONFIG
    rank, alpha, dropout = number(file, options, "r", 8), number(file, options, "lora_alpha", 8), options.get("lora_dropout", 0)
    if rank != int(rank) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise UserError(f"{file}: expected a whole number r and lora_dropout from 0 and below 1, found {rank} and {short(dropout)}")
    everywhere = places(base.family, decoder.config)
    pairs = _pairs(folder, options, tensors, everywhere, base)
    blocks = note(folder, "blocks")
    rsqrt = options.get("use_rslora") is True
    dora = options.get("use_dora") is True
    made: dict[int, dict[str, tuple[Tensor, Tensor, float]]] = {}  # id of the half -> projection -> down, up, alpha
    lengths: dict[int, dict[str, Tensor]] = {}  # id of the half -> projection -> magnitudes
    for path, (down, up, *magnitude) in pairs.items():
        place = everywhere[path]
        half = half_of(decoder, place)
        size_in, size_out = getattr(half, place.names[0]).in_features, sum(getattr(half, n).out_features for n in place.names)
        wanted = int(_pattern(file, options, "rank_pattern", path, rank))
        if tuple(down.shape) != (wanted, size_in) or tuple(up.shape) != (size_out, wanted):
            raise UserError(
                f"{folder}: the adapter does not fit {base.path}: {path} has lora_A {list(down.shape)} and lora_B {list(up.shape)}, "
                f"expected [{wanted}, {size_in}] and [{size_out}, {wanted}]"
            )
        if dora:
            lengths.setdefault(id(half), {}).update(_magnitudes(folder, path, place, magnitude[0], size_out, decoder.config))
        scaled = _pattern(file, options, "alpha_pattern", path, alpha) * (math.sqrt(wanted) if rsqrt else 1.0)
        made.setdefault(id(half), {}).update(unfuse(place, down, up, scaled, blocks.get(path, {}), decoder.config))
    for half in halves(decoder):
        parts = made.get(id(half), {})
        attach_low_rank(half, role, {n: (len(down), scaled) for n, (down, _, scaled) in parts.items()}, dropout, dora)
        for n, adapter in low_ranks(half, role).items():
            adapter.down.weight.copy_(parts[n][0])
            adapter.up.weight.copy_(parts[n][1])
            if adapter.magnitude is not None:
                adapter.magnitude.copy_(lengths[id(half)][n])
    targets = tuple(n for n in PROJECTIONS if any(n in parts for parts in made.values()))
    return AdapterConfig(kind="lora", rank=int(rank), alpha=alpha, rslora=rsqrt, dora=dora, dropout=dropout, targets=targets)


def _magnitudes(folder: Path, path: str, place: Place, magnitude: Tensor, size: int, config: DecoderConfig) -> dict[str, Tensor]:
    """DoRA's row lengths by projection; older files hold them as a column or a row."""
    if magnitude.numel() != size:
        raise UserError(f"{folder}: {path}.lora_magnitude_vector has shape {list(magnitude.shape)}, expected [{size}]")
    column = magnitude.reshape(-1, 1)
    parts = place.weight.split(column, config) if place.weight.split else [column]
    return {name: part[:, 0] for name, part in zip(place.names, parts, strict=True)}


def _pairs(
    folder: Path, options: dict[str, Any], tensors: dict[str, Tensor], everywhere: dict[str, Place], base: Base
) -> dict[str, tuple[Tensor, ...]]:
    """Module of theirs -> lora_A, lora_B and, with DoRA, the magnitudes: exactly those the config asks for."""
    wanted = _wanted(folder, options, tensors, everywhere, base)
    kinds = ("lora_A.weight", "lora_B.weight", *(["lora_magnitude_vector"] if options.get("use_dora") is True else []))
    names = {f"{ROOT}{path}.{kind}" for path in wanted for kind in kinds}
    if strange := sorted(tensors.keys() - names):
        raise UserError(
            f"{folder}: the adapter does not fit {base.path}: its tensor {strange[0]!r} has no place there"
            + (f", nor have {len(strange) - 1} others" if len(strange) > 1 else "")
        )
    if missing := sorted(names - tensors.keys()):
        raise UserError(
            f"{folder / TENSORS}: tensor {missing[0]!r} is missing" + (f", and {len(missing) - 1} more" if len(missing) > 1 else "")
        )
    return {path: tuple(tensors[f"{ROOT}{path}.{kind}"] for kind in kinds) for path in wanted}


def _wanted(folder: Path, options: dict[str, Any], tensors: dict[str, Tensor], everywhere: dict[str, Place], base: Base) -> list[str]:
    targets, excluded = options.get("target_modules"), options.get("exclude_modules") or []
    layers = options.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    if not isinstance(layers, list | None):
        raise UserError(f"{folder / CONFIG}: layers_to_transform: expected a list of layer numbers, found {short(layers)}")
    inside = {path: place for path, place in everywhere.items() if layers is None or place.layer in layers}
    if not isinstance(targets, list) or not isinstance(excluded, list):
        # a pattern (no pattern from a file is ever run here): whatever projections are found must be there in every layer that is
        found = [p for p in inside if any(name.startswith(f"{ROOT}{p}.") for name in tensors)]
        kinds, depths = {inside[p].names for p in found}, {inside[p].layer for p in found}
        return [p for p, place in inside.items() if place.names in kinds and place.layer in depths]
    wanted = [p for p in inside if _named(p, targets) and not _named(p, excluded)]
    if not wanted:
        raise UserError(
            f"{folder}: the adapter was made for another kind of model: none of its target_modules ({short(sorted(map(str, targets)))}) "
            f"is in {base.path} ({base.family.name})"
        )
    return wanted


def _load_prefix(
    folder: Path, options: dict[str, Any], tensors: dict[str, Tensor], decoder: Decoder, role: str, base: Base
) -> AdapterConfig:
    shape = decoder.config
    if set(tensors) != {"prompt_embeddings"}:
        raise UserError(f"{folder / TENSORS}: expected the one tensor 'prompt_embeddings', found {short(sorted(tensors))}")
    table = tensors["prompt_embeddings"]
    tokens = int(number(folder / CONFIG, options, "num_virtual_tokens", 0))
    expected = (tokens, shape.num_layers * 2 * shape.num_kv_heads * shape.head_dim)
    theirs = tuple(options.get(n, want) for n, want in (("num_layers", shape.num_layers), ("num_attention_heads", shape.num_kv_heads)))
    if tuple(table.shape) != expected or theirs != (shape.num_layers, shape.num_kv_heads):
        raise UserError(
            f"{folder}: the adapter does not fit {base.path}: prompt_embeddings has shape {list(table.shape)} for {theirs[0]} layers of "
            f"{theirs[1]} key/value heads, expected {list(expected)} for {shape.num_layers} layers of {shape.num_kv_heads}"
        )
    attach_prefix(decoder, role, tokens)
    keys, values = table.view(tokens, shape.num_layers, 2, shape.num_kv_heads, shape.head_dim).permute(2, 1, 0, 3, 4)
    decoder.prefixes[role].keys.copy_(keys)  # type: ignore[operator]
    decoder.prefixes[role].values.copy_(values)  # type: ignore[operator]
    return AdapterConfig(kind="ptuning", tokens=tokens)


def _named(path: str, names: list[Any]) -> bool:
    return any(path == str(n) or path.endswith(f".{n}") for n in names)


def _pattern(file: Path, options: dict[str, Any], key: str, path: str, usual: float) -> float:
    """PEFT's rank_pattern and alpha_pattern: the first key that ends the module's name. Keys are names here, never expressions."""
    if not isinstance(options.get(key, {}), dict | None):
        raise UserError(f"{file}: {key}: expected an object of numbers by module name, found {short(options[key])}")
    for name in options.get(key) or {}:
        plain = name.removeprefix("^")
        if re.search(r"[^\w.]", plain):
            raise UserError(f"{file}: {key}: {short(name)} is a pattern; only module names are supported")
        if path == plain or path.endswith(f".{plain}"):
            return number(file, options[key], name, usual)
    return usual
