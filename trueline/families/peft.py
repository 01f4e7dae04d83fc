"""Adapters as folders in PEFT's format, in and out. One rule: what does not fit exactly is refused, never loaded in part.

Beside PEFT's two files lies `trueline.json`: the base's path and fingerprint, and how adapters of fused linears were laid into one.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trueline.config.schema import AdapterConfig
from trueline.errors import RunError, UserError, disk_full
from trueline.families.family import Family
from trueline.families.places import PROJECTIONS, Exported, Place, export_lora, half_of, places, unfuse
from trueline.model.adapters import attach_low_rank, attach_prefix, halves, low_ranks
from trueline.model.decoder import Decoder, DecoderConfig

CONFIG, TENSORS, OURS = "adapter_config.json", "adapter_model.safetensors", "trueline.json"
ROOT = "base_model.model."
SCORES = ("base_model.model.score.weight", "base_model.score.weight")  # as LoRA and as prefix tuning name it

# Keys that are read here, and keys that say nothing about the finished weights. Any other key must be empty, so that an option of a
# PEFT that is newer than this file is refused rather than overlooked.
PLAIN = {"peft_type", "task_type", "peft_version", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode"}
PLAIN |= {"modules_to_save"}
LORA = {"r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"}
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


def is_adapter(folder: str | Path) -> bool:
    return (Path(folder) / CONFIG).is_file()


def adapter_base(folder: str | Path) -> tuple[str, str | None]:
    """Path or hub id of the model the adapter was trained on, and that model's fingerprint if the adapter is ours."""
    path = _read_json(Path(folder) / CONFIG).get("base_model_name_or_path")
    if not isinstance(path, str) or not path:
        raise UserError(f"{Path(folder) / CONFIG}: base_model_name_or_path is empty; put the path or hub id of the base model there")
    return path, _fingerprint(Path(folder))


def adapter_score(folder: str | Path, hidden_size: int) -> Tensor | None:
    """The reward head `[1, D]` saved with an adapter, None if there is none."""
    tensors = _read_tensors(Path(folder) / TENSORS)
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
    ours = {"base": {"path": base.path, "fingerprint": base.fingerprint, "template": base.family.template}, "blocks": blocks}
    _write_folder(Path(out), tensors, options, ours, files or {})


def _lora_options(config: AdapterConfig, exported: Exported) -> dict[str, Any]:
    usual = config.alpha / config.rank
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    by_name: dict[str, dict[str, tuple[int, float]]] = {}
    for path, (rank, alpha) in exported.sizes.items():
        # alpha is made from the config's where it can be: scale * rank may be an ulp off
        exact = config.alpha * rank / config.rank if math.isclose(alpha, usual * rank, rel_tol=1e-12) else alpha
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
        "use_rslora": False,
        "use_dora": False,
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


def _write_folder(out: Path, tensors: dict[str, Tensor], options: dict[str, Any], ours: dict[str, Any], files: Mapping[str, Path]) -> None:
    if out.exists() and not (out.is_dir() and (is_adapter(out) or not any(out.iterdir()))):
        raise UserError(f"{out}: exists and holds no adapter; choose another folder or remove it")
    new, old = (out.with_name(f".{out.name}.{word}") for word in ("new", "old"))
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        save_file(tensors, new / TENSORS, metadata={"format": "pt"})
        for name, value in ((CONFIG, options), (OURS, ours)):
            (new / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for name, path in files.items():
            shutil.copyfile(path, new / name)
        for file in new.iterdir():
            file.chmod((new / CONFIG).stat().st_mode)  # safetensors' own are for their writer's eyes only
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            out.rename(old)
        new.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(new, ignore_errors=True)
        reason = "the disk is full; free some space and start the same command again" if disk_full(error) else error
        raise RunError(f"{out}: the adapter could not be written ({reason}); nothing was left half-written") from error


# ----------------------------------------------------------------------------------------------------------------------------- in


@torch.no_grad()
def load_adapter(folder: str | Path, decoder: Decoder, role: str, base: Base) -> AdapterConfig:
    """Gives `role` the adapter in `folder` (LoRA or prefix tuning, ours or PEFT's own), in the decoder's dtype, and returns what it is.

    Everything is checked before the decoder is touched. A file that lacks a tensor or has one too many, an option that would change the
    result, or an adapter of another base (by fingerprint, names or shapes) is a `UserError`.
    """
    folder = Path(folder)
    options = _read_json(folder / CONFIG)
    made_on = _fingerprint(folder)
    if made_on and base.fingerprint and made_on != base.fingerprint:
        raise UserError(
            f"{folder}: this adapter was trained on {adapter_base(folder)[0]} (fingerprint {made_on[:12]}), not on {base.path} "
            f"({base.fingerprint[:12]}); load it on its own base"
        )
    kind = options.get("peft_type")
    if kind not in ("LORA", "PREFIX_TUNING"):
        raise UserError(f"{folder / CONFIG}: peft_type is {kind!r}, expected LORA or PREFIX_TUNING")
    _refuse_options(folder / CONFIG, options, PLAIN | (LORA if kind == "LORA" else PREFIX))
    tensors = {n: t for n, t in _read_tensors(folder / TENSORS).items() if n not in SCORES}
    load = _load_lora if kind == "LORA" else _load_prefix
    return load(folder, options, tensors, decoder, role, base)


def _refuse_options(file: Path, options: dict[str, Any], known: set[str]) -> None:
    for name, value in options.items():
        if name not in known and value:
            raise UserError(f"{file}: {name}: {_short(value)} is not supported; train or convert the adapter without it")
    if options.get("bias", "none") != "none":
        raise UserError(f"{file}: bias: {_short(options['bias'])} is not supported, expected none")
    extra = [m for m in options.get("modules_to_save") or [] if m not in ("score", "classifier")]
    if extra:
        raise UserError(f"{file}: modules_to_save: {_short(extra)} is not supported; merge the adapter into its base with PEFT first")
    if options.get("init_lora_weights", True) not in INITS:
        raise UserError(
            f"{file}: init_lora_weights: {_short(options['init_lora_weights'])} also changes the base model's weights; "
            "convert the adapter to a plain LoRA with PEFT first (path_initial_model_for_weight_conversion)"
        )


def _load_lora(folder: Path, options: dict[str, Any], tensors: dict[str, Tensor], decoder: Decoder, role: str, base: Base) -> AdapterConfig:
    file = folder / CONFIG
    rank, alpha, dropout = _number(file, options, "r", 8), _number(file, options, "lora_alpha", 8), options.get("lora_dropout", 0)
    if rank != int(rank) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise UserError(f"{file}: expected a whole number r and lora_dropout from 0 and below 1, found {rank} and {_short(dropout)}")
    everywhere = places(base.family, decoder.config)
    pairs = _pairs(folder, options, tensors, everywhere, base)
    blocks = _note(folder, "blocks")
    rsqrt = options.get("use_rslora") is True
    made: dict[int, dict[str, tuple[Tensor, Tensor, float]]] = {}  # id of the half -> projection -> down, up, alpha
    for path, (down, up) in pairs.items():
        place = everywhere[path]
        half = half_of(decoder, place)
        size_in, size_out = getattr(half, place.names[0]).in_features, sum(getattr(half, n).out_features for n in place.names)
        wanted = int(_pattern(file, options, "rank_pattern", path, rank))
        if tuple(down.shape) != (wanted, size_in) or tuple(up.shape) != (size_out, wanted):
            raise UserError(
                f"{folder}: the adapter does not fit {base.path}: {path} has lora_A {list(down.shape)} and lora_B {list(up.shape)}, "
                f"expected [{wanted}, {size_in}] and [{size_out}, {wanted}]"
            )
        scaled = _pattern(file, options, "alpha_pattern", path, alpha) * (math.sqrt(wanted) if rsqrt else 1.0)
        made.setdefault(id(half), {}).update(unfuse(place, down, up, scaled, blocks.get(path, {}), decoder.config))
    for half in halves(decoder):
        parts = made.get(id(half), {})
        attach_low_rank(half, role, {n: (len(down), scaled) for n, (down, _, scaled) in parts.items()}, dropout)
        for n, adapter in low_ranks(half, role).items():
            adapter.down.weight.copy_(parts[n][0])
            adapter.up.weight.copy_(parts[n][1])
    targets = tuple(n for n in PROJECTIONS if any(n in parts for parts in made.values()))
    alpha *= math.sqrt(rank) if rsqrt else 1.0
    return AdapterConfig(kind="lora", rank=int(rank), alpha=alpha, dropout=dropout, targets=targets)


def _pairs(
    folder: Path, options: dict[str, Any], tensors: dict[str, Tensor], everywhere: dict[str, Place], base: Base
) -> dict[str, tuple[Tensor, Tensor]]:
    """Module of theirs -> lora_A, lora_B: exactly those the config asks for."""
    wanted = _wanted(folder, options, tensors, everywhere, base)
    names = {f"{ROOT}{path}.lora_{half}.weight" for path in wanted for half in "AB"}
    if strange := sorted(tensors.keys() - names):
        raise UserError(
            f"{folder}: the adapter does not fit {base.path}: its tensor {strange[0]!r} has no place there"
            + (f", nor have {len(strange) - 1} others" if len(strange) > 1 else "")
        )
    if missing := sorted(names - tensors.keys()):
        raise UserError(
            f"{folder / TENSORS}: tensor {missing[0]!r} is missing" + (f", and {len(missing) - 1} more" if len(missing) > 1 else "")
        )
    return {path: (tensors[f"{ROOT}{path}.lora_A.weight"], tensors[f"{ROOT}{path}.lora_B.weight"]) for path in wanted}


def _wanted(folder: Path, options: dict[str, Any], tensors: dict[str, Tensor], everywhere: dict[str, Place], base: Base) -> list[str]:
    targets, excluded = options.get("target_modules"), options.get("exclude_modules") or []
    layers = options.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    if not isinstance(layers, list | None):
        raise UserError(f"{folder / CONFIG}: layers_to_transform: expected a list of layer numbers, found {_short(layers)}")
    inside = {path: place for path, place in everywhere.items() if layers is None or place.layer in layers}
    if not isinstance(targets, list) or not isinstance(excluded, list):
        # a pattern (no pattern from a file is ever run here): whatever projections are found must be there in every layer that is
        found = [p for p in inside if any(name.startswith(f"{ROOT}{p}.") for name in tensors)]
        kinds, depths = {inside[p].names for p in found}, {inside[p].layer for p in found}
        return [p for p, place in inside.items() if place.names in kinds and place.layer in depths]
    wanted = [p for p in inside if _named(p, targets) and not _named(p, excluded)]
    if not wanted:
        raise UserError(
            f"{folder}: the adapter was made for another kind of model: none of its target_modules ({_short(sorted(map(str, targets)))}) "
            f"is in {base.path} ({base.family.name})"
        )
    return wanted


def _load_prefix(
    folder: Path, options: dict[str, Any], tensors: dict[str, Tensor], decoder: Decoder, role: str, base: Base
) -> AdapterConfig:
    shape = decoder.config
    if set(tensors) != {"prompt_embeddings"}:
        raise UserError(f"{folder / TENSORS}: expected the one tensor 'prompt_embeddings', found {_short(sorted(tensors))}")
    table = tensors["prompt_embeddings"]
    tokens = int(_number(folder / CONFIG, options, "num_virtual_tokens", 0))
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
        raise UserError(f"{file}: {key}: expected an object of numbers by module name, found {_short(options[key])}")
    for name in options.get(key) or {}:
        plain = name.removeprefix("^")
        if re.search(r"[^\w.]", plain):
            raise UserError(f"{file}: {key}: {_short(name)} is a pattern; only module names are supported")
        if path == plain or path.endswith(f".{plain}"):
            return _number(file, options[key], name, usual)
    return usual


# -------------------------------------------------------------------------------------------------------------------------- files


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: not found; an adapter folder holds {CONFIG} and {TENSORS}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: expected a JSON object, found {_short(value)}")
    return value


def _read_tensors(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        pickled = file.with_name("adapter_model.bin").is_file()
        why = "adapter_model.bin is a pickle, which is never read; save the adapter again as safetensors" if pickled else "not found"
        raise UserError(f"{file}: {why}")
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: damaged or cut short ({error}); copy it again") from None
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise UserError(f"{file}: tensor {name!r} has dtype {tensor.dtype}, expected floating point")
    return tensors


def adapter_template(folder: Path) -> str:
    """The template the adapter was trained with; "auto" is its base's own."""
    return str(_note(folder, "base").get("template", "auto"))


def _note(folder: Path, name: str) -> dict[str, Any]:
    """A section of our own file; empty in a folder that PEFT wrote."""
    section = _read_json(folder / OURS).get(name, {}) if (folder / OURS).is_file() else {}
    if isinstance(section, dict):
        return section
    raise UserError(f"{folder / OURS}: {name}: expected an object, found {_short(section)}")


def _fingerprint(folder: Path) -> str | None:
    return found if isinstance(found := _note(folder, "base").get("fingerprint"), str) else None


def _number(file: Path, options: dict[str, Any], key: str, usual: float) -> float:
    value = options.get(key, usual)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise UserError(f"{file}: {key}: expected a number above 0, found {_short(value)}")
    return value


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
