"""The loop of SFT, reward and DPO when memory is short, and the number format it settles on."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

import trueline as api
from tests.recipes.toys import Toys
from trueline.config.schema import ModelConfig, OptimizerConfig, RunConfig, SftConfig
from trueline.data.sample import Sample
from trueline.errors import RunError
from trueline.model.batch import Batch, pack
from trueline.model.decoder import Decoder, DecoderConfig, init_weights
from trueline.model.heads import LanguageModel
from trueline.parallel.world import World, fast_bfloat16
from trueline.recipes import assemble
from trueline.recipes.assemble import settle_dtype
from trueline.recipes.fit import TRIVIAL, Task, burn_in, micro_batches
from trueline.recipes.sft import count_tokens, sft_objective
from trueline.train import checkpoint
from trueline.train.budget import Budget
from trueline.train.optimizer import Optimizer, make_optimizer
from trueline.train.step import Losses, Totals, train_step

SIZES = DecoderConfig(vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, mlp_size=24, init_std=0.3)


def samples(length: int, count: int) -> list[Sample]:
    draw = torch.Generator().manual_seed(length)
    return [Sample(torch.randint(0, 64, (length,), generator=draw).tolist(), [i > 3 for i in range(length)]) for _ in range(count)]


def made(items: Sequence[Sample], holds: int, dtype: torch.dtype = torch.float64) -> tuple[Task[Sample, Batch], Optimizer, list[int]]:
    """A task on a machine that holds `holds` tokens at once, and the sizes of the micro-batches it was asked for."""
    decoder = Decoder(SIZES)
    init_weights(decoder, torch.Generator().manual_seed(0))
    model = LanguageModel(decoder.to(dtype))
    inner, seen = sft_objective(model), []

    def objective(batch: Batch) -> tuple[Losses, Totals]:
        seen.append(len(batch.tokens))
        if len(batch.tokens) > holds:
            raise MemoryError
        return inner(batch)

    return Task(items, [], pack, objective, count_tokens), make_optimizer(dict(decoder.named_parameters()), OptimizerConfig()), seen


def test_burn_in_finds_out_in_the_first_minute_and_leaves_nothing() -> None:
    items = [*samples(20, 30), *samples(1400, 4)]
    task, optimizer, seen = made(items, 3000)
    before = {name: p.detach().clone() for name, p in optimizer.parameters.items()}
    said: list[str] = []
    budget = Budget(8192, said.append)
    burn_in(task, optimizer, budget, 8, World())
    assert seen == [5680, 2840] and budget.tokens == 2840
    assert said == ["out of memory with 5680 tokens in a micro-batch; going on with 2840 (batch.max_tokens), same loss"]
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in optimizer.parameters.items()) and not optimizer.state()


def test_burn_in_is_skipped_where_the_work_is_trivial() -> None:
    task, optimizer, seen = made(samples(TRIVIAL // 8 - 1, 8), 1)
    burn_in(task, optimizer, Budget(8192, print), 8, World())
    assert seen == []


def test_burn_in_tells_when_one_item_is_too_much() -> None:
    task, optimizer, _ = made(samples(600, 8), 500)
    with pytest.raises(RunError, match=r"single item of 600 tokens"):
        burn_in(task, optimizer, Budget(8192, lambda line: None), 8, World())


def losses(dtype: torch.dtype, steps: int) -> list[float]:
    items = samples(40, 8)
    task, optimizer, _ = made(items, 10_000, dtype)
    found = []
    for step in range(steps):
        batches = micro_batches(task, items, 160, World())
        settings = {"world": World(), "max_norm": 1.0, "lr": 1e-2, "step": step, "seed": 0}
        found.append(train_step(optimizer, batches, task.objective, task.count, **settings)["loss"])
    return found


def test_bfloat16_follows_the_float32_loss() -> None:
    """Forty steps in which random tokens are learned by heart, from 5.1 to 0.3 nats. Gaps are measured against the first loss: relative to
    the last ones, a thousandth of it would be a tenth."""
    wide, half = losses(torch.float32, 40), losses(torch.bfloat16, 40)
    assert wide[-1] < 0.1 * wide[0]
    assert max(abs(a - b) for a, b in zip(wide, half, strict=True)) < 0.01 * wide[0]


def config(path: Path, output: Path, dtype: str = "auto") -> SftConfig:
    settings = {"path": str(path), "dtype": dtype}
    return SftConfig(model=ModelConfig(**settings), data={"train": "x"}, run=RunConfig(output=output, steps=1))  # type: ignore[arg-type]


def test_auto_is_float32_for_a_small_model(toys: Toys, tmp_path: Path) -> None:
    assert settle_dtype(config(toys.model(), tmp_path)).model.dtype == "float32"


def test_auto_asks_the_processor_for_a_wide_one(toys: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assemble, "WIDE", 32)  # as wide as the toys are
    expected = "bfloat16" if fast_bfloat16() else "float32"
    assert settle_dtype(config(toys.model(), tmp_path)).model.dtype == expected
    assert settle_dtype(config(toys.model(), tmp_path, "float64")).model.dtype == "float64"


def test_a_run_keeps_the_format_it_began_with(toys: Toys, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"dtype": "bfloat16"}}))
    assert settle_dtype(config(toys.model(), tmp_path)).model.dtype == "bfloat16"


def test_only_what_is_trained_and_above_has_a_backward_pass() -> None:
    """A frozen embedding and frozen lower layers leave no node in the graph: LoRA on the last layer only is one layer's backward pass."""
    model = LanguageModel(Decoder(SIZES))
    nodes = []
    for trained in (model.decoder.layers, model.decoder.layers[1:]):
        model.requires_grad_(False)
        for layer in trained:
            layer.requires_grad_(True)
        nodes.append(count_nodes(model(pack(samples(12, 2))).sum().grad_fn))
    assert nodes[1] < 0.6 * nodes[0]


def count_nodes(root: object) -> int:
    seen, todo = set(), [root]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo.extend(other for other, _ in node.next_functions)  # type: ignore[attr-defined]
    return len(seen)


@pytest.mark.parametrize(("stage", "kind"), [("sft", "full"), ("dpo", "lora"), ("reward", "full"), ("ppo", "lora")])
def test_a_disk_without_room_for_the_run_is_refused_before_the_first_step(
    toys: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, kind: str
) -> None:
    """What the run's numbers really took is enough; a tenth less is not, and what is there already counts."""
    run: Any = {"sft": api.sft, "dpo": api.dpo, "reward": api.reward, "ppo": api.ppo}[stage]
    settings = toys.dictionary(stage, run={"output": str(tmp_path / "run"), "steps": 3, "keep": 2}, model={"adapter": {"kind": kind}})
    most, saved = 0, checkpoint._publish

    def watched(part: Path, final: Path) -> None:
        nonlocal most
        saved(part, final)
        most = max(most, taken(tmp_path / "run"))

    monkeypatch.setattr(checkpoint, "_publish", watched)
    run(settings)
    most = max(most, taken(tmp_path / "run"))

    def free(size: float) -> None:
        room = int(size) + checkpoint._MARGIN  # for names and the like
        monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=room - taken(tmp_path / "new")))

    settings["run"]["output"] = str(tmp_path / "new")
    free(0.9 * most)
    with pytest.raises(RunError, match=r"disk full: what this run will write \(a lower run.keep makes it less\) needs [\d,]+ bytes"):
        run(settings)
    assert not (tmp_path / "new" / "metrics.jsonl").exists()
    free(most)
    run(settings)
    shutil.rmtree(tmp_path / "new" / "model")
    run(settings)


def taken(folder: Path) -> int:
    """Bytes of the numbers of checkpoints and model."""
    files = [path for part in ("checkpoints", "model") for path in (folder / part).rglob("*.safetensors")]
    return sum(path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little") for path in files)
