"""What must not matter to a step does not: into which micro-batches, packs and ranks its samples are split."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.invariants.two_ranks import gradients, pairs, partition
from trueline.parallel.world import World


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys() and len(a) > 10
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(0, 5), min_size=len(pairs()), max_size=len(pairs())))
def test_any_split_into_micro_batches_gives_the_same_gradient(homes: list[int]) -> None:
    whole, values = gradients([pairs()], World())
    split, others = gradients(partition(pairs(), homes), World())
    assert largest_difference(whole, split) < 1e-12
    assert others == pytest.approx(values, abs=1e-12)
    assert max(float(g.abs().max()) for g in whole.values()) > 1e-3  # and there is one


@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_s_rows_give_the_same_gradient(tied: bool) -> None:
    parts = partition(pairs(), [0, 1, 0, 1, 2, 0])
    rows, values = gradients(parts, World(), tied=tied)
    whole, others = gradients(parts, World(), sparse=False, tied=tied)
    assert largest_difference(rows, whole) < 1e-12 and ("head.weight" in rows) == (not tied)
    assert others == pytest.approx(values, abs=1e-12)


def test_two_ranks_give_the_same_gradient(tmp_path: Path) -> None:
    """gloo, uneven shares: one rank has two micro-batches of four pairs in all, the other two of two."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in range(2):
        environment = os.environ | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "WORLD_SIZE": "2",
            "RANK": str(rank),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "tests.invariants.two_ranks"]
        root = Path(__file__).resolve().parents[2]
        with (tmp_path / str(rank)).open("w") as file:  # a pipe that nobody reads yet would hold one rank up while the other leaves
            ranks.append(subprocess.Popen(command, env=environment, cwd=root, stdout=file))
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    answers = [json.loads((tmp_path / str(rank)).read_text().splitlines()[-1]) for rank in range(2)]
    whole, values = gradients([pairs()], World())
    for found, metrics in answers:
        assert largest_difference(whole, {name: torch.tensor(g, dtype=torch.float64) for name, g in found.items()}) < 1e-12
        assert metrics == pytest.approx(values, abs=1e-12)
