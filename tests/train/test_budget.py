"""Running out of memory: smaller micro-batches, the same update, and a sentence when nothing helps. The allocator fails above N tokens."""


import pytest
import torch
from torch import Tensor, nn

from trueline.config.schema import AdapterConfig, OptimizerConfig
from trueline.data.sample import Sample
from trueline.data.stream import plan
from trueline.errors import RunError
from trueline.model.adapters import add_adapter, trainable
from trueline.model.batch import pack
from trueline.model.decoder import Decoder, DecoderConfig
from trueline.parallel.world import World
from trueline.train.budget import Budget, choose_recompute, layers_to_recompute, recompute_all
from trueline.train.optimizer import Optimizer
from trueline.train.step import Losses, Totals, train_step

LENGTHS = [9, 7, 5, 4, 3, 2]


def failure(kind: str) -> BaseException:
    cpu = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
    return {"python": MemoryError(), "accelerator": torch.OutOfMemoryError("CUDA out of memory"), "cpu": cpu}[kind]


def update(holds: int, said: list[str], kind: str = "cpu", lengths: list[int] = LENGTHS) -> Tensor:
    """The weights after a step with room for 32 tokens, on a machine that holds `holds` of them at once."""
    w = nn.Parameter(torch.arange(1.0, 4.0, dtype=torch.float64))
    optimizer = Optimizer({"w": w}, OptimizerConfig())

    def objective(batch: list[int]) -> tuple[Losses, Totals]:
        if sum(batch) > holds:
            raise failure(kind)
        return {"tokens": torch.stack([(w**n).sum() for n in batch]).sum()}, {}

    def attempt(tokens: int) -> dict[str, float]:
        batches = [[lengths[i] for i in indices] for indices in plan(lengths, tokens)[0]]
        batches.sort(key=sum)  # the failure comes after other micro-batches have left gradients
        settings = {"world": World(), "max_norm": 1e9, "lr": 0.1, "step": 1, "seed": 0}
        return train_step(optimizer, batches, objective, lambda batch: {"tokens": sum(batch)}, **settings)

    Budget(32, said.append).fit(lengths, attempt)
    return w.detach()


@pytest.mark.parametrize("kind", ["python", "accelerator", "cpu"])
def test_a_smaller_budget_makes_the_same_update(kind: str) -> None:
    said: list[str] = []
    torch.testing.assert_close(update(12, said, kind), update(100, []), rtol=1e-12, atol=0)
    assert said == [
        "out of memory with 30 tokens in a micro-batch; going on with 15 (batch.max_tokens), same loss",
        "out of memory with 15 tokens in a micro-batch; going on with 9 (batch.max_tokens), same loss",
    ]


def test_one_item_that_does_not_fit_ends_the_run() -> None:
    with pytest.raises(RunError, match=r"single item of 9 tokens .* set model\.recompute=true"):
        update(8, [])


@pytest.mark.parametrize("kind", ["python", "accelerator", "cpu"])
def test_no_memory_for_the_update_ends_the_run(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights may have been written by then, and gradients are still there: the same step again would use both twice."""
    calls = []

    def step(*given: object, **settings: object) -> None:
        calls.append(given)
        raise failure(kind)

    monkeypatch.setattr(Optimizer, "step", step)
    with pytest.raises(RunError, match=r"step 1: out of memory in the update .* optimizer\.states=bfloat16"):
        update(100, [], kind)
    assert len(calls) == 1


def test_other_errors_are_not_taken_for_it() -> None:
    def attempt(tokens: int) -> float:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        Budget(32, print).fit(LENGTHS, attempt)


def test_the_smaller_budget_stays() -> None:
    budget = Budget(8, print)
    assert budget.room([3]) == 8 and budget.room([9]) == 9  # an item is never cut


SIZES = DecoderConfig(vocab_size=50, hidden_size=16, num_layers=6, num_heads=4, num_kv_heads=2, head_dim=4, mlp_size=20, qkv_bias=False)
BATCH = pack([Sample([1] * 40, [False] + [True] * 39), Sample([2] * 24, [False] + [True] * 23)])  # 64 tokens


def layer_bytes_by_hand(tokens: int) -> int:
    """float32, all weights trained: two norms (input, output, one number per token), rotated q, k, v, the attention's
    output twice (as it is, and laid end to end) and one number per head, and four of the MLP's width."""
    norms = 2 * (2 * 16 + 1)
    attention = 16 + 8 + 8 + 16 + 16 + 4
    return tokens * 4 * (norms + attention + 4 * 20)


def test_what_a_layer_keeps_is_counted_on_the_layer() -> None:
    decoder = Decoder(SIZES)
    kept, again = decoder.layer_memory(BATCH.tokens, BATCH.layout)
    assert again == 64 * 16 * 4
    assert kept == pytest.approx(layer_bytes_by_hand(64), rel=0.02)
    trainable(decoder, None, "full")
    add_adapter(decoder, "policy", AdapterConfig(kind="lora", rank=2), 0)
    frozen = decoder.requires_grad_(False).layer_memory(BATCH.tokens, BATCH.layout, None)[0]
    assert frozen < 0.8 * kept  # what only a weight's gradient needs is not kept


@pytest.mark.parametrize(("layers", "expected"), [(7, 0), (6.999, 1), (5, 3), (1, 6), (0, 6)])
def test_memory_decides_how_many_layers_are_recomputed(layers: float, expected: int) -> None:
    """`batch.memory` with room for so many layers' activations, one of which is for the layer at work."""
    decoder = Decoder(SIZES)
    optimizer = Optimizer(dict(decoder.named_parameters()), OptimizerConfig())
    weights = sum(p.numel() for p in decoder.parameters())
    kept, again = decoder.layer_memory(BATCH.tokens, BATCH.layout)
    assert layers_to_recompute(7 * kept - 2 * (kept - again), 6, kept, again) == 2
    rest = 4 * weights + 8 * weights + 4 * len(optimizer.parameters) + 64 * 50 * 4  # gradients, moments and steps, logits
    said = choose_recompute(decoder, None, BATCH, 64, [optimizer], int(rest + layers * kept))
    assert decoder.recompute == expected
    assert said.startswith(f"model.recompute: auto recomputes {expected} of 6 layers; activations of 6 layers take 0.00 GB")


def test_states_that_are_there_are_not_counted_again() -> None:
    """What a run that goes on chooses is what it chose, for what the device has free is then less by the states."""
    decoder = Decoder(SIZES).to(torch.bfloat16)
    optimizer = Optimizer(dict(decoder.named_parameters()), OptimizerConfig())
    gradients, states = optimizer.memory()
    weights = sum(p.numel() for p in decoder.parameters())
    assert gradients == 6 * weights and states == 10 * weights + 4 * len(optimizer.parameters)
    assert optimizer.memory(several=False)[0] == 2 * weights
    early = Optimizer(optimizer.parameters, OptimizerConfig(in_backward=True, max_norm=None))
    assert early.memory()[0] == 6 * weights and early.memory(several=False)[0] == 2 * max(p.numel() for p in decoder.parameters())
    for parameter in optimizer.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.collect()
    optimizer.step(0.1)
    assert sum(x.nbytes for x in optimizer.state().values()) == states


def test_all_layers_are_recomputed_before_a_micro_batch_is_halved() -> None:
    decoder, said, tried = Decoder(SIZES), [], []

    def attempt(tokens: int) -> int:
        tried.append((tokens, decoder.recompute))
        if len(tried) < 3:
            raise failure("cpu")
        return tokens

    assert Budget(32, said.append, lambda: recompute_all([decoder])).fit(LENGTHS, attempt) == 15
    assert tried == [(32, 0), (32, 6), (15, 6)]
    assert said[0] == "out of memory with 30 tokens in a micro-batch; recomputing all layers from now on (model.recompute), same loss"
