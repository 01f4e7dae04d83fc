"""The other side of `judge.py`: run by path, it calls a person's function. It imports nothing of trueline, so it starts at once and small.

Lines of JSON on the standard input and output it was started with; by the time the function's file is loaded, both lead elsewhere.
"""

import importlib.util
import inspect
import json
import numbers
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, TextIO


def main(file: str, name: str) -> None:
    requests, replies = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    silence = os.open(os.devnull, os.O_RDONLY)
    os.dup2(silence, 0)
    os.dup2(2, 1)  # what the function prints cannot reach the replies
    threading.Thread(target=leave_with, args=(os.getppid(),), daemon=True).start()
    try:
        module = load(file)
    except BaseException as error:
        answer(replies, explain(error, file))
        return
    function = getattr(module, name, None)
    if not callable(function):
        answer(replies, {"names": sorted(n for n, x in vars(module).items() if inspect.isfunction(x) and x.__module__ == module.__name__)})
        return
    answer(replies, {})
    for line in requests:
        answer(replies, call(function, json.loads(line), file))


def load(file: str) -> Any:
    """The module in `file`, which may import its neighbours."""
    sys.path.insert(0, os.path.dirname(file))
    spec = importlib.util.spec_from_file_location("reward_function", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def call(function: Callable[..., Any], request: dict[str, Any], file: str) -> dict[str, Any]:
    """The function's numbers, or what was wrong."""
    try:
        parameters = inspect.signature(function).parameters.values()
        every = any(p.kind is p.VAR_KEYWORD for p in parameters)
        asked = {p.name for p in parameters} if not every else {"prompts", "records"}
        result = function(request["answers"], **{k: request[k] for k in ("prompts", "records") if k in asked and request[k] is not None})
        return as_scores(result)
    except BaseException as error:  # sys.exit in a reward function must not look like a reply
        return explain(error, file)


def as_scores(result: Any) -> dict[str, Any]:
    """Numbers of any kind (arrays and tensors too) as plain floats."""
    if hasattr(result, "tolist"):
        result = result.tolist()
    if not isinstance(result, list | tuple):
        return {"wrong": type(result).__name__}
    values = [value.item() if hasattr(value, "item") else value for value in result]
    for i, value in enumerate(values):
        if not isinstance(value, numbers.Real):
            return {"wrong": f"a {type(value).__name__} for answer {i + 1}"}
    return {"scores": [float(value) for value in values]}


def explain(error: BaseException, file: str) -> dict[str, Any]:
    """The error, and the last line of the person's own file that led to it."""
    where = f"{error.filename}:{error.lineno}" if isinstance(error, SyntaxError) else file
    for frame in traceback.extract_tb(error.__traceback__):
        if os.path.abspath(frame.filename) == file:
            where = f"{file}:{frame.lineno}"
    return {"error": "".join(traceback.format_exception_only(error)).strip().splitlines()[-1], "where": where}


def answer(replies: TextIO, reply: dict[str, Any]) -> None:
    sys.stdout.flush()
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


def leave_with(parent: int) -> None:
    """Ends this process when the run is gone, even if the function never returns."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
