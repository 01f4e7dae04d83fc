"""The arithmetic of a plan, each number worked by hand."""

from pathlib import Path

import pytest
import torch

from trueline.model.decoder import DecoderConfig
from trueline.rollout.memory import Slots
from trueline.train import checkpoint
from trueline.train.memory_plan import Peak, disk_bytes, disk_still_needed, fullest_of, highest, key_value_bytes
from trueline.train.run import due


def test_a_peak_is_the_sum_of_its_parts() -> None:
    peak = Peak(weights=1, gradients=20, states=300, activations=4000, logits=50_000, keys_values=600_000)
    assert peak.total == 654_321 and (peak + Peak(weights=9)).weights == 10
    assert peak.scaled(654_421).activations == 4100 and peak.scaled(654_421).weights == 1
    assert highest({"step": peak, "score": Peak(weights=654_322)}) == ("score", Peak(weights=654_322))


@pytest.mark.parametrize(("prompt", "longest"), [(100, 150), (5, 700), (40, 41), (64, 64)])
def test_keys_and_values_grow_as_the_memory_does(prompt: int, longest: int) -> None:
    """Against the memory itself: old keys or values beside the new while it grows."""
    sizes = DecoderConfig(vocab_size=8, hidden_size=8, num_layers=3, num_heads=2, num_kv_heads=2, head_dim=4, mlp_size=8)
    memory, most = Slots(sizes, torch.float32, torch.device("cpu")), 0
    for length in range(prompt, longest + 1):
        before = memory.keys.nbytes
        memory.reserve(5, [length] * 5, longest)
        after = memory.keys.nbytes
        most = max(most, before + 2 * after if after != before else 2 * after)
    assert key_value_bytes(3, 2, 4, 4, 5, prompt, longest) == most


def test_checkpoints_on_the_disk() -> None:
    """100 steps, one checkpoint of 10 bytes every 30: 30, 60, 90 and the last. Two are kept, a third is there while it is written."""
    found = disk_bytes(checkpoint=10, total=100, save_every=30, keep=2, model=4, cache=1, logs=2)
    assert found == {"checkpoint": 10, "checkpoints": 20, "model": 4, "cache": 1, "logs": 2, "kept": 27, "most": 33}
    assert disk_bytes(checkpoint=10, total=100, save_every=0, keep=2, model=40, cache=0, logs=0)["most"] == 50


CASES = [
    # what is there, where it goes on, total, save_every, keep
    ([], 0, 12, 0, 2), ([], 0, 12, 3, 2), ([], 0, 12, 5, 1), ([], 0, 12, 1, 20), ([5], 5, 12, 0, 2), ([4, 7], 7, 12, 3, 2),
    ([12], 12, 12, 0, 2), ([9, 12], 9, 12, 3, 2), ([3, 6], 3, 12, 3, 2), ([3, 6, 9], 9, 12, 3, 1), ([5, 9], 9, 12, 5, 3),
]  # fmt: skip


@pytest.mark.parametrize(("held", "done", "total", "save_every", "keep"), CASES)
def test_what_a_run_still_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held, done, total, save_every, keep) -> None:
    """Against checkpoints that are saved and pruned: as many as there are at once, and the model at the end."""
    tensors, most = {"model": {"w": torch.ones(3)}}, 0
    for step in held:
        checkpoint.save(tmp_path, step, tensors, {}, keep=99)
    prune = checkpoint._prune

    def counted(home: Path, step: int, keep: int) -> None:
        nonlocal most
        most = max(most, len(checkpoint.steps(tmp_path)) - len(held))
        prune(home, step, keep)

    monkeypatch.setattr(checkpoint, "_prune", counted)
    for step in range(done + 1, total + 1):
        if due(save_every, step, total):
            checkpoint.save(tmp_path, step, tensors, {}, keep)
    left = len(checkpoint.steps(tmp_path)) - len(held)
    assert disk_still_needed(held, done, total, save_every, keep, 100, 17) == max(100 * most, 100 * left + 17)


def test_the_fullest_micro_batches() -> None:
    lengths = [9, 9, 3, 3, 10, 8, 7]
    assert fullest_of([[[0, 1], [2, 3]], [[4, 5], [6]]], lengths) == ([[0, 1], [6]], 2.0)
    assert fullest_of([[[0]], [[4]]], lengths) == ([[4]], 1.0)
