"""`trueline ...` as a person types it, each in a process of its own (see server.py)."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    def ok(self) -> "Done":
        assert self.code == 0, f"exit code {self.code}\n{self.out}\n{self.err}"
        return self

    def refused(self, code: int = 2) -> str:
        """Standard error of a command that failed with a sentence: no traceback, no trueline's own mistake."""
        assert self.code == code, f"exit code {self.code}, expected {code}\n{self.out}\n{self.err}"
        assert "Traceback" not in self.err and "internal error" not in self.err, self.err
        assert self.err.strip()
        return self.err


class Commands:
    """Starts commands; calling it runs one to its end."""

    def __init__(self, scratch: Path):
        settings = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "tests.recipes.server"]
        self.server = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | settings, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.scratch, self.count = scratch, 0

    def __call__(self, *arguments: str | Path, **options: object) -> Done:
        return self.start(*arguments, **options).wait()

    def start(
        self, *arguments: str | Path, cwd: Path | None = None, stdin: str = "", file_limit: int = 0, **environment: object
    ) -> "Started":
        self.count += 1
        names = {name: self.scratch / f"{self.count}.{name}" for name in ("stdin", "stdout", "stderr")}
        names["stdin"].write_text(stdin, encoding="utf-8")
        request = {"arguments": [str(a) for a in arguments], "cwd": str(cwd or self.scratch), "file_limit": file_limit}
        request |= {"environment": {k: str(v) for k, v in environment.items()}, **{k: str(v) for k, v in names.items()}}
        return Started(self, self.ask({"start": request}), names["stdout"], names["stderr"])

    def ask(self, request: dict[str, object]) -> int:
        assert self.server.stdin and self.server.stdout
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def close(self) -> None:
        self.server.kill()
        self.server.communicate()


@dataclass(frozen=True)
class Started:
    commands: Commands
    pid: int
    stdout: Path
    stderr: Path

    def wait(self, seconds: float = 120.0) -> Done:
        code = self.commands.ask({"wait": self.pid, "seconds": seconds})
        return Done(code, self.stdout.read_text("utf-8"), self.stderr.read_text("utf-8"))

    def signal(self, number: signal.Signals) -> "Started":
        os.kill(self.pid, number)
        return self

    def until(self, condition: Callable[[], bool], seconds: float = 60.0) -> "Started":
        """Waits for something the command does."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it never came"
            time.sleep(0.002)
        return self
