"""Who takes part in a run. One rule: a world of one needs no launcher, and asks nothing of torch.distributed."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from trueline.config.schema import MeshConfig
from trueline.errors import UserError


@dataclass(frozen=True)
class World:
    """This process's place: `rank` of `size`, computing on `device`."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def first(self) -> bool:
        """The one rank that writes files and speaks."""
        return self.rank == 0


def start(mesh: MeshConfig) -> World:
    """Joins the ranks that torchrun started (its environment variables); without them this is a world of one.

    UserError when the number of processes is not what `mesh` asks for. Nothing is split over `mesh.tensor` yet.
    """
    size, rank, local = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0")))
    if mesh.tensor > 1:
        raise UserError(f"mesh.tensor: {mesh.tensor} is not there yet; set mesh.tensor=1 and use mesh.data")
    if mesh.data != size:
        raise UserError(
            f"mesh.data is {mesh.data} but {size} process{'es take' if size > 1 else ' takes'} part; "
            f"set mesh.data={size}, or start with torchrun --nproc-per-node {mesh.data} -m trueline ..."
        )
    device = find_device(local)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group(dist.get_default_backend_for_device(device), rank=rank, world_size=size)
    return World(rank, size, device)


def start_alone(mesh: MeshConfig) -> World:
    """A world of one; UserError when more was asked for. Gradients are summed over ranks already, but no recipe places its files, its
    rollouts and its reference for several yet, and a run that half does so loses data without a word.
    """
    if mesh.data > 1 or mesh.tensor > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("several processes are not there yet; leave mesh.data and mesh.tensor at 1, and start trueline without torchrun")
    return start(mesh)


def find_device(local: int = 0) -> torch.device:
    """Accelerator number `local` of this machine, or its CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return torch.device("cpu")
    if local >= torch.accelerator.device_count():
        raise UserError(f"process {local} of this machine has no {accelerator.type} device; there are {torch.accelerator.device_count()}")
    torch.accelerator.set_device_index(local)
    return torch.device(accelerator.type, local)


def fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in its own tiles (AMX) and torch uses them."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)  # torch's own test, without a public name
    return supported is not None and bool(supported()) and torch.backends.mkldnn.is_available()


def stop(world: World) -> None:
    """Leaves the group `start` joined."""
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def all_sum(world: World, tensor: Tensor) -> Tensor:
    """Sum of every rank's `tensor`, same shape and dtype; `tensor` itself in a world of one."""
    return _reduce(world, tensor, dist.ReduceOp.SUM)


def all_max(world: World, tensor: Tensor) -> Tensor:
    """Largest of every rank's `tensor`, element by element; `tensor` itself in a world of one."""
    return _reduce(world, tensor, dist.ReduceOp.MAX)


def _reduce(world: World, tensor: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
    if world.size == 1:
        return tensor
    result = tensor.detach().to(world.device, copy=True)
    dist.all_reduce(result, op=how)
    return result.to(tensor.device)
