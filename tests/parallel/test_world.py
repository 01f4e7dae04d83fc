"""A world of one asks for nothing; any other must be what the configuration says."""

import pytest
import torch

from trueline.config.schema import MeshConfig
from trueline.errors import UserError
from trueline.parallel.world import World, all_max, all_sum, find_device, start, start_alone, stop

LAUNCHED = ("WORLD_SIZE", "RANK", "LOCAL_RANK")


@pytest.fixture(autouse=True)
def not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)


def test_a_world_of_one_needs_no_launcher() -> None:
    world = start(MeshConfig())
    assert (world.rank, world.size, world.first) == (0, 1, True)
    assert not torch.distributed.is_initialized()
    stop(world)


def test_in_a_world_of_one_a_sum_is_the_tensor_itself() -> None:
    x = torch.tensor([1.0, 2.0])
    assert all_sum(World(), x) is x and all_max(World(), x) is x


def test_the_device_is_the_accelerator_if_there_is_one() -> None:
    assert (find_device().type != "cpu") == torch.accelerator.is_available()


def test_a_mesh_without_its_processes_is_refused() -> None:
    with pytest.raises(UserError, match=r"mesh.data is 4 but 1 process takes part; .*torchrun --nproc-per-node 4"):
        start(MeshConfig(data=4))


def test_processes_without_their_mesh_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="mesh.data is 1 but 3 processes take part; set mesh.data=3"):
        start(MeshConfig())


def test_tensor_parallelism_is_refused_as_long_as_it_is_not_there() -> None:
    with pytest.raises(UserError, match="mesh.tensor: 2 is not there yet"):
        start(MeshConfig(tensor=2))


def test_recipes_start_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert start_alone(MeshConfig()).size == 1
    with pytest.raises(UserError, match="several processes are not there yet"):
        start_alone(MeshConfig(data=2))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="several processes are not there yet"):
        start_alone(MeshConfig())
