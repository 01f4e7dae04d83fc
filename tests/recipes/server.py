"""Runs the command line in forked children: the imports, which are most of a short command's time, happen once.

A request a line on standard input, {"start": {...}} or {"wait": pid, "seconds": s}; a child's pid or its exit code a line comes back. No
request trains anything in this process itself: after a backward pass here, a forked child could make none.
"""

import json
import os
import resource
import sys
import time
from typing import Any

import torch

import trueline.recipes.demo  # noqa: F401  loads every recipe
from trueline import cli


def serve() -> None:
    torch.set_num_threads(1)
    replies = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        answer = wait(request["wait"], request["seconds"]) if "wait" in request else start(request["start"])
        replies.write(f"{answer}\n")
        replies.flush()


def start(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = run(request)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return pid


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
