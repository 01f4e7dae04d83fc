"""The decode kernel in Triton's interpreter and its plain fallback, both against NumPy; the kernel compiled for a GPU that is not there."""

import importlib
import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from trueline.model.decoder import Decoder, DecoderConfig, init_weights
from trueline.model.heads import LanguageModel
from trueline.rollout.decode import cached_attention, kernel_for, plain_attention, splits_for
from trueline.rollout.engine import Engine
from trueline.rollout.graphs import Graphs
from trueline.rollout.memory import PAGE
from trueline.rollout.sampling import Sampling

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed; it is there for Linux on x86 and Arm only")


def oracle(q, keys, values, lengths, window=None, pages=None):
    """One head after the other, in float64."""
    out = np.zeros(q.shape)
    share = q.shape[1] // keys.shape[1]
    for i, n in enumerate(lengths):
        for head in range(q.shape[1]):
            if pages is None:
                past = [part[i, head // share, :n] for part in (keys, values)]
            else:
                past = [np.concatenate([part[p, head // share] for p in pages[i]])[:n] for part in (keys, values)]
            seen = [x[max(0, n - window) :] if window else x for x in past]
            scores = seen[0] @ q[i, head] / np.sqrt(q.shape[2])
            weights = np.exp(scores - scores.max())
            out[i, head] = weights @ seen[1] / weights.sum()
    return out


def drawn(lengths, share, groups=2, size=16, columns=150, seed=0):
    draw = torch.Generator().manual_seed(seed)
    q = torch.randn(len(lengths), groups * share, size, generator=draw, dtype=torch.float64)
    keys, values = (torch.randn(len(lengths), groups, columns, size, generator=draw, dtype=torch.float64) for _ in range(2))
    return q, keys, values, torch.tensor(lengths, dtype=torch.int32)


def paged(keys, values, page_size=16):
    """The same numbers in pages that lie in any order, with pages of nobody between -> keys, values, pages."""
    rows, groups, columns, size = keys.shape
    most = -(-columns // page_size)
    order = torch.randperm(rows * most + 3, generator=torch.Generator().manual_seed(1))[: rows * most]
    stored = []
    for part in (keys, values):
        pages = torch.full((rows * most + 3, groups, page_size, size), 1e4, dtype=part.dtype)
        padded = torch.nn.functional.pad(part, (0, 0, 0, most * page_size - columns))
        pages[order] = padded.unflatten(2, (most, page_size)).transpose(1, 2).flatten(0, 1)
        stored.append(pages)
    return (*stored, order.view(rows, most).int())


def close(found, expected, dtype):
    error = np.linalg.norm(found.double().numpy() - expected) / np.linalg.norm(expected)
    assert error < (1e-2 if dtype == torch.bfloat16 else 1e-5), error


@pytest.fixture(scope="session")
def kernel():
    """`split_attention` in the interpreter, which is chosen when the kernel's module is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    return importlib.import_module("trueline.rollout.decode_kernel").split_attention


LENGTHS = [1, 150, 17, 65]


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("in_pages", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fallback_is_attention_to_the_past(dtype, in_pages, window):
    q, keys, values, lengths = drawn(LENGTHS, 4)
    expected = oracle(*(x.numpy() for x in (q, keys, values)), LENGTHS, window)
    q, keys, values = (x.to(dtype) for x in (q, keys, values))
    pages = None
    if in_pages:
        keys, values, pages = paged(keys, values)
    close(cached_attention(q, keys, values, lengths, window, pages), expected, dtype)


def test_the_fallback_is_finite_for_a_request_of_nothing():
    q, keys, values, lengths = drawn([0, 2], 2)
    assert plain_attention(q, keys, values, lengths).isfinite().all()


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("share", "splits", "window", "in_pages"),
    [
        (1, 1, None, False), (2, 4, None, False), (8, 8, None, True), (16, 2, None, False), (7, 2, 20, True), (16, 4, 70, False),
        (2, 1, 1, True),
    ],
)  # fmt: skip
def test_the_kernel_is_the_fallback(kernel, dtype, share, splits, window, in_pages):
    """With odd lengths, lengths of one token, and, for those, splits with nothing in them."""
    q, keys, values, lengths = drawn(LENGTHS, share)
    expected = oracle(*(x.to(dtype).double().numpy() for x in (q, keys, values)), LENGTHS, window)
    q, keys, values = (x.to(dtype) for x in (q, keys, values))
    pages = None
    if in_pages:
        keys, values, pages = paged(keys, values)
    found = kernel(q, keys, values, lengths, window, pages, splits)
    assert found.dtype == dtype
    close(found, expected, dtype)
    close(found, plain_attention(q, keys, values, lengths, window, pages).double().numpy(), dtype)


@needs_triton
@pytest.mark.parametrize("size", [8, 40, 128])
def test_the_kernel_reads_views(kernel, size):
    """The memory's rows beyond the requests, columns beyond the lengths, a key's neighbours in another order: strides say where all is."""
    q, keys, values, lengths = drawn([5, 33], 3, size=size, columns=40)
    expected = oracle(*(x.numpy() for x in (q, keys, values)), [5, 33])
    q, keys, values = q.float(), keys.float(), values.float()
    wide = torch.full((4, 40, 2, size), torch.nan)
    wide[:2] = values.transpose(1, 2)
    tall = torch.full((3, 2, 90, size), torch.nan)
    tall[:2, :, :40] = keys
    close(kernel(q, tall, wide.transpose(1, 2), lengths, None, None, 2), expected, torch.float32)


@needs_triton
def test_the_kernel_answers_a_request_of_nothing_with_zero(kernel):
    q, keys, values, _ = drawn([1, 1], 2)
    found = kernel(q.float(), keys.float(), values.float(), torch.tensor([0, 1], dtype=torch.int32), None, None, 2)
    assert not found[0].any()
    torch.testing.assert_close(found[1], values[1, :, 0].float().repeat_interleave(2, dim=0))


def test_splits_follow_the_shapes():
    assert splits_for(2, 4096) == 64 and splits_for(2, 1000) == 8 and splits_for(2, 100) == 1
    assert splits_for(64, 4096) == 8 and splits_for(512, 4096) == 1


def test_no_kernel_without_a_cuda_device():
    assert kernel_for(torch.zeros(1, 1, 1)) is None


COMPILE = """
import triton, triton.compiler
from triton.backends.compiler import GPUTarget
from trueline.rollout.decode_kernel import add_splits, attend_splits
pointers = {"q": "*bf16", "keys": "*bf16", "values": "*bf16", "pages": "*i32", "lengths": "*i32", "partial": "*fp32", "totals": "*fp32"}
numbers = {"scale": "fp32"} | {n: "i32" for n in attend_splits.arg_names if n not in pointers and n.islower() and n != "scale"}
sizes = {"SHARE": 16, "ROWS": 16, "SIZE": 128, "CHANNELS": 128, "BLOCK": 64, "PAGED": True, "WIDE": False}
aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(attend_splits.arg_names) if n in pointers or n[:2] in ("q_", "k_", "v_")}
def build(kernel, signature, constants, attributes=None):
    signature = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 2})
built = build(attend_splits, pointers | numbers, sizes, aligned)
assert "mma.sync" in built.asm["ptx"] and "cp.async.cg.shared.global [" in built.asm["ptx"], "no matrix product, or no loads of 16 bytes"
print(len(built.asm["cubin"]), built.metadata.shared)
build(add_splits, {"partial": "*fp32", "totals": "*fp32", "out": "*bf16"}, {"SPLITS": 8, "SIZE": 128, "CHANNELS": 128})
"""


@needs_triton
def test_the_kernel_compiles_for_hopper(tmp_path):
    """To the last stage, with the assembler that Triton brings along. It says nothing about its speed or its numbers on a device."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cubin, shared = map(int, done.stdout.split())
    assert cubin > 0 and shared < 100_000  # two programs fit a processor's 227 KiB


@needs_triton
@pytest.mark.parametrize(
    ("in_pages", "choices"),
    [
        (True, {}), (False, {"windows": (5, None)}), pytest.param(False, {}, marks=pytest.mark.slow),
        pytest.param(True, {"windows": (5, None)}, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_answers_by_the_kernel_are_those_without(kernel, monkeypatch, in_pages, choices):
    """Through the engine, its memory, its layouts and recordings, as on a CUDA device: here the kernel is the interpreter's."""
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "mlp_size": 24}
    decoder = Decoder(DecoderConfig(**sizes, init_std=0.4, **choices))
    init_weights(decoder, torch.Generator().manual_seed(0))
    prompts = [[3, 1, 4], [1], list(range(17)), [8, 9]]
    budget = 4 * PAGE * 2 * 2 * 2 * 4 * 4 if in_pages else None  # four pages
    answers, calls, made = [], [], []

    class Held:
        def __init__(self, step, inputs, pool):
            self.step, self.inputs = step, inputs
            made.append(len(inputs[0]))

        def replay(self):
            return self.step(*self.inputs)

    def counted(*arguments):
        calls.append(arguments[5] is not None)
        return kernel(*arguments)

    for by_kernel in (False, True):
        if by_kernel:
            for module in ("trueline.rollout.decode", "trueline.rollout.memory"):
                monkeypatch.setattr(f"{module}.kernel_for", lambda q: counted)
        engine = Engine(LanguageModel(decoder), 3, budget, packed=False)
        engine.graphs = Graphs(Held) if by_kernel else None
        with engine.hold():
            answers.append(engine.generate(prompts, Sampling(8, temperature=0), [0] * 4))
    assert [a.tokens for a in answers[0]] == [a.tokens for a in answers[1]]
    for ours, theirs in zip(*answers, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
    assert calls and set(calls) == {in_pages} and bool(made) is not in_pages
