"""What is saved comes back bit for bit, what is kept and pruned, and which checkpoint a resumed run takes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trueline.errors import RunError, UserError
from trueline.train.checkpoint import Checkpoint, choose, damage, load, newest, remove_leftovers, require_space, save, steps, tensor_bytes

STATE = {"samples": 12345678901234, "kl_coefficient": 0.1 + 0.2, "名": "状态", "nested": {"list": [1, 2.5, None, True]}}


def tensors(seed: int = 0) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(8, 6, generator=generator)
    return {
        "model": {"a.weight": wide, "b": wide.to(torch.bfloat16), "turned": wide.T, "double": wide.double()},
        "optimizer": {"step": torch.tensor(3.0), "ids": torch.arange(5), "empty": torch.empty(0, 4)},
    }


def fill(folder: Path, *wanted: int, keep: int = 10) -> None:
    for step in wanted:
        save(folder, step, tensors(step), {"step": step}, keep)


def spoil(folder: Path, step: int) -> None:
    path = folder / "checkpoints" / f"step-{step:06d}" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_round_trip_is_exact(tmp_path: Path) -> None:
    saved = save(tmp_path, 100, tensors(), STATE, keep=1)
    assert saved.path == tmp_path / "checkpoints" / "step-000100" and damage(saved.path) is None
    found, state = load(saved)
    assert state == STATE
    for file, group in tensors().items():
        assert found[file].keys() == group.keys()
        for name, x in group.items():
            assert found[file][name].dtype == x.dtype and torch.equal(found[file][name], x), name


def test_the_folder_holds_safetensors_and_json_only(tmp_path: Path) -> None:
    saved = save(tmp_path, 3, tensors(), STATE, keep=1)
    assert sorted(p.name for p in saved.path.iterdir()) == ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    manifest = json.loads((saved.path / "manifest.json").read_text())
    assert manifest["step"] == 3 and manifest["files"].keys() == {"model.safetensors", "optimizer.safetensors", "state.json"}


def test_the_newest_are_kept(tmp_path: Path) -> None:
    fill(tmp_path, 1, 2, 3, 10, 1_000_000, 1_000_001, keep=2)
    assert steps(tmp_path) == [1_000_000, 1_000_001]
    assert [p.name for p in (tmp_path / "checkpoints").glob("*.tmp")] == []


def test_a_future_that_was_left_is_pruned(tmp_path: Path) -> None:
    """Resumed from 20 with steps 30 and 40 there: after saving 25, those are not the newest any more."""
    fill(tmp_path, 10, 20, 30, 40)
    fill(tmp_path, 25, keep=3)
    assert steps(tmp_path) == [10, 20, 25]


def test_saving_the_same_step_again(tmp_path: Path) -> None:
    fill(tmp_path, 5, 5)
    save(tmp_path, 5, tensors(99), {"step": 5}, keep=2)
    assert torch.equal(
        load(Checkpoint(tmp_path / "checkpoints" / "step-000005", 5))[0]["model"]["a.weight"], tensors(99)["model"]["a.weight"]
    )
    spoil(tmp_path, 5)
    fill(tmp_path, 5)
    assert damage(tmp_path / "checkpoints" / "step-000005") is None and steps(tmp_path) == [5]


def test_leftovers_of_a_kill_go_with_the_next_save(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    for name in ("step-000002.tmp", "step-000001.old.tmp"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "model.safetensors").write_text("half")
    assert newest(tmp_path)[0] == Checkpoint(tmp_path / "checkpoints" / "step-000001", 1)
    fill(tmp_path, 2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000001", "step-000002"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_saved(tmp_path: Path, bad: float) -> None:
    fill(tmp_path, 1)
    with pytest.raises(RunError, match="step 2: b .model.safetensors. is not finite; nothing was saved"):
        save(tmp_path, 2, {"model": {"a": torch.ones(2), "b": torch.tensor([1.0, bad])}}, {}, keep=1)
    with pytest.raises(RunError, match="step 2: the state to be saved holds a number that is not finite"):
        save(tmp_path, 2, tensors(), {"kl_coefficient": bad}, keep=1)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000001"]


def test_the_newest_sound_one_is_taken_and_the_reason_given(tmp_path: Path) -> None:
    fill(tmp_path, 10, 20, 30, 40)
    spoil(tmp_path, 40)
    (tmp_path / "checkpoints" / "step-000030" / "manifest.json").unlink()
    found, skipped = choose(tmp_path, "auto")
    assert found is not None and found.step == 20
    assert [re.sub(r".*(step-\d+)", r"\1", line) for line in skipped] == [
        "step-000040 is damaged: model.safetensors is not as it was written (SHA-256 differs)",
        "step-000030 is damaged: manifest.json is missing",
    ]


def test_auto_starts_afresh_in_an_empty_folder_only(tmp_path: Path) -> None:
    assert choose(tmp_path / "not there", "auto") == choose(tmp_path, "auto") == choose(tmp_path, "never") == (None, [])
    fill(tmp_path, 1)
    spoil(tmp_path, 1)
    with pytest.raises(UserError, match=r"no checkpoint in .* verifies; set run.output to another folder(.|\n)*step-000001 is damaged"):
        choose(tmp_path, "auto")


def test_never_refuses_a_folder_with_checkpoints(tmp_path: Path) -> None:
    fill(tmp_path, 10, 20)
    with pytest.raises(UserError, match=r"run.resume is never, but .* holds steps 10, 20; set run.resume=auto to go on"):
        choose(tmp_path, "never")


def test_a_step_is_taken_if_it_is_there_and_sound(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run.resume is 5, but .* has no checkpoints"):
        choose(tmp_path, 5)
    fill(tmp_path, 10, 20)
    found, _ = choose(tmp_path, 10)
    assert found is not None and found.step == 10
    with pytest.raises(UserError, match="run.resume is 5, but .* holds steps 10, 20; set run.resume=auto or a step that exists"):
        choose(tmp_path, 5)
    spoil(tmp_path, 10)
    with pytest.raises(UserError, match="run.resume is 10, but .* is damaged: model.safetensors"):
        choose(tmp_path, 10)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "made" / "yet", 1000, "the run")
    with pytest.raises(RunError, match=r"disk full: the run needs 1,000,000,000,000,000,000 bytes, .* has [\d,]+ free; free some space"):
        require_space(tmp_path / "not" / "made" / "yet", 10**18, "the run")
    assert not (tmp_path / "not").exists()


def test_bytes_of_tensors() -> None:
    assert tensor_bytes(tensors()) == 48 * (4 + 2 + 4 + 8) + 4 + 5 * 8


FULL_DISK = """
import os, subprocess, sys
import torch
from pathlib import Path
from trueline.errors import RunError
from trueline.train import checkpoint

room = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(room)], check=True)
kept = checkpoint.save(room, 1, {"model": {"a": torch.ones(1 << 18)}}, {}, keep=2)  # 1 MB
for forecast in (True, False):
    if not forecast:
        checkpoint._MARGIN = -(1 << 30)  # as if another program took the space after the forecast
    try:
        checkpoint.save(room, 2, {"model": {"a": torch.ones(1 << 18)}, "more": {"b": torch.ones(1 << 20)}}, {}, keep=1)
    except RunError as error:
        print(error)
    print([p.name for p in (room / "checkpoints").iterdir()], checkpoint.damage(kept.path))
checkpoint.save(room, 2, {"model": {"a": torch.ones(4)}}, {}, keep=1)
print([p.name for p in (room / "checkpoints").iterdir()])
"""


def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    """On a real file system of 4 MB, in a namespace of its own."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system lets nobody mount a small file system to fill")
    command = ["unshare", "-rm", sys.executable, "-c", FULL_DISK, str(tmp_path)]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert lines[0].startswith("disk full: the checkpoint of step 2 needs 5,242,880 bytes, ")
    assert lines[2].startswith("disk full: the checkpoint of step 2 needs 5,242,880 bytes in ") and "step 1 is untouched" in lines[2]
    assert lines[1] == lines[3] == "['step-000001'] None"
    assert lines[4] == "['step-000002']"


def test_what_a_kill_left_is_taken_away(tmp_path: Path) -> None:
    for name in ("step-000004.tmp", "step-000002.old.tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-000004").mkdir()
    remove_leftovers(tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000004"]
    remove_leftovers(tmp_path / "nothing")
