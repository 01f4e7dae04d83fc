"""`native.c`, compiled on the machine it runs on. One rule: what gives other numbers than PyTorch's own operations here is not used.

PyTorch's products of a few rows wait for memory and multiply by turns, and each takes 25 microseconds to be called. Without a C compiler,
or on a CPU that is not named in `FLAGS`, `packed.py` does the same work by them.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from trueline.errors import first_words
from trueline.parallel.kernels import tried

SOURCE = Path(__file__).with_name("native.c")
FLAGS = {"AVX2": ("-mavx2", "-mfma"), "AVX512": ("-mavx512f", "-mavx512dq", "-mfma")}  # by torch's name of the CPU
OPTIONS = ("-O3", "-fopenmp", "-shared", "-fPIC")
STEP = 16  # what sizes that are summed over are multiples of
AFTER, HOW = {"none": 0, "swish": 1, "gelu": 2}, {"add": 1, "mul": 2}


class Kernels:
    """What the library computes, in float32. Raises nothing: who calls sees to shapes and dtypes."""

    def __init__(self, library: ctypes.CDLL):
        pointer, number, real = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
        self._linear, self._rms_norm, self._attend = library.linear, library.rms_norm, library.attend
        self._linear.argtypes = [pointer] * 5 + [number] * 6
        self._rms_norm.argtypes = [pointer] * 3 + [number] * 2 + [real, number]
        self._attend.argtypes = [pointer] * 8 + [number] * 10
        for function in (self._linear, self._rms_norm, self._attend):
            function.restype = None

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, then: str, other: Tensor | None = None, how: str = "add") -> Tensor:
        """`then` ("swish", "gelu" by tanh, or "none") of x W' + b, "add" or "mul" `other`: `x` `[T, in]` -> `[T, out]`.

        `in` is a multiple of `STEP`. For few rows: each weight is read once for four of them.
        """
        x, (out, size) = x.contiguous(), weight.shape
        other = None if other is None else other.contiguous()
        y = x.new_empty(len(x), out)
        code = 0 if other is None else HOW[how]
        self._linear(
            x.data_ptr(), weight.data_ptr(), _place(bias), _place(other), y.data_ptr(),
            len(x), size, out, AFTER[then], code, torch.get_num_threads(),
        )  # fmt: skip
        return y

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * `weight` of each row of `x` `[T, D]`, D a multiple of `STEP`."""
        x = x.contiguous()
        y = torch.empty_like(x)
        self._rms_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), *x.shape, eps, torch.get_num_threads())
        return y

    def attend(
        self,
        heads: Tensor,
        turn: Tensor,
        keys: Tensor,
        values: Tensor,
        pages: Tensor | None,
        index: Tensor,
        longest: int,
        window: int | None,
    ) -> Tensor:
        """Each request's newest token: turned, stored, and what it sees of itself and of what came before -> `[N, G, H / G, d]`.

        `heads` `[N, G, H / G + 2, d]`: a key head's queries, its key, its value; queries and keys are turned in place, channels side by
        side, by `turn` `[N, 1, pairs]` complex. `keys`, `values` `[rows, G, columns, d]`, or with `pages` `[N, most]` int32
        `[pages, G, page size, d]`: token number `index` `[N]` int64 is stored there. `longest`: no `index` is larger, or as large.
        `window`: tokens seen, the newest included. d is a multiple of `STEP`.
        """
        (n, groups, parts, size), threads = heads.shape, torch.get_num_threads()
        most = -(-longest // STEP) * STEP
        seen, scratch = heads.new_empty(n, groups, parts - 2, size), heads.new_empty(threads * (parts - 2) * most)
        many = 0 if pages is None else pages.shape[1]
        self._attend(
            heads.data_ptr(), turn.data_ptr(), keys.data_ptr(), values.data_ptr(), _place(pages), index.data_ptr(), seen.data_ptr(),
            scratch.data_ptr(), n, groups, parts - 2, size, turn.shape[-1], keys.shape[2], many, most, window or 0, threads,
        )  # fmt: skip
        return seen


def _flags() -> tuple[str, ...] | None:
    return FLAGS.get(torch.backends.cpu.get_cpu_capability()) if sys.platform == "linux" else None


def _compiler() -> list[str]:
    found = shutil.which("cc") or shutil.which("gcc")
    return os.environ.get("CC", "").split() or ([found] if found else [])


def lacks_compiler() -> bool:
    """Whether a C compiler is what `kernels` would need here."""
    return _flags() is not None and not _compiler()


@cache
def kernels() -> Kernels | None:
    """The library for this CPU, or None: without a compiler silently, and with a warning where what it made cannot be used."""
    flags, found = _flags(), _compiler()
    if flags is None or not found:
        return None
    return tried(SOURCE.name, lambda: _loaded([*found, *OPTIONS, *flags]), _right)


def _loaded(command: list[str]) -> Kernels | None:
    library = ctypes.CDLL(str(_built(command)))
    return Kernels(library) if _shares_threads(library) else None


def _built(command: list[str]) -> Path:
    """The library, made once: in the user's own folder, for in one that others write to they could lay libraries that are loaded."""
    folder = Path("~/.cache/trueline/native").expanduser()
    path = folder / f"{hashlib.sha256(SOURCE.read_bytes() + repr(command).encode()).hexdigest()[:16]}.so"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as made:
            new = Path(made) / "native.so"
            done = subprocess.run([*command, "-o", new, SOURCE, "-lm"], capture_output=True)
            if done.returncode:
                raise OSError(f"{command[0]} does not compile it ({first_words(OSError(done.stderr.decode(errors='replace')))})")
            new.replace(path)
    return path


def _shares_threads(library: ctypes.CDLL) -> bool:
    """Whether its threads are PyTorch's own: those of a second OpenMP would wait for one another."""
    torches = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    ours, theirs = (ctypes.cast(of.omp_get_max_threads, ctypes.c_void_p).value for of in (library, torches))
    return ours == theirs


def _right(made: Kernels) -> bool:
    """Tried on a few numbers."""
    x, weight = torch.linspace(-1, 1, 5 * 32).view(5, 32), torch.linspace(-1, 1, 52 * 32).sin().view(52, 32)
    y = F.linear(x, weight, weight[:, 0])
    pairs = [(made.linear(x, weight, weight[:, 0].contiguous(), "none", y, "mul"), y * y)]
    pairs += [(made.linear(x, weight, None, "swish"), F.silu(F.linear(x, weight)))]
    pairs += [(made.rms_norm(x, weight[1], 1e-3), F.rms_norm(x, (32,), weight[1], 1e-3))]
    heads, keys = weight[:6].view(2, 1, 3, 32).clone(), weight[:8].view(2, 1, 4, 32).clone()
    past, turn = keys.clone(), torch.zeros(2, 1, 0, dtype=torch.complex64)
    past[:, :, 2] = heads[:, :, 1]
    expected = F.scaled_dot_product_attention(heads[:, :, :1], past[:, :, :3], torch.cat((keys[:, :, :2], heads[:, :, 2:]), 2))
    pairs += [(made.attend(heads, turn, keys, keys.clone(), None, torch.tensor([2, 2]), 3, None), expected), (keys, past)]
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in pairs)


def _place(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
