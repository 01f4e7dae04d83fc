"""Runs the command line in forked children: the imports, which are most of a short command's time, happen once.

An export's gate, a process of its own too, is forked from the command: what it imports, transformers and PEFT, is loaded here before the
first export. Gates of exports that tests call as a function start as they do for a person (test_gate.py).

A request a line on standard input, {"start": {...}} or {"wait": pid, "seconds": s}; a child's pid or its exit code a line comes back. No
request trains anything in this process itself: after a backward pass here, a forked child could make none.
"""

import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch

import trueline.recipes.demo  # noqa: F401  loads every recipe
from trueline import cli
from trueline.recipes import export, gate


def serve() -> None:
    torch.set_num_threads(1)
    export.subprocess = SimpleNamespace(run=forked)  # type: ignore[assignment]
    replies = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        answer = wait(request["wait"], request["seconds"]) if "wait" in request else start(request["start"])
        replies.write(f"{answer}\n")
        replies.flush()


@cache
def load_what_gates_import() -> None:
    import_module("peft")
    _ = import_module("transformers").Qwen2ForCausalLM  # its module is loaded now, and what every model's module imports


def start(request: dict[str, Any]) -> int:
    if request["arguments"][:1] == ["export"]:
        load_what_gates_import()
    return fork(lambda: run(request))


def fork(work: Callable[[], int]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        torch.set_num_threads(1)  # makes a thread pool in place of the parent's, which several threads at once may fail to do
        try:
            code = work()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return pid


def forked(command: list[str], *, input: str, env: dict[str, str], **capture: bool) -> "subprocess.CompletedProcess[str]":
    """`subprocess.run` for the gate's command."""
    assert command == [sys.executable, "-m", gate.__name__] and capture == {"capture_output": True, "text": True}

    def work() -> int:
        os.environ.update(env)
        os.dup2(errors.fileno(), 2)
        sys.stdin = io.StringIO(input)
        try:
            gate.main()
        except Exception:  # as Python ends a program
            traceback.print_exc()
            return 1
        return 0

    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        code = os.waitstatus_to_exitcode(os.waitpid(fork(work), 0)[1])
        errors.seek(0)
        return subprocess.CompletedProcess(command, code, "", errors.read())


def run(request: dict[str, Any]) -> int:
    os.chdir(request["cwd"])
    os.environ.update(request["environment"])
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.dup2(os.open(request[name], os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", buffering=1, closefd=False)
    if request["file_limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"], request["file_limit"]))
    sys.argv = ["trueline", *request["arguments"]]
    try:
        return cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)


def wait(pid: int, seconds: float) -> int:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    raise TimeoutError(f"process {pid} was still running after {seconds} s")


if __name__ == "__main__":
    serve()
