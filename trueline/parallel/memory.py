"""How much memory a device has left, and how much was taken. One rule: what another process or a control group may not give is not free."""

import math
import mmap
import resource
from pathlib import Path

import torch
from torch import Tensor

NO_LIMIT = 1 << 60  # cgroups write "no limit" as a number near 2^63
UNKNOWN = 1 << 62  # where the system does not tell


def zeros_on_demand(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros on the CPU that take memory only as they are written, page by page: torch.zeros writes all of them at once."""
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)  # a page would be 2 MB
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def peak_memory_mb(device: torch.device | None = None) -> float:
    """Most memory so far, in MiB: of an accelerator what its allocator held, otherwise this process's largest resident set."""
    if device is not None and device.type != "cpu":
        return torch.accelerator.max_memory_reserved(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take on `device`; on a CPU the lower of what the machine and its control group have left."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free_on_host()


def free_on_host(root: Path = Path("/")) -> int:
    """MemAvailable of /proc/meminfo, or what the limit of any control group around this process leaves where that is less."""
    known = root / "proc/meminfo"
    lines = known.read_text().splitlines() if known.is_file() else []
    left = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.is_file() else ():
        _, kinds, path = line.split(":", 2)
        if kinds not in ("", "memory"):
            continue
        home = root / "sys/fs/cgroup" / kinds
        inside = home / path.lstrip("/")
        for folder in (inside, *inside.parents):
            left += _left_in(folder, ("memory.max", "memory.current") if not kinds else ("memory.limit_in_bytes", "memory.usage_in_bytes"))
            if folder == home:
                break
    return max(min(left, default=UNKNOWN), 0)


def _left_in(folder: Path, names: tuple[str, str]) -> list[int]:
    """What the group's limit leaves, if it has one; the pages of files it has read can be given back."""
    limit, used = (folder / name for name in names)
    if not (limit.is_file() and used.is_file()) or not (text := limit.read_text().strip()).isdigit() or int(text) > NO_LIMIT:
        return []
    stat = folder / "memory.stat"
    fields = dict(line.split() for line in stat.read_text().splitlines()) if stat.is_file() else {}
    files = int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))
    return [int(text) - int(used.read_text()) + files]
