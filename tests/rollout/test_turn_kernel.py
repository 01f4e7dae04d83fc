"""Turning and storing in one launch, in Triton's interpreter: in float32 the plain way's bits; compiled for a GPU that is not there."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from trueline.model.decoder import Decoder, DecoderConfig, init_weights, rotate, rotation
from trueline.model.heads import LanguageModel
from trueline.parallel.kernels import usable
from trueline.rollout.engine import Engine
from trueline.rollout.graphs import Graphs
from trueline.rollout.memory import Slots
from trueline.rollout.sampling import Sampling

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed; it is there for Linux on x86 and Arm only")
SIZES = {"vocab_size": 40, "hidden_size": 16, "num_layers": 2, "mlp_size": 24}


@pytest.fixture(scope="module")
def kernel():
    return usable("trueline.rollout.turn_kernel", "turn_and_store", lambda kernel: True)


@needs_triton
@pytest.mark.parametrize(
    ("size", "turned", "rope", "dtype"),
    [
        (16, None, "half", torch.float32), (20, 12, "half", torch.float32), (20, None, "interleaved", torch.float32),
        (16, 8, "interleaved", torch.float32), (16, 8, "interleaved", torch.bfloat16), (20, 12, "half", torch.bfloat16),
    ],
)  # fmt: skip
def test_it_turns_and_stores(kernel, size, turned, rope, dtype):
    config = DecoderConfig(**SIZES, num_heads=3, num_kv_heads=2, head_dim=size, rope=rope, rope_dim=turned)
    draw = torch.Generator().manual_seed(0)
    # queries, keys and values as parts of one tensor, as a fused product makes them
    q, k, v = torch.randn(3, 7, size, generator=draw).to(dtype).split((3, 2, 2), 1)
    columns = torch.tensor([0, 7, 11])
    cos, sin = (x.to(dtype) for x in rotation(columns, config))
    plain, stored = (Slots(config, dtype, torch.device("cpu")) for _ in range(2))
    for memory in (plain, stored):
        memory.reserve(8, [12], 12)
    plain.write(1, torch.arange(3), columns, rotate(k, cos, sin, config), v)
    found = kernel(q, k, v, cos, sin, stored.keys[1], stored.values[1], columns, rope == "interleaved")
    # the interpreter cuts float32 to bfloat16 off, where a device rounds
    units = {"rtol": 2**-6, "atol": 2**-6} if dtype == torch.bfloat16 else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(found, rotate(q, cos, sin, config), **units)
    torch.testing.assert_close(stored.keys, plain.keys, **units)
    assert torch.equal(stored.values, plain.values) and stored.keys.any()


@needs_triton
@pytest.mark.parametrize(
    "choices", [{"rope": "interleaved", "rope_dim": 2, "qk_norm": True}, pytest.param({"windows": (5, None)}, marks=pytest.mark.slow)]
)
def test_answers_are_those_without_it(kernel, monkeypatch, choices):
    decoder = Decoder(DecoderConfig(**SIZES, num_heads=4, num_kv_heads=2, head_dim=4, init_std=0.4, **choices))
    init_weights(decoder, torch.Generator().manual_seed(0))
    split = usable("trueline.rollout.decode_kernel", "split_attention", lambda kernel: True)
    answers, calls = [], []

    def counted(*given):
        calls.append(len(given[0]))
        return kernel(*given)

    class Held:
        def __init__(self, step, inputs, pool):
            self.step, self.inputs = step, inputs

        def replay(self):
            return self.step(*self.inputs)

    for turning in (None, counted):
        for module in ("decode", "memory"):
            monkeypatch.setattr(f"trueline.rollout.{module}.kernel_for", lambda q: split)
        monkeypatch.setattr("trueline.rollout.memory.turning_kernel_for", lambda q, turning=turning: turning)
        engine = Engine(LanguageModel(decoder), 3, packed=False)
        engine.graphs = Graphs(Held)
        with engine.hold():
            found = engine.generate([[3, 1, 4], [1], list(range(17)), [8, 9]], Sampling(5, temperature=0), [0] * 4)
        answers.append([(a.tokens, a.logprobs) for a in found])
    assert answers[0] == answers[1]
    assert set(calls) >= {1, 3}


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from trueline.rollout.turn_kernel import turn_head
names = turn_head.arg_names
kinds = {n: "constexpr" if n.isupper() else "i64" if "_" in n else "*i64" if n == "columns" else "*bf16" for n in names}
sizes = {"HEADS": 32, "GROUPS": 2, "SIZE": 128, "CHANNELS": 128, "TURNED": 64, "INTERLEAVED": True}
built = triton.compile(ASTSource(turn_head, kinds, sizes), target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})
print(len(built.asm["cubin"]))
"""


@needs_triton
def test_it_compiles_for_hopper(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
