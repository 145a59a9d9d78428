"""Weights that FSDP2 splits over processes, and splits that can't be guarded.

Of a split weight a module shows the part that its process holds (a DTensor) between passes, and a
whole copy during them, which `fully_shard` may leave there after a forward pass.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from grasp.model import partitions

INSTEAD = "train with FSDP2 (torch's fully_shard; fsdp_version: 2 in accelerate's configuration)"


def is_split(model: nn.Module) -> bool:
    """Whether FSDP2 or ZeRO-3 splits weights of the model, so that a pass takes all processes."""
    return bool(_units(model)) or any(hasattr(p, "ds_id") for p in model.parameters())


def is_wrapped(model: nn.Module) -> bool:
    """Whether a wrapper for several processes holds the model, which waits for its gradients."""
    inner = getattr(model, "_orig_mod", model)
    return isinstance(inner, DistributedDataParallel) or partitions.engine(inner) or is_split(inner)


def local(T: Tensor) -> Tensor:
    """What this process holds of a tensor: its part of one that is split."""
    with torch.no_grad():
        return T.to_local() if hasattr(T, "to_local") else T


def reshard(model: nn.Module) -> None:
    """Let modules show the parts again, which training moves, and free the whole copies."""
    for unit in _units(model):
        unit.reshard()


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """With whole weights in a module that is read or called alone, which FSDP2 does not see.

    Every process must enter it.
    """
    aside = [
        (m, name, p)
        for m in module.modules()
        for name, p in m.named_parameters(recurse=False)
        if hasattr(p, "to_local")
    ]
    for m, name, p in aside:
        m._parameters[name] = nn.Parameter(p.detach().full_tensor(), requires_grad=False)
    try:
        with partitions.gathered(module.parameters()):
            yield
    finally:
        for m, name, p in aside:
            m._parameters[name] = p


def gradients(
    loss: Callable[[], Tensor], parameters: Sequence[nn.Parameter], model: nn.Module
) -> list[Tensor | None]:
    """Of a loss, by parameters of a model; of a split one, the part that this process holds.

    Those that FSDP2 splits get theirs in `.grad` alone, and `autograd.grad` would give None of each
    without a word. What lies in any `.grad` stays as it is.

    Raises:
        RuntimeError: none came.
    """
    if not _units(model):
        return list(torch.autograd.grad(loss(), parameters, allow_unused=True))
    reshard(model)
    aside = {p: p.grad for p in [*parameters, *model.parameters()] if p.requires_grad}
    try:
        for p in aside:
            p.grad = None
        loss().backward()
        found = [None if p.grad is None else local(p.grad) for p in parameters]
    finally:
        for p, gradient in aside.items():
            p.grad = gradient
    if all(D is None for D in found):
        raise RuntimeError(
            "no gradient came to the weights that FSDP2 splits, so that no basis could grow; call "
            "model.set_requires_gradient_sync(True) before the last micro-batch of a step"
        )
    return found


def refuse(model: nn.Module) -> None:
    """Refuse weights that something other than FSDP2 splits, or that are not loaded yet.

    Raises:
        ValueError: names the first such weight, what splits it, and what to do.
    """
    fsdp1 = any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules())
    if fsdp1 or any(getattr(p, "_fsdp_flattened", False) for p in model.parameters()):
        raise ValueError(
            "FSDP1 (FullyShardedDataParallel) keeps weights in flat pieces of several, which can't "
            f"be guarded; {INSTEAD}, DDP or DeepSpeed"
        )
    unloaded = [name for name, p in model.named_parameters() if p.is_meta]
    if unloaded:
        raise ValueError(f"{unloaded[0]} is on the meta device; load the weights, then attach")
    if others := _split_otherwise(model):
        raise ValueError(
            f"{others[0]} is split over processes by tensor parallelism (tp_plan), or by something "
            f"else that is not FSDP2, which the guard can't follow; {INSTEAD}, DDP or DeepSpeed"
        )


def _split_otherwise(model: nn.Module) -> list[str]:
    """The weights of which FSDP2 gathers no whole tensor."""

    def split() -> set[str]:
        return {name for name, p in model.named_parameters() if hasattr(p, "to_local")}

    found = split()
    for unit in _units(model) if found else ():
        unit.unshard()
        found &= split()
        unit.reshard()
    return [name for name, _ in model.named_parameters() if name in found]


def _units(model: nn.Module) -> list[nn.Module]:
    """The modules that `fully_shard` was called on; without its import there is none."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    return [m for m in model.modules() if isinstance(m, kind)]
