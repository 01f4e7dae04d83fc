"""native.c, function by function, against NumPy in float64; and what becomes of a machine that cannot have it."""

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.rollout.test_packed import needs_native
from trueline.rollout import native
from trueline.rollout.native import OPTIONS, SOURCE, Kernels, kernels

SHAPES = {"as here": [], "16 lanes": ["-mavx2", "-mfma", "-DLANES=16"], "4 lanes": []}


@pytest.fixture(scope="module", params=SHAPES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """As it is compiled here; and in vectors as long as AVX-512's, which the compiler cuts up, and as short as SSE's."""
    if (found := kernels()) is None:
        pytest.skip("no C compiler, or not a CPU that native.c was tried on")
    if request.param == "as here":
        return found
    library = tmp_path_factory.mktemp("native") / "native.so"
    subprocess.run([*native._compiler(), *OPTIONS, *SHAPES[request.param], "-Wno-psabi", "-o", library, SOURCE, "-lm"], check=True)
    return Kernels(ctypes.CDLL(str(library)))


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def wide(x: torch.Tensor) -> np.ndarray:
    return x.double().numpy()


def close(found: torch.Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(wide(found), expected, rtol=1e-5, atol=1e-5)


AFTER = {
    "none": lambda y: y,
    "swish": lambda y: y / (1 + np.exp(-y)),
    "gelu": lambda y: y * (1 + np.tanh((2 / np.pi) ** 0.5 * (y + 0.044715 * y**3))) / 2,
}
HOW = {"alone": lambda y, other: y, "add": lambda y, other: y + other, "mul": lambda y, other: y * other}


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 16, 35])
@pytest.mark.parametrize("out", [1, 2, 3, 47, 48, 49, 200])
def test_linear(made: Kernels, rows: int, out: int) -> None:
    x, weight, bias, other = random(0, rows, 48), random(1, out, 48), random(2, out), random(3, rows, out)
    for then, after in AFTER.items():
        for how, combined in HOW.items():
            for own in (None, bias):
                y = wide(x) @ wide(weight).T + (0 if own is None else wide(own))
                found = made.linear(x, weight, own, then, *(() if how == "alone" else (other, how)))
                close(found, combined(after(y), wide(other)))


def test_activations_of_extreme_states(made: Kernels) -> None:
    """Large ones neither overflow nor lose their sign; what is no number stays none."""
    states = torch.tensor([-1e30, -200.0, -88.5, -20.0, -1e-30, 0.0, 1e-30, 20.0, 88.5, 200.0, 1e30])
    one = torch.zeros(1, 16)
    one[:, 0] = 1
    weight = torch.zeros(len(states), 16)
    weight[:, 0] = states
    for then, after in AFTER.items():
        found = made.linear(one, weight, None, then)[0]
        expected = [float(after(np.clip(x, -700, 700)) if abs(x) < 700 else max(x, 0) if then != "none" else x) for x in wide(states)]
        np.testing.assert_allclose(wide(found), expected, rtol=1e-5, atol=1e-6)
        assert made.linear(one * torch.nan, weight, None, then).isnan().all()


@pytest.mark.parametrize("rows", [1, 16, 300])
def test_rms_norm(made: Kernels, rows: int) -> None:
    x, weight = random(0, rows, 48) * 30, random(1, 48)
    expected = wide(x) / np.sqrt((wide(x) ** 2).mean(-1, keepdims=True) + 1e-3) * wide(weight)
    close(made.rms_norm(x, weight, 1e-3), expected)
    close(made.rms_norm(x.t().contiguous().t(), weight, 1e-3), expected)  # however it lies


def turned(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Pairs of neighbouring channels of `x` `[..., d]`, as many as there are `angles` `[pairs]`."""
    y = x.copy()
    for pair, angle in enumerate(angles):
        a, b = x[..., 2 * pair], x[..., 2 * pair + 1]
        y[..., 2 * pair], y[..., 2 * pair + 1] = a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)
    return y


@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize("share", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("paged", [False, True])
def test_attend(made: Kernels, paged: bool, share: int, window: int | None) -> None:
    """Of one and of many past tokens, in slots and in pages that lie about; all that is not to be read is garbage."""
    n, groups, size, pairs, longest = 5, 2, 32, 10, 150
    index = torch.tensor([0, 149, 15, 16, 70])
    heads, angles = random(0, n, groups, share + 2, size), random(1, n, pairs)
    page = 16 if paged else 160
    count = n * 160 // page
    keys, values = random(2, count, groups, page, size) * 2, random(3, count, groups, page, size) * 2
    table = torch.randperm(count, generator=torch.Generator().manual_seed(4)).int().view(n, -1) if paged else None
    given = heads.clone(), torch.polar(torch.ones_like(angles), angles)[:, None], keys, values, table, index, longest, window
    expected = np.zeros((n, groups, share, size))
    stored = wide(keys), wide(values)
    for i in range(n):
        rows = [i] if table is None else table[i].tolist()
        for g in range(groups):
            own = turned(wide(heads)[i, g, : share + 1], wide(angles)[i])
            newest = index[i].item()
            stored[0][rows[newest // page], g, newest % page] = own[share]
            stored[1][rows[newest // page], g, newest % page] = wide(heads)[i, g, share + 1]
            k, v = (np.concatenate([part[row, g] for row in rows])[: newest + 1][-(window or 10**6) :] for part in stored)
            scores = own[:share] @ k.T / size**0.5
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            expected[i, g] = weights / weights.sum(-1, keepdims=True) @ v
    seen = made.attend(*given)
    close(seen, expected)
    close(keys, stored[0])
    close(values, stored[1])


def test_attend_to_what_is_no_number(made: Kernels) -> None:
    heads, keys = random(0, 1, 1, 3, 16), random(1, 1, 1, 16, 16)
    keys[0, 0, 2, 3] = torch.nan
    turn = torch.ones(1, 1, 1, dtype=torch.complex64)
    seen = [made.attend(heads.clone(), turn, keys.clone(), keys.clone(), None, torch.tensor([at]), 16, None) for at in (1, 3)]
    assert seen[0].isfinite().all() and seen[1].isnan().any()  # it is not to be seen, and to be seen


@needs_native
def test_threads_are_as_many_as_pytorch_has() -> None:
    """The same numbers by any number of them, to the last bit."""
    made, threads = kernels(), torch.get_num_threads()
    assert made is not None
    x, weight, found = random(0, 9, 64), random(1, 300, 64), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(made.linear(x, weight, None, "swish"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


class TestMachines:
    """What becomes of `kernels()` where something is missing or wrong."""

    @pytest.fixture(autouse=True)
    def anew(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setattr(native, "kernels", native.kernels.__wrapped__)

    @needs_native
    def test_it_is_compiled_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert native.kernels() is not None
        libraries = list((tmp_path / ".cache/trueline/native").iterdir())
        assert [path.suffix for path in libraries] == [".so"] and not (tmp_path / ".cache/trueline/native").stat().st_mode & 0o077
        monkeypatch.setattr(subprocess, "run", None)
        assert native.kernels() is not None

    @pytest.mark.filterwarnings("error")
    def test_without_a_compiler_nothing_is_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(native.shutil, "which", lambda name: None)
        assert native.kernels() is None
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
        assert native.lacks_compiler() == (native.sys.platform == "linux")
        monkeypatch.setenv("CC", "some cc")
        assert not native.lacks_compiler()

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("capability", ["DEFAULT", "SVE256", "ZVECTOR"])
    def test_other_processors(self, capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        assert native.kernels() is None and not native.lacks_compiler()

    @needs_native
    def test_a_compiler_that_cannot(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        broken = tmp_path / "broken"
        broken.write_text("#!/bin/sh\necho 'no such option: -fopenmp' >&2\nexit 1\n")
        broken.chmod(0o755)
        monkeypatch.setenv("CC", str(broken))
        with pytest.warns(UserWarning, match="going on without native.c: .*broken does not compile it .no such option: -fopenmp"):
            assert native.kernels() is None
        assert not list((tmp_path / ".cache/trueline/native").iterdir())
        monkeypatch.setenv("CC", str(tmp_path / "nowhere"))
        with pytest.warns(UserWarning, match="going on without native.c: .*No such file"):
            assert native.kernels() is None

    @needs_native
    def test_a_library_that_is_broken_or_wrong(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert native.kernels() is not None
        (library,) = (tmp_path / ".cache/trueline/native").iterdir()
        monkeypatch.setattr(native, "_right", lambda made: False)
        with pytest.warns(UserWarning, match="without native.c: it gives other numbers"):
            assert native.kernels() is None
        monkeypatch.setenv("HOME", str(tmp_path / "other"))
        (tmp_path / "other/.cache/trueline/native").mkdir(parents=True)
        (tmp_path / "other/.cache/trueline/native" / library.name).write_bytes(b"cut off")
        with pytest.warns(UserWarning, match="without native.c: .*file too short"):
            assert native.kernels() is None

    @needs_native
    def test_a_folder_that_cannot_be_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / ".cache").write_text("a file")
        with pytest.warns(UserWarning, match="without native.c: .*Not a directory"):
            assert native.kernels() is None

    @needs_native
    @pytest.mark.filterwarnings("error")
    def test_threads_of_another_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(native, "_shares_threads", lambda library: False)
        assert native.kernels() is None

    @needs_native
    @pytest.mark.parametrize("name", ["linear", "rms_norm", "attend"])
    def test_a_wrong_number_is_found(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        right = getattr(Kernels, name)
        monkeypatch.setattr(Kernels, name, lambda *given, **named: right(*given, **named) * 1.001)
        with pytest.warns(UserWarning, match="it gives other numbers"):
            assert native.kernels() is None
