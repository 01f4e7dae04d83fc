"""The command line on the pretended device, in forked children: tests/recipes/server.py, and what the device counted.

A command's `PRETEND_MEMORY` is the bytes that the device has; what was counted is written to the file `PRETEND_REPORT`.
"""

import json
from pathlib import Path
from typing import Any

from tests.accelerator import pretend  # before torch
from tests.recipes import server
from trueline.model.attention import varlen_kernel
from trueline.rollout import decode

varlen_kernel()  # imported here, once; whether it is right is tried in each child
decode.PROGRAMS = 1  # Triton's interpreter runs one after the other: the past is not split
plainly = server.run


def run(request: dict[str, Any]) -> int:
    environment = request["environment"]
    if size := int(environment.get("PRETEND_MEMORY", 0)):
        pretend.limit(size)
    try:
        return plainly(request)
    finally:
        if "PRETEND_REPORT" in environment:
            Path(environment["PRETEND_REPORT"]).write_text(json.dumps(pretend.report()))


if __name__ == "__main__":
    server.run = run
    server.serve()
