"""What MindSpore 2.10 itself writes we read, and what we write it reads. Needs MindSpore: TRUELINE_MINDSPORE names a Python that has it,
or is 1, and then one is set up (several GB). The small files under fixtures/ come from the same program."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.interchange.mindspore_side import SHARDS, TYPES, numbers, records
from trueline.data.mindrecord import read_mindrecord, write_mindrecord
from trueline.interchange.mindspore_checkpoint import read_checkpoint, write_checkpoint
from trueline.interchange.mindspore_ranks import Pieces, read_strategies, write_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    named = os.environ.get("TRUELINE_MINDSPORE")
    if not named:
        pytest.skip("TRUELINE_MINDSPORE is not set")
    python = Path(named)
    if named == "1":
        place = tmp_path_factory.mktemp("mindspore")
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        python = place / "bin" / "python"
        subprocess.run([str(python), "-m", "pip", "install", "-q", "mindspore==2.10.*", "numpy<2"], check=True)
    return python


def run(python: Path, what: str, folder: Path) -> None:
    program = Path(__file__).with_name("mindspore_side.py")
    done = subprocess.run([str(python), str(program), what], cwd=folder, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and done.stdout.endswith("done\n"), f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def ours() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(numbers(6, 4)).to(getattr(torch, kind)) for name, kind in TYPES.items()}


def test_each_side_reads_the_other(theirs: Path, tmp_path: Path) -> None:
    run(theirs, "write", tmp_path)
    for file in ("theirs.ckpt", "theirs-crc.ckpt"):
        found = read_checkpoint(tmp_path / file)
        for name, tensor in ours().items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name].read(), tensor), (file, name)
    large = read_checkpoint(tmp_path / "theirs-large.ckpt")["large"]
    assert len(large.spans) == 2 and torch.equal(large.read(), torch.from_numpy(numbers(150_000, 1000)))
    for shards in SHARDS:
        rows = list(read_mindrecord(tmp_path / (f"theirs{shards}.mindrecord" + ("0" if shards > 1 else ""))))
        assert len(rows) == 15
        for found_row, row in zip(sorted(rows, key=lambda row: row["number"]), records(), strict=True):
            for name, value in row.items():
                assert np.array_equal(found_row[name], value) and getattr(found_row[name], "dtype", 0) == getattr(value, "dtype", 0), name
    write_checkpoint(tmp_path / "ours.ckpt", ours().items())
    write_checkpoint(tmp_path / "ours-pieces.ckpt", ours().items(), 16)
    write_checkpoint(tmp_path / "ours-large.ckpt", [("large", torch.from_numpy(numbers(150_000, 1000)))])
    kinds = {"ids": "int64", "small": "int32", "single": "float32", "double": "float64"}
    for shards in SHARDS:
        write_mindrecord(tmp_path / f"ours{shards}.mindrecord", kinds, records(), shards)
    layouts = read_strategies(tmp_path / "strategy.ckpt")
    wholes = {"rows": numbers(8, 4), "columns": numbers(4, 8), "norm": numbers(1, 8)[0]}
    write_ranks(tmp_path / "ranks", ((name, torch.from_numpy(whole), layouts[name]) for name, whole in wholes.items()), 4)
    pieces = Pieces.open(tmp_path / "ranks", tmp_path / "strategy.ckpt")
    for name, whole in wholes.items():
        assert torch.equal(pieces.read(name, whole.shape, 2), torch.from_numpy(whole)), name
    run(theirs, "read", tmp_path)
