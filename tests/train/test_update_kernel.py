"""The update of bfloat16 states in Triton's interpreter, against NumPy; compiled for a GPU that is not there."""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from trueline.config.schema import OptimizerConfig
from trueline.parallel.kernels import usable
from trueline.train import optimizer as optimizer_module
from trueline.train.optimizer import Optimizer
from trueline.train.stores import whole_update

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed; it is there for Linux on x86 and Arm only")
SETTINGS = {"step": 7, "lr": 1e-2, "decay": 0.1, "betas": (0.9, 0.99), "eps": 1e-8}


@pytest.fixture(scope="module")
def kernel():
    return usable("trueline.train.update_kernel", "adamw_bfloat16", lambda kernel: True)


def drawn(n: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """Weight, mean and square in bfloat16, and a gradient."""
    draw = torch.Generator().manual_seed(n)
    found = [torch.randn(n, generator=draw), torch.randn(n, generator=draw) / 10, torch.rand(n, generator=draw) / 100]
    return [x.bfloat16() for x in found] + [torch.randn(n, generator=draw).to(dtype)]


def numpys(weight, mean, square, gradient, scale: float) -> list[np.ndarray]:
    """Seventh update of arXiv:1711.05101 algorithm 2, in float64, before it is rounded."""
    weight, mean, square, gradient = (x.double().numpy() for x in (weight, mean, square, gradient))
    gradient = gradient * scale
    mean, square = 0.9 * mean + 0.1 * gradient, 0.99 * square + 0.01 * gradient**2
    change = mean / (1 - 0.9**7) / (np.sqrt(square / (1 - 0.99**7)) + 1e-8)
    return [weight * (1 - 1e-3) - 1e-2 * change, mean, square]


@needs_triton
@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 0.5), (torch.bfloat16, None), (torch.float32, None)])
def test_each_number_is_rounded_to_a_neighbour_without_bias(kernel, dtype, scale) -> None:
    *before, gradient = drawn(2500, dtype)  # the last program is not full
    found = []
    for seed in range(40):
        after = [x.clone() for x in before]
        kernel(after[0], gradient, *after[1:], None if scale is None else torch.tensor(scale), seed=2**61 + seed, **SETTINGS)
        found.append([x.double().numpy() for x in after])
    for i, exact in enumerate(numpys(*before, gradient, scale or 1.0)):
        drawn_numbers, unit = np.stack([one[i] for one in found]), 2.0 ** (np.floor(np.log2(np.abs(exact))) - 7)
        assert (np.abs(drawn_numbers - exact) < 1.001 * unit).all()
        bias = (drawn_numbers.mean(0) - exact) / unit
        assert np.abs(bias).max() < 0.5 and abs(bias.mean()) < 4 * 0.5 / np.sqrt(40 * len(exact))


@needs_triton
def test_draws_belong_to_the_seed_and_the_number(kernel) -> None:
    *before, gradient = drawn(3000)

    def after(seed: int) -> torch.Tensor:
        copies = [x.clone() for x in before]
        kernel(copies[0], gradient, *copies[1:], None, seed=seed, **SETTINGS)
        return torch.cat(copies)

    assert torch.equal(after(5), after(5)) and not torch.equal(after(5), after(6))
    same = [torch.full((3000,), 0.3).bfloat16() for _ in range(3)]
    kernel(same[0], torch.full((3000,), 0.1), *same[1:], None, seed=1, **SETTINGS)
    assert all(len(x.unique()) == 2 for x in same)  # each of equal numbers is drawn for itself
    assert not torch.equal(same[1] > same[1].min(), same[2] > same[2].min())


@needs_triton
def test_an_optimizer_with_it_goes_where_the_plain_one_goes_and_resumes_to_the_bit(kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(steps: int, state: dict | None = None, weight: torch.Tensor | None = None) -> tuple[torch.Tensor, Optimizer]:
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 64 * 40).view(64, 40).bfloat16() if weight is None else weight.clone())
        optimizer = Optimizer({"w": parameter}, OptimizerConfig(states="bfloat16", weight_decay=0.1), seed=3)
        optimizer.load(state or {})
        for _ in range(steps):
            parameter.grad = (parameter.detach().float() - 0.3).bfloat16()
            optimizer.collect()
            optimizer.step(0.01)
        return parameter.detach(), optimizer

    plain, _ = trained(30)
    monkeypatch.setattr(optimizer_module, "whole_update", lambda states, weight: kernel)
    by_kernel, _ = trained(30)
    assert (plain.float() - by_kernel.float()).abs().mean() < 0.01 < (plain.float() - torch.linspace(-1, 1, 2560).view(64, 40)).abs().mean()
    half, optimizer = trained(10)
    state = {name: value.clone() for name, value in optimizer.state().items()}
    assert state["w.step"] == 10
    assert torch.equal(trained(20, state, half)[0], by_kernel)


@pytest.mark.filterwarnings("error")
def test_it_is_for_cuda() -> None:
    assert whole_update("bfloat16", torch.zeros(3)) is None


@needs_triton
def test_a_kernel_that_is_wrong_or_does_not_run_is_left_out_with_a_word() -> None:
    def broken(kernel) -> bool:
        raise AssertionError("libcuda.so cannot found!\nmore")

    where = "trueline.train.update_kernel", "adamw_bfloat16"
    with pytest.warns(UserWarning, match=r"without the Triton kernel adamw_bfloat16: AssertionError: libcuda.so cannot found!$"):
        assert usable(*where, broken) is None
    with pytest.warns(UserWarning, match="it gives other numbers"):
        assert usable(*where, lambda kernel: False) is None


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from trueline.train.update_kernel import adamw_program

names = adamw_program.arg_names
kinds = dict(zip(names, ["*i16", "{gradient}", "*i16", "*i16", "*fp32", "i32", "i64"] + ["fp32"] * 7 + ["constexpr"] * 3, strict=True))
constants = {{"SCALED": True, "NARROW": {narrow}, "BLOCK": 1024}}
found = triton.compile(ASTSource(adamw_program, kinds, constexprs=constants), target=GPUTarget("cuda", 90, 32), options={{"num_warps": 4}})
assert "cubin" in found.asm or "ptx" in found.asm
"""


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("narrow", [True, False])
def test_it_compiles_for_a_gpu(narrow: bool, tmp_path) -> None:
    code = COMPILE.format(gradient="*i16" if narrow else "*fp32", narrow=narrow)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
