"""What the pretended device refuses and counts."""

import subprocess
import sys

import pytest

from tests.recipes.commands import ROOT

pytestmark = pytest.mark.slow

PROGRAM = """
from tests.accelerator import pretend
import torch


def waits(work):
    before = pretend.report()["waits"]
    work()
    return pretend.report()["waits"] - before


def refuses(work):
    try:
        work()
    except RuntimeError:
        return True
    return False


def captured(work):
    with torch.cuda.graph(recorded := torch.cuda.CUDAGraph()):
        work()
    return recorded


x = torch.arange(6.0, device="cuda").view(2, 3)
assert refuses(lambda: x + torch.ones(3)) and refuses(lambda: torch.cat((x, torch.ones(1, 3)))) and not refuses(lambda: x + torch.ones(()))
assert not refuses(lambda: x[torch.tensor([1])]) and torch.empty(3, device="cuda").isnan().all()
quiet = x.sum, x.double, lambda: x @ x.T, lambda: x[:, 1:].contiguous(), lambda: x[:, torch.tensor([1], device="cuda")]
loud = x.sum().item, x.tolist, x.cpu, x.nonzero, lambda: x[x > 1], lambda: bool(x.sum() > 0)
assert [waits(work) for work in quiet] == [0] * 5 and not any(refuses(lambda work=work: captured(work)) for work in quiet[:4])
assert [waits(work) for work in loud] == [1] * 6 and all(refuses(lambda work=work: captured(work)) for work in loud)
assert refuses(lambda: captured(lambda: torch.ones(()).to("cuda")))
y = torch.zeros(2, device="cuda")
recorded = captured(lambda: y.copy_(x.sum(1)))
x += 1
recorded.replay()
assert y.tolist() == [6, 15]
a, b = (torch.nn.Parameter(torch.ones(3, device="cuda")) for _ in range(2))
torch._foreach_mul_([a.data, b.data[1:]], 2.0)
assert b.tolist() == [1, 2, 2]
pretend.limit(1 << 20)
assert refuses(lambda: torch.empty(1 << 20, device="cuda")) and torch.cuda.mem_get_info()[1] == 1 << 20
"""


def test_it_refuses_what_a_gpu_would_and_counts_what_would_wait(environment: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
