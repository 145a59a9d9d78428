"""Several processes that train copies of one model: what one of them finds, all take.

Each sees the same gradients and weights, but what it computes of them may differ in the last bit,
and a basis that differs moves the copies apart.
"""

import os
from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from grasp.model.partitions import engine


def several() -> bool:
    """Whether more than one process trains."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


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
            box = [tensor.detach().cpu()]
            dist.broadcast_object_list(box, src=0)
            found[id(tensor)] = box[0].to(tensor.device)
    return [found[id(tensor)] for tensor in tensors]


def is_first() -> bool:
    """Whether this process is the one that writes what all have."""
    return not several() or dist.get_rank() == 0


def wait() -> None:
    """For all processes to come here."""
    if several():
        dist.barrier()


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP, DataParallel, DeepSpeed's engine or what torch.compile gives."""
    if hasattr(model, "_orig_mod"):  # of torch.compile
        return unwrapped(model._orig_mod)
    wrappers = (DistributedDataParallel, DataParallel)
    return unwrapped(model.module) if isinstance(model, wrappers) or engine(model) else model


def refuse_sharded(model: nn.Module) -> None:
    """Refuse a model of whose weights each process holds a part.

    Raises:
        ValueError: names the first such weight, or FSDP.
    """
    split = [name for name, p in model.named_parameters() if hasattr(p, "to_local")]  # DTensor
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        split = split or ["a weight under FullyShardedDataParallel"]
    if split:
        raise ValueError(
            f"{split[0]} is split over processes (FSDP, tensor parallel), and a projection needs "
            "whole columns; train with DDP, which suits a LoRA, or in one process"
        )
