"""The pretended device is built once; the tests' own process stays without it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.recipes.commands import ROOT, Commands

HERE = Path(__file__).parent


class OnDevice(Commands):
    """`Commands` by server.py of this folder."""

    def __init__(self, scratch: Path, environment: dict[str, str]):
        command = [sys.executable, "-m", "tests.accelerator.server"]
        self.server = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.scratch, self.count = scratch, 0


@pytest.fixture(scope="session")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """device.cpp, built."""
    compiler = shutil.which("g++")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("the pretended device is built with g++ on Linux")
    if torch.version.cuda or torch.version.hip:
        pytest.skip("this torch has a device of its own; the pretended one takes its place in a torch for the CPU only")
    home, built = Path(torch.__file__).parent, tmp_path_factory.mktemp("device") / "device.so"
    headers = [f"-I{home / 'include'}", f"-I{home / 'include/torch/csrc/api/include'}"]
    libraries = [f"-L{home / 'lib'}", f"-Wl,-rpath,{home / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    command = [compiler, "-shared", "-fPIC", "-std=c++20", *headers, str(HERE / "device.cpp"), "-o", str(built), *libraries]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return built


@pytest.fixture(scope="session")
def environment(device: Path) -> dict[str, str]:
    """Of a process that is to have the device."""
    settings = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return os.environ | settings | {"PRETEND_DEVICE": str(device)}


@pytest.fixture(scope="session")
def on_device(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """The command line on the pretended device: `on_device("sft", "config.yaml").ok()`."""
    commands = OnDevice(tmp_path_factory.mktemp("on-device"), environment)
    yield commands
    commands.close()
