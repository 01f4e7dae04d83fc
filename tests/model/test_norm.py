"""RMSNorm beside torch's: equal bits forward, equal gradients backward."""

import pytest
import torch

from trueline.model.norm import RMSNorm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 48), (5, 3, 16), (1, 1), (0, 8)])
def test_as_torchs(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for _ in range(2))
    found, wanted = [], []
    for kind, results in ((RMSNorm, found), (torch.nn.RMSNorm, wanted)):
        norm = kind(shape[-1], eps=1e-6, dtype=dtype)
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(0.5, 2, shape[-1]))
        given = x.clone().requires_grad_()
        out = norm(given)
        results += [out, *torch.autograd.grad(out, (given, norm.weight), grad)]
        with torch.no_grad():
            assert torch.equal(norm(given), out)
    assert torch.equal(found[0], wanted[0])
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for mine, theirs in zip(found[1:], wanted[1:], strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def test_gradients_are_those_of_finite_differences() -> None:
    norm = RMSNorm(6, eps=1e-3, dtype=torch.float64)
    x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert torch.autograd.gradcheck(norm, (x,))
    norm.weight.requires_grad_(False)  # as beside an adapter
    assert torch.autograd.gradcheck(norm, (x,)) and norm(x).requires_grad
    assert not norm(x.detach()).requires_grad


def test_keeps_its_input_and_a_number_a_row() -> None:
    norm, x, kept = RMSNorm(32, eps=1e-6, dtype=torch.bfloat16), torch.randn(10, 32, dtype=torch.bfloat16, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved):
        norm(x)
    assert sum(saved.nbytes for saved in kept if saved is not norm.weight and saved.data_ptr() != x.data_ptr()) <= 10 * 4 + 32 * 2
