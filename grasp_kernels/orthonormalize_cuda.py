"""Orthonormalisation by the CUDA library: `csrc/orthonormalize.cuh`."""

import torch
from torch import Tensor

LARGEST_K = 64
LONGEST = 11_000  # d: a column in the 99 KiB of shared memory that every device has


def refusal(W: Tensor) -> str | None:
    """Why this can't be orthonormalised here, or None."""
    d, k = W.shape
    if k > LARGEST_K:
        return f"k = {k} is above {LARGEST_K}"
    return f"d = {d} is above {LONGEST}, a column in shared memory" if d > LONGEST else None


def orthonormalize_cuda(Ws: list[Tensor], ranks: list[Tensor], rtols: list[float]) -> None:
    """Each `W [d, k]` in place and its rank; one launch for each device and dtype."""
    Qs = [torch.empty(W.shape, dtype=torch.float64, device=W.device) for W in Ws]
    for device in dict.fromkeys(W.device for W in Ws):
        chosen = [i for i, W in enumerate(Ws) if W.device == device]
        torch.ops.grasp_native.orthonormalize_all(
            *([given[i] for i in chosen] for given in (Ws, Qs, ranks, rtols))
        )
