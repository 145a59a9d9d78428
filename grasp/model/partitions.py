"""Models under DeepSpeed, whose ZeRO-3 leaves weights empty but while a module runs.

DeepSpeed is asked only where it is imported already.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn


def engine(model: nn.Module) -> bool:
    """Whether it is what `deepspeed.initialize` gives."""
    deepspeed = sys.modules.get("deepspeed")
    return isinstance(model, getattr(deepspeed, "DeepSpeedEngine", ()))


def partitioned(T: Tensor) -> bool:
    """Whether ZeRO trains flat copies of it, or splits it."""
    return hasattr(T, "_hp_mapping") or hasattr(T, "ds_id")


def shape(T: Tensor) -> torch.Size:
    """Of the weight as a whole."""
    return getattr(T, "ds_shape", T.shape)


@contextmanager
def written(parameter: Tensor) -> Iterator[Tensor]:
    """A weight that no optimizer holds, whole, to be written alike by every process."""
    if not hasattr(parameter, "ds_id"):
        yield parameter
        return
    with sys.modules["deepspeed"].zero.GatheredParameters([parameter], modifier_rank=0):
        yield parameter


@contextmanager
def gathered(parameters: Iterable[Tensor]) -> Iterator[None]:
    """With whole weights, to be read; every process must enter it."""
    empty = [p for p in parameters if hasattr(p, "ds_id") and p.numel() != p.ds_numel]
    with sys.modules["deepspeed"].zero.GatheredParameters(empty) if empty else ExitStack():
        yield
