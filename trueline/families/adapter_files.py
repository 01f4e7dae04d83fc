"""The files of an adapter folder: PEFT's two, and `trueline.json` beside them. One rule: a folder appears complete or not at all."""

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trueline.errors import RunError, UserError, disk_full

CONFIG, TENSORS, OURS = "adapter_config.json", "adapter_model.safetensors", "trueline.json"


def is_adapter(folder: str | Path) -> bool:
    return (Path(folder) / CONFIG).is_file()


def adapter_base(folder: str | Path) -> tuple[str, str | None]:
    """Path or hub id of the model the adapter was trained on, and that model's fingerprint if the adapter is ours.

    A path that leads nowhere gives way to the one recorded from the adapter's folder, which holds when both were moved together.
    """
    folder = Path(folder)
    path = read_json(folder / CONFIG).get("base_model_name_or_path")
    if not isinstance(path, str) or not path:
        raise UserError(f"{folder / CONFIG}: base_model_name_or_path is empty; put the path or hub id of the base model there")
    near = note(folder, "base").get("relative")
    moved = folder / near if isinstance(near, str) and near else None
    if moved is not None and not Path(path).expanduser().is_dir() and moved.is_dir():
        path = str(moved.resolve())
    return path, fingerprint_of_base(folder)


def adapter_template(folder: Path) -> str:
    """The template the adapter was trained with; "auto" is its base's own."""
    return str(note(folder, "base").get("template", "auto"))


def way_to_base(folder: Path, base: str) -> str | None:
    """The path from an adapter's folder to its base; None for a hub id."""
    place = Path(base).expanduser()
    return Path(os.path.relpath(place.resolve(), folder.resolve())).as_posix() if place.is_dir() else None


def write_folder(out: Path, tensors: dict[str, Tensor], options: dict[str, Any], ours: dict[str, Any], files: Mapping[str, Path]) -> None:
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


def read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: not found; an adapter folder holds {CONFIG} and {TENSORS}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: expected a JSON object, found {short(value)}")
    return value


def read_tensors(file: Path) -> dict[str, Tensor]:
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


def note(folder: Path, name: str) -> dict[str, Any]:
    """A section of our own file; empty in a folder that PEFT wrote."""
    section = read_json(folder / OURS).get(name, {}) if (folder / OURS).is_file() else {}
    if not isinstance(section, dict):
        raise UserError(f"{folder / OURS}: {name}: expected an object, found {short(section)}")
    return section


def fingerprint_of_base(folder: Path) -> str | None:
    found = note(folder, "base").get("fingerprint")
    return found if isinstance(found, str) else None


def number(file: Path, options: dict[str, Any], key: str, usual: float) -> float:
    value = options.get(key, usual)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise UserError(f"{file}: {key}: expected a number above 0, found {short(value)}")
    return value


def short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
