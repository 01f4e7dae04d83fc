"""Rewards from a person's own Python function. One rule: it runs in a process that can be killed, and speaks to us in numbers only."""

import contextlib
import difflib
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from trueline.errors import RunError, UserError

WORKER = Path(__file__).with_name("judge_worker.py")
START_SECONDS = 60.0  # importing the file may load a large library


class Judge:
    """The function `spec` = `file.py:name`, held ready in its own process while the `with` block lasts.

    It is called with the list of answers, and with `prompts=` and `records=` if it has such parameters; it returns one finite number per
    answer. What it prints goes to the file `output`, or to standard error. A call that takes longer than `timeout` seconds is killed with
    everything it started.
    """

    def __init__(self, spec: str, timeout: float, output: Path | None = None):
        file, colon, name = spec.rpartition(":")
        if not (file and colon and name.isidentifier()):
            raise UserError(f"reward.function: {spec!r} is not of the form file.py:function")
        if not Path(file).is_file():
            raise UserError(f"reward.function: there is no file {file}")
        self.spec, self.file, self.name = spec, Path(file).resolve(), name
        self.timeout, self.output = timeout, output
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        # by path, not as a module: the child imports nothing of ours, so neither torch; -P keeps our folder off its import path
        command = [sys.executable, "-P", str(WORKER), str(self.file), self.name]
        with contextlib.ExitStack() as files:
            errors = files.enter_context(self.output.open("ab")) if self.output else None
            # its own session: Ctrl-C is for the run, which then ends it; and one kill reaches all that the function started
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True)
        try:
            hello = self._exchange(None, max(self.timeout, START_SECONDS), "to load")
            if "error" in hello:
                raise UserError(f"reward.function: {self.spec} cannot be loaded: {hello['error']} at {hello['where']}")
            if "names" in hello:
                near = difflib.get_close_matches(self.name, hello["names"], n=1)
                known = f"did you mean {near[0]}?" if near else f"its functions are {', '.join(hello['names']) or 'none'}"
                raise UserError(f"reward.function: {self.file} has no function {self.name}; {known}")
        except BaseException:
            self.kill()
            raise
        return self

    def score(
        self, answers: Sequence[str], prompts: Sequence[Any] | None = None, records: Sequence[Mapping[str, Any]] | None = None
    ) -> list[float]:
        """One number per answer. RunError, and the end of the process, when the function fails, is late, or returns anything else."""
        if not answers:
            return []
        request = {"answers": list(answers), "prompts": _listed(prompts), "records": _listed(records)}
        try:
            reply = self._exchange(request, self.timeout, f"for {len(answers)} answers")
            if "error" in reply:
                raise RunError(f"reward function {self.spec} failed: {reply['error']} at {reply['where']}")
            return self._checked(reply, len(answers))
        except BaseException:
            self.kill()
            raise

    def _checked(self, reply: Mapping[str, Any], count: int) -> list[float]:
        if "wrong" in reply:
            raise RunError(f"reward function {self.spec} returned {reply['wrong']}; expected a list of {count} numbers")
        scores: list[float] = reply["scores"]
        if len(scores) != count:
            raise RunError(f"reward function {self.spec} returned {len(scores)} numbers for {count} answers; expected one for each")
        for i, score in enumerate(scores):
            if not math.isfinite(score):
                raise RunError(f"reward function {self.spec} returned {score} for answer {i + 1} of {count}; expected a finite number")
        return scores

    def _exchange(self, request: object, seconds: float, purpose: str) -> dict[str, Any]:
        """Sends a line (unless None) and waits for the answering one."""
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise RunError(f"reward function {self.spec}: its process is not running")
        with _deadline(process, seconds) as late:
            try:
                if request is not None:
                    process.stdin.write(json.dumps(request).encode() + b"\n")
                    process.stdin.flush()
                line = process.stdout.readline()
            except BrokenPipeError:
                line = b""
        if late.is_set():
            advice = "raise reward.timeout or make it faster"
            raise RunError(f"reward function {self.spec} took longer than {seconds:g} s {purpose} and was killed; {advice}")
        if not line.endswith(b"\n"):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1.0)
            raise RunError(f"reward function {self.spec}: its process ended (exit code {process.returncode}) before it answered")
        found: dict[str, Any] = json.loads(line)
        return found

    def kill(self) -> None:
        """Ends the process and all it started."""
        process, self._process = self._process, None
        if process is None:
            return
        _kill_group(process)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # what it never read is lost with it
                    pipe.close()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()


@contextlib.contextmanager
def _deadline(process: subprocess.Popen[bytes], seconds: float) -> Iterator[threading.Event]:
    """Kills the process after so many seconds, which ends any write to it and any read from it, and sets the event."""
    late = threading.Event()

    def end() -> None:
        late.set()
        _kill_group(process)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nothing of it is left
        os.killpg(process.pid, signal.SIGKILL)


def _listed(values: Sequence[Any] | None) -> list[Any] | None:
    return None if values is None else list(values)
