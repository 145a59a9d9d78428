"""Several processes that train copies of one model: what one of them finds, all take.

Each sees the same gradients and weights, but what it computes of them may differ in the last bit,
and a basis that differs moves the copies apart.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from grasp.model.partitions import engine


def several() -> bool:
    """Whether more than one process trains."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first() -> bool:
    """Whether this process is the one that writes and speaks for all."""
    return not several() or dist.get_rank() == 0


def launched() -> bool:
    """Whether several processes were started together, though they may not have met yet."""
    return several() or int(os.environ.get("WORLD_SIZE") or 1) > 1


def from_first(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The first process's tensors, on each one's own devices; every process must call this.

    A tensor that is listed several times stays one.
    """
    if not several():
        return list(tensors)
    found: dict[int, Tensor] = {}
    for tensor in tensors:
        if id(tensor) not in found:
            found[id(tensor)] = object_from_first(tensor.detach().cpu()).to(tensor.device)
    return [found[id(tensor)] for tensor in tensors]


def object_from_first(thing: Any) -> Any:
    """The first process's; every process must call this."""
    box = [thing]
    if several():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def wait() -> None:
    """For all processes to come here."""
    if several():
        dist.barrier()


def on_all(flags: Sequence[bool]) -> list[bool]:
    """Which of the flags every process has set; each must call this, with as many."""
    if not several():
        return list(flags)
    found: list[list[bool]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, list(flags))
    return [all(of_each) for of_each in zip(*found, strict=True)]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP, DataParallel, DeepSpeed's engine or what torch.compile gives."""
    if hasattr(model, "_orig_mod"):  # of torch.compile
        return unwrapped(model._orig_mod)
    wrappers = (DistributedDataParallel, DataParallel)
    return unwrapped(model.module) if isinstance(model, wrappers) or engine(model) else model
