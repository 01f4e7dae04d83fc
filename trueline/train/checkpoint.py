"""Checkpoints on disk. One rule: what carries the name step-N is whole, for its manifest was written last and one rename published it.

<run>/checkpoints/step-000100/   *.safetensors, state.json, manifest.json (size and SHA-256 of the others)
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trueline.data.files import file_hash, sync
from trueline.errors import RunError, UserError, disk_full

FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.json"
_NAME = re.compile(r"step-(\d{6,})")
_MARGIN = 1 << 20  # headers, JSON and directory entries


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint: the state after `step` optimizer steps."""

    path: Path
    step: int


def save(folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int) -> Checkpoint:
    """Publishes `tensors` (file name without suffix -> name -> tensor) and `state` (JSON) as `folder`'s newest checkpoint.

    When the new one verifies, all but the `keep` newest go, and so do those of higher steps: they are of a future that was left when the
    run was resumed before them. RunError for a tensor that is not finite and for a full disk; earlier checkpoints stay as they were.
    """
    _check_finite(step, tensors)
    home = folder / "checkpoints"
    part, final = home / f"step-{step:06d}.tmp", home / f"step-{step:06d}"
    size = tensor_bytes(tensors)
    try:
        home.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        require_space(home, size, f"the checkpoint of step {step}")
        _write(part, step, tensors, _to_json(step, state))
        _publish(part, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise RunError(_explain(error, home, step, size)) from error
    reason = damage(final)
    if reason:
        raise RunError(f"{final} was written but does not read back: {reason}; the disk may be failing, earlier checkpoints were kept")
    _prune(home, step, keep)
    return Checkpoint(final, step)


def load(checkpoint: Checkpoint) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """What `save` was given: tensors by file name, on the CPU, and the state."""
    files = sorted(checkpoint.path.glob("*.safetensors"))
    state = json.loads((checkpoint.path / STATE).read_text("utf-8"))
    return {file.stem: load_file(file) for file in files}, state


def steps(folder: Path) -> list[int]:
    """Steps of all published checkpoints, verified or not, ascending."""
    home = folder / "checkpoints"
    names = [path.name for path in home.iterdir() if path.is_dir()] if home.is_dir() else []
    return sorted(int(match[1]) for match in map(_NAME.fullmatch, names) if match)


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, if any, and a line for each newer one that does not: which, and why."""
    skipped: list[str] = []
    for step in reversed(steps(folder)):
        found = _at(folder, step)
        reason = damage(found.path)
        if reason is None:
            return found, skipped
        skipped.append(f"{found.path} is damaged: {reason}")
    return None, skipped


def choose(folder: Path, resume: Literal["auto", "never"] | int) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint `run.resume` asks for (None: start afresh), and why newer ones were passed over.

    UserError for never in a folder with checkpoints, for a step that is not there or damaged, and when none of several verifies.
    """
    found = steps(folder)
    listed = f"{folder / 'checkpoints'} holds {'step' if len(found) == 1 else 'steps'} {', '.join(map(str, found))}"
    if resume == "never":
        if found:
            raise UserError(f"run.resume is never, but {listed}; set run.resume=auto to go on, or start afresh in another run.output")
        return None, []
    if resume == "auto":
        chosen, skipped = newest(folder)
        if chosen is None and skipped:
            raise UserError(f"no checkpoint in {folder} verifies; set run.output to another folder to start afresh", skipped)
        return chosen, skipped
    if resume not in found:
        there = listed if found else f"{folder} has no checkpoints"
        raise UserError(f"run.resume is {resume}, but {there}; set run.resume=auto or a step that exists")
    wanted = _at(folder, resume)
    reason = damage(wanted.path)
    if reason:
        raise UserError(f"run.resume is {resume}, but {wanted.path} is damaged: {reason}; set run.resume=auto for the newest sound one")
    return wanted, []


def damage(path: Path) -> str | None:
    """Why the checkpoint at `path` must not be used; None when every byte is as it was written."""
    try:
        raw = (path / MANIFEST).read_bytes()
        manifest = json.loads(raw)
        if _canonical(manifest) != raw:
            return f"{MANIFEST} is not as it was written"
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']}, this program reads {FORMAT}"
        if path.name != f"step-{manifest['step']:06d}":
            return f"its manifest is of step {manifest['step']}"
        listed, there = {*manifest["files"], MANIFEST}, {p.name for p in path.iterdir()}
        for name in sorted(listed ^ there):
            return f"{name} is missing" if name in listed else f"{name} does not belong to it"
        for name, expected in manifest["files"].items():
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes, expected {expected['bytes']}"
            if file_hash(path / name) != expected["sha256"]:
                return f"{name} is not as it was written (SHA-256 differs)"
    except FileNotFoundError as error:
        return f"{Path(error.filename or '').name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"cannot be read ({error})"
    return None


def tidy(folder: Path, newest: Checkpoint, keep: int) -> None:
    """Finishes what a kill cut short: old checkpoints go, if `newest` (which has been verified) really is the newest there."""
    if steps(folder)[-1:] == [newest.step]:
        _prune(folder / "checkpoints", newest.step, keep)


def remove_leftovers(folder: Path) -> None:
    """Takes away what a kill inside a save or a pruning left; only the holder of the folder may."""
    for path in (folder / "checkpoints").glob("step-*.tmp"):
        shutil.rmtree(path)


def require_space(folder: Path, size: int, what: str) -> None:
    """RunError when the disk of `folder` (made or not) has less than `size` bytes free for `what`."""
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < size + _MARGIN:
        advice = "free some space or set run.output to another disk"
        raise RunError(f"disk full: {what} needs {size:,} bytes, {folder} has {free:,} free; {advice}")


def tensor_bytes(tensors: Mapping[str, Mapping[str, Tensor]]) -> int:
    """Bytes that `tensors` take on disk."""
    return sum(x.numel() * x.element_size() for part in tensors.values() for x in part.values())


def _write(part: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: str) -> None:
    part.mkdir()
    for name, group in tensors.items():
        save_file({key: x.detach().cpu().contiguous() for key, x in group.items()}, part / f"{name}.safetensors")
    (part / STATE).write_text(state, "utf-8")
    files = {}
    for path in sorted(part.iterdir()):
        sync(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": file_hash(path)}
    (part / MANIFEST).write_bytes(_canonical({"format": FORMAT, "step": step, "files": files}))
    sync(part / MANIFEST)
    sync(part)


def _publish(part: Path, final: Path) -> None:
    if final.exists():
        if damage(final) is None and (final / MANIFEST).read_bytes() == (part / MANIFEST).read_bytes():
            shutil.rmtree(part)  # saved already, to the last bit
            return
        doomed = _give_up(final)
        part.rename(final)
        shutil.rmtree(doomed)
    else:
        part.rename(final)
    sync(final.parent)


def _prune(home: Path, step: int, keep: int) -> None:
    found = steps(home.parent)
    kept = [n for n in found if n <= step][-keep:]
    for n in found:
        if n not in kept:
            shutil.rmtree(_give_up(home / f"step-{n:06d}"))


def _give_up(path: Path) -> Path:
    """Takes its name away before it is removed, so that a kill half-way leaves no damaged step-N behind."""
    return path.rename(path.with_name(f"{path.name}.old.tmp"))


def _check_finite(step: int, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    for file, group in tensors.items():
        for name, x in group.items():
            if x.is_floating_point() and not x.isfinite().all():
                raise RunError(f"step {step}: {name} ({file}.safetensors) is not finite; nothing was saved, the last checkpoint is sound")


def _to_json(step: int, state: Mapping[str, Any]) -> str:
    try:
        return json.dumps(state, ensure_ascii=False, allow_nan=False, sort_keys=True, indent=1) + "\n"
    except ValueError as error:
        raise RunError(f"step {step}: the state to be saved holds a number that is not finite ({error})") from error


def _canonical(manifest: object) -> bytes:
    """The one way a manifest is written, so that any change of its bytes shows."""
    return (json.dumps(manifest, sort_keys=True, indent=1) + "\n").encode()


def _at(folder: Path, step: int) -> Checkpoint:
    return Checkpoint(folder / "checkpoints" / f"step-{step:06d}", step)


def _explain(error: OSError | SafetensorError, home: Path, step: int, size: int) -> str:
    left = steps(home.parent)
    kept = f"the checkpoint of step {left[-1]} is untouched" if left else "there is no earlier checkpoint"
    if disk_full(error):
        advice = "free some space and start the same command again"
        return f"disk full: the checkpoint of step {step} needs {size:,} bytes in {home}; {kept}; {advice}"
    return f"the checkpoint of step {step} could not be written in {home}: {error}; {kept}"
