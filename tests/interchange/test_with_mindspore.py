"""What MindSpore 2.10 itself writes we read, and what we write it reads. Needs MindSpore: TRUELINE_MINDSPORE names a Python that has it,
or is 1, and then one is set up (several GB). The small files under fixtures/ come from the same program."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.interchange.mindspore_side import SHARDS, TYPES, numbers, records
from tests.recipes.commands import Commands
from tests.recipes.toys import Toys
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
        assert torch.equal(pieces.read(name, whole.shape, 2, None), torch.from_numpy(whole)), name
    run(theirs, "read", tmp_path)


def test_data_sets_of_mindrlhf(theirs: Path, toys: Toys, trueline: Commands, tmp_path: Path) -> None:
    """All kinds: MindSpore reads ours by both of its ways, and what it writes of them is for us the same arrays and the same text."""
    lengths = ("--model", toys.model(), "--length", 96, "--prompt-length", 64)
    written: dict[str, list[dict[str, Any]]] = {}
    for kind in ("ppo", "dpo", "reward"):
        trueline("convert", toys.data("cvalues.jsonl"), tmp_path / f"{kind}.mindrecord", "--kind", kind, *lengths).ok()
        written[kind] = list(read_mindrecord(tmp_path / f"{kind}.mindrecord"))
        columns = {name: np.stack([np.asarray(row[name]) for row in written[kind]]) for name in written[kind][0]}
        np.savez(tmp_path / f"{kind}.npz", **columns)
    run(theirs, "kinds", tmp_path)
    for kind, rows in written.items():
        again = list(read_mindrecord(tmp_path / f"theirs-{kind}.mindrecord"))
        assert sorted(map(canonical, again)) == sorted(map(canonical, rows)), kind
        texts = []
        for name in (kind, f"theirs-{kind}"):
            trueline("convert", tmp_path / f"{name}.mindrecord", tmp_path / f"{name}.jsonl", "--model", toys.model()).ok()
            texts.append(sorted((tmp_path / f"{name}.jsonl").read_text("utf-8").splitlines()))
        assert texts[0] == texts[1] and len(texts[0]) == 10


def canonical(row: dict[str, Any]) -> list[tuple[str, str, list[float]]]:
    return [(name, str(getattr(value, "dtype", "number")), np.asarray(value).reshape(-1).tolist()) for name, value in sorted(row.items())]


def test_one_layout_of_ranks_to_another(theirs: Path, toys: Toys, trueline: Commands, tmp_path: Path) -> None:
    """Ours is what MindSpore makes of the same files by strategies; what it saves under its own names is merged back to the model."""
    model = ("--model", toys.model())
    trueline("convert", toys.model(), tmp_path / "one.ckpt").ok()
    trueline("convert", tmp_path / "one.ckpt", tmp_path / "two", *model, "--tensor-parallel", 2, "--data-parallel", 2).ok()
    trueline("convert", tmp_path / "two", tmp_path / "four", *model, "--tensor-parallel", 4).ok()
    run(theirs, "ranks", tmp_path)
    one = {name: stored.read() for name, stored in read_checkpoint(tmp_path / "one.ckpt").items()}
    for folder in ("theirs-four", "run"):
        said = trueline("convert", tmp_path / folder, tmp_path / f"{folder}.ckpt", *model).ok().out
        merged = read_checkpoint(tmp_path / f"{folder}.ckpt")
        assert merged.keys() == one.keys() and all(torch.equal(merged[name].read(), one[name]) for name in one)
    assert "from rank_0/policy_rank_0-2_9.ckpt and its like on 4 ranks" in said
    by_strategy = ("--strategy", tmp_path / "four.strategy", "--out-strategy", tmp_path / "two.strategy", "--tensor-parallel", 4)
    trueline("convert", tmp_path / "theirs-four", tmp_path / "two-again", *model, *by_strategy).ok()
    for rank in range(4):
        old, new = (read_checkpoint(tmp_path / name / f"rank_{rank}" / f"checkpoint_{rank}.ckpt") for name in ("two", "two-again"))
        assert old.keys() == new.keys() and all(torch.equal(old[name].read(), new[name].read()) for name in old)
