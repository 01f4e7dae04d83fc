"""The three ways a command ends early, each with one sentence for the person who typed it.

`UserError` is a mistake in usage, configuration or data (exit code 2), `RunError` a run that could not go on (exit code 1),
`Interrupted` a run that was told to stop and saved first (130 or 143). None of them is ever shown with a traceback.
"""

import errno
import os
from collections.abc import Iterable

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(Exception):
    """Wrong usage, configuration or data: what, where, what was expected, what to do. `problems` lists all of one kind."""

    exit_code = 2

    def __init__(self, message: str, problems: Iterable[str] = ()):
        self.problems = list(problems)
        super().__init__("\n".join([message, *(f"  {p}" for p in self.problems)]))


class RunError(Exception):
    """The run failed although it was asked for correctly: a full disk, a non-finite loss, a reward function that died."""

    exit_code = 1


class Interrupted(Exception):
    """The run was told to stop and has saved; the message says where. `exit_code` is 130 after Ctrl-C and 143 after SIGTERM."""

    def __init__(self, message: str, exit_code: int = 130):
        self.exit_code = exit_code
        super().__init__(message)


def disk_full(error: Exception) -> bool:
    """Whether something could not be written for lack of room; safetensors tells so in words of its own."""
    if isinstance(error, OSError):
        return error.errno in NO_ROOM
    return any(f"os error {number})" in str(error) for number in NO_ROOM)


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out: Python's, an accelerator's (by name: this floor has no torch), or the CPU allocator's."""
    said = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or any(words in str(error) for words in said)


def compiler_failed(error: BaseException) -> bool:
    """Whether torch's compiler failed, or a file that it keeps: by names, as above."""
    kept = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    return type(error).__module__.startswith(("torch._inductor", "torch._dynamo")) or bool(kept) and str(kept) in str(error)


def first_words(error: BaseException) -> str:
    """The first line of what `error` says, past the one in which torch's compiler says that something was raised; or its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.endswith("raised:")]
    return lines[0] if lines else type(error).__name__
