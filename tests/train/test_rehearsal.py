"""Memory counted on tensors without numbers, against what torch's allocator gives out for the same work on real ones."""

import pytest
import torch

from trueline.config.schema import AdapterConfig, OptimizerConfig
from trueline.data.sample import Sample
from trueline.model.adapters import add_adapter, trainable
from trueline.model.batch import Batch, pack
from trueline.model.decoder import Decoder, DecoderConfig, init_weights
from trueline.model.heads import LanguageModel, Scorer
from trueline.parallel.world import World
from trueline.recipes.calibrate import watched
from trueline.recipes.sft import count_tokens, sft_objective
from trueline.train.optimizer import Optimizer, make_optimizer
from trueline.train.rehearsal import fake_batch, rehearse_pass, rehearse_step, shapes_only, weight_bytes
from trueline.train.step import train_step

SIZES = DecoderConfig(vocab_size=1024, hidden_size=64, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16, mlp_size=160)
CPU = torch.device("cpu")
BATCHES = [pack([Sample([1] * n, [i >= n // 4 for i in range(n)]) for n in lengths]) for lengths in ([90, 90, 60], [50, 41])]

TRAINED = [int(batch.trained.sum()) for batch in BATCHES]


def made(kind: str, dtype: torch.dtype, states: str, recompute: int) -> tuple[LanguageModel, Optimizer]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    decoder = Decoder(SIZES)
    torch.set_default_dtype(before)
    role = None if kind == "full" else "policy"
    if role:
        add_adapter(decoder, role, AdapterConfig(kind="lora"), 0)
    decoder.recompute = recompute
    return LanguageModel(decoder, role), make_optimizer(trainable(decoder, role, kind), OptimizerConfig(states=states))  # type: ignore[arg-type]


def planned(kind: str, dtype: torch.dtype, states: str, recompute: int) -> int:
    if kind == "full":
        with shapes_only(dtype) as mode:
            model, optimizer = made(kind, dtype, states, recompute)
            fakes = [fake_batch(batch, mode, CPU) for batch in BATCHES]
            return rehearse_step(model, optimizer, list(zip(fakes, TRAINED, strict=True)), True).total
    model, optimizer = made(kind, dtype, states, recompute)  # real weights and a real batch do as well
    return rehearse_step(model, optimizer, list(zip(BATCHES, TRAINED, strict=True)), True).total


@pytest.mark.parametrize(
    ("kind", "dtype", "states", "recompute"),
    [
        ("full", torch.float32, "float32", 0),
        ("full", torch.float32, "float32", 4),
        ("full", torch.bfloat16, "float32", 2),
        ("full", torch.bfloat16, "int8", 4),
        ("lora", torch.bfloat16, "float32", 0),
    ],
)
def test_a_step_s_memory_is_what_the_allocator_gives_out(kind: str, dtype: torch.dtype, states: str, recompute: int) -> None:
    model, optimizer = made(kind, dtype, states, recompute)
    with torch.no_grad():
        init_weights(model.decoder, torch.Generator().manual_seed(0))
    settings = {"world": World(), "max_norm": 1.0, "lr": 1e-3, "step": 1, "seed": 0}
    for _ in range(2):  # states come with the first
        with watched(torch.device("cpu")) as found:
            train_step(optimizer, BATCHES, sft_objective(model), count_tokens, **settings)
    # in bfloat16 operators use room of their own inside, which is not seen and is much beside so small a model
    assert planned(kind, dtype, states, recompute) == pytest.approx(found[0], rel=0.03 if dtype == torch.float32 else 0.1)


def test_states_and_weights_are_what_they_are() -> None:
    model, optimizer = made("full", torch.bfloat16, "float32", 0)
    assert weight_bytes(model) == sum(p.nbytes for p in model.parameters())
    tied = Decoder(DecoderConfig(8, 4, 1, 1, 1, 4, 4, tied_embeddings=True))
    assert weight_bytes(tied) == sum(p.nbytes for p in tied.parameters())


@pytest.mark.parametrize("kind", ["model", "scorer"])
def test_a_pass_without_gradients(kind: str) -> None:
    batch: Batch = BATCHES[0]
    model, _ = made("full", torch.float32, "float32", 0)
    module = model if kind == "model" else Scorer(model.decoder)
    with torch.no_grad(), watched(torch.device("cpu")) as found:
        module(batch)
    counted = rehearse_pass(module, batch, int(batch.trained.sum()))
    assert counted.total == pytest.approx(found[0], rel=0.05)
