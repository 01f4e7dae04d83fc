"""The engine on the pretended device answers as on the CPU: with Triton's kernel and recorded steps, and plainly."""

import importlib.util
import json
import subprocess
import sys
from functools import cache
from typing import Any

import pytest

from tests.recipes.commands import ROOT
from tests.recipes.toys import FAMILIES, Toys

pytestmark = pytest.mark.slow

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed; it is there for Linux on x86 and Arm only")
# Triton's interpreter is slow: one with partial rotation, one with windows, one with places
WAYS = {"triton": ("glm", "qwen3", "chatglm", "qwen2:lora"), "plain": (*FAMILIES, "glm:lora", "glm:ptuning")}


@pytest.fixture(scope="module")
def answers(environment: dict[str, str], toys: Toys) -> Any:
    """What answers.py printed, by family."""

    @cache
    def run(way: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "tests.accelerator.answers", str(toys.home), way, *WAYS[way]]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0 and "going on without" not in done.stderr, done.stderr
        return {found["family"]: found for found in map(json.loads, done.stdout.splitlines())}

    return run


@pytest.mark.parametrize(
    ("way", "family"),
    [pytest.param(way, family, marks=needs_triton if way == "triton" else ()) for way in WAYS for family in WAYS[way]],
)
def test_answers_are_the_cpu_s_also_after_an_update_in_place(answers: Any, way: str, family: str) -> None:
    found = answers(way)[family]
    tokens, logprobs = ([[[answer[i] for answer in held] for held in found[where]] for where in ("cpu", "device")] for i in (0, 1))
    assert tokens[1] == tokens[0] and tokens[0][0] != tokens[0][1]
    for held in range(2):
        for expected, got in zip(logprobs[0][held], logprobs[1][held], strict=True):
            assert got == pytest.approx(expected, abs=1e-4)
    counts = found["counts"]
    if way == "plain":
        assert not counts["launches"] and not counts["graphs"]
    else:
        assert counts["launches"] and counts["graphs"] and counts["replays"] > counts["graphs"]
