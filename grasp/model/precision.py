"""Where a model runs, and in what its frozen weights are held there."""

import time
from functools import cache

import torch

DEVICES = ("cuda", "xpu", "mps", "cpu")
FASTER = 1.3  # times: what bfloat16 must win by, on a processor
SIDE = 1024
TRIES = 5


def device_of(name: str = "auto") -> torch.device:
    """The device of this name; "auto" is an accelerator, if there is one.

    Raises:
        ValueError: it is not here; says which are.
    """
    here = [d for d in DEVICES if d == "cpu" or getattr(torch, d).is_available()]
    if name == "auto":
        return torch.device(here[0])
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"device is {name!r}; give auto, or one of {', '.join(DEVICES)}"
        ) from error
    if device.index:
        raise ValueError(
            f"device is {name!r}; give {device.type!r}, and choose which by CUDA_VISIBLE_DEVICES"
        )
    if device.type not in here:
        raise ValueError(f"device is {name!r}, which is not here; give auto or {', '.join(here)}")
    return device


def called(device: torch.device) -> str:
    """A device as people know it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@cache
def fast_in_bf16(kind: str) -> bool:
    """Whether products in bfloat16 are faster than in fp32 on a kind of device.

    A processor is asked: one without units for it takes several times as long.
    """
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind != "cpu":
        return kind == "xpu"

    def seconds(dtype: torch.dtype) -> float:
        x = torch.ones(SIDE // 4, SIDE, dtype=dtype)
        W = torch.ones(SIDE, SIDE, dtype=dtype)
        taken = []
        for _ in range(TRIES):
            start = time.perf_counter()
            x @ W
            taken.append(time.perf_counter() - start)
        return min(taken)

    return seconds(torch.float32) > FASTER * seconds(torch.bfloat16)
