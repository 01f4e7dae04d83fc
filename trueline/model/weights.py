"""Safetensors in and out: named tensors of a model folder, one at a time. Nothing is ever unpickled, nothing outside the folder is read."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trueline.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in the folder, from the files' headers alone; refuses what `read_tensors` refuses."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, promised in _shards(folder):
        with _opened(path) as file:
            names = set(file.keys())
            if absent := promised - names:
                raise UserError(f"{path}: {INDEX} says {_some(absent)} is in this file, but it is not; copy the folder again")
            if twice := names & shapes.keys():
                raise UserError(f"{path}: {_some(twice)} is also in another file of this folder; remove files that are not this model's")
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in names}
    return shapes


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of `model.safetensors`, or of the shards its index names; at most one is in memory, as it is in the file.

    Refuses with one sentence: no weights, only pickled ones, a file cut short or damaged, an index that leads out of the folder or to
    nothing, a tensor that is not where the index says or is there twice.
    """
    read_shapes(folder)
    for path, _ in _shards(folder):
        with _opened(path) as file:
            for name in file.keys():
                yield name, file.get_tensor(name)


def tensor_places(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """Each tensor's name -> what reads it, and it alone; refuses what `read_tensors` refuses."""

    def read(path: Path, name: str) -> Tensor:
        with _opened(path) as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    found: dict[str, Callable[[], Tensor]] = {}
    read_shapes(folder)
    for path, _ in _shards(folder):
        with _opened(path) as file:
            found |= {name: partial(read, path, name) for name in file.keys()}
    return found


def write_tensors(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: float = 5e9, metadata: dict[str, str] | None = None
) -> list[Path]:
    """Writes `model.safetensors`, or shards of at most `shard_bytes` (one tensor at least) and their index; returns the files.

    Takes the tensors as they come and holds one shard of them. A shard's number is known at the end, so files get their names last.
    """
    metadata = metadata or {"format": "pt"}
    parts: list[Path] = []
    names: list[list[str]] = []
    total = 0
    for shard in _groups(tensors, shard_bytes):
        parts.append(folder / f"part-{len(parts):05d}.tmp")
        names.append(list(shard))
        total += sum(t.nbytes for t in shard.values())
        save_file(shard, parts[-1], metadata=metadata)
    if len(parts) == 1:
        return [parts[0].rename(folder / SINGLE)]
    files = [part.rename(folder / f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors") for i, part in enumerate(parts)]
    placed = {name: file.name for file, held in zip(files, names, strict=True) for name in held}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [*files, folder / INDEX]


def _groups(tensors: Iterable[tuple[str, Tensor]], shard_bytes: float) -> Iterator[dict[str, Tensor]]:
    """Shards in the order of the tensors; an empty model is one empty shard."""
    shard: dict[str, Tensor] = {}
    size = 0
    seen: set[str] = set()
    for name, tensor in tensors:
        if name in seen:
            raise ValueError(f"two tensors are called {name}")
        seen.add(name)
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        # a view of a larger tensor would drag all of it along, and the format refuses shared memory
        tensor = tensor.detach().cpu()
        shard[name] = tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor.contiguous()
        size += tensor.nbytes
    yield shard


def _shards(folder: Path) -> list[tuple[Path, set[str]]]:
    """The weight files and, where an index names them, the tensors each must hold."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if (folder / SINGLE).is_file() or (folder / SINGLE).is_symlink():
        return [(_inside(folder, SINGLE, "the folder"), set())]
    if (folder / INDEX).is_file():
        promised: dict[str, set[str]] = {}
        for name, file in _weight_map(folder / INDEX).items():
            promised.setdefault(file, set()).add(name)
        return [(_inside(folder, file, INDEX), names) for file, names in sorted(promised.items())]
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    if pickled:
        raise UserError(
            f"{folder}: only pickled weights ({pickled[0]}), which can run code when opened and are never read here; if you trust them, "
            "convert them once with transformers: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    raise UserError(f"{folder}: no weights, expected {SINGLE} or {INDEX}; for random weights set model.init: random")


def _weight_map(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise UserError(
            f"{path}: not a readable index ({problem!r}), expected an object with `weight_map`; copy the folder again"
        ) from None
    if not isinstance(found, dict) or not found or not all(isinstance(v, str) for v in found.values()):
        raise UserError(f"{path}: weight_map must name a file for each tensor; copy the folder again")
    return found


def _inside(folder: Path, name: str, who: str) -> Path:
    """The file `name` of the folder, after refusing any way out of it. A hub cache's own links (snapshot to blob) are inside."""
    path = folder / name
    if Path(name).is_absolute() or "\\" in name or len(Path(name).parts) != 1 or name in ("", ".", ".."):
        raise UserError(f"{folder}: {who} names {name!r}, which is not a file of this folder; refused")
    real = path.resolve()
    homes = [folder.resolve()]
    if homes[0].parent.name == "snapshots":
        homes.append(homes[0].parent.parent / "blobs")
    if real.parent not in homes:
        raise UserError(f"{path}: is a link that leads out of its folder; refused, put the file itself there")
    if not real.is_file():
        raise UserError(f"{path}: {who} names this file, but it is not there; copy the folder again")
    return path


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The library checks the whole header: sizes, offsets without gaps or overlaps, and that the file is as long as it says."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as problem:
        raise UserError(f"{path}: cut short or damaged ({problem}); copy or download it again") from None


def _some(names: set[str]) -> str:
    first, *others = sorted(names)
    return first + (f" (and {len(others)} more)" if others else "")
