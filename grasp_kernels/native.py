"""The compiled CUDA library: built where a compiler is, loaded when it is first asked for."""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from grasp_kernels.matrices import matrices

LIBRARY = Path(__file__).with_name("_native.so")

torch.library.define(
    "grasp_native::project_all",
    "(Tensor[] Ts, Tensor(a!)[] outs, Tensor[] bases, Tensor[] Cs, bool left) -> ()",
)
torch.library.define(
    "grasp_native::orthonormalize_all",
    "(Tensor(a!)[] Ws, Tensor(b!)[] Qs, Tensor(c!)[] ranks, float[] rtols) -> ()",
)


@cache
def missing() -> str | None:
    """Load the library; why it can't be, or None."""
    if not LIBRARY.exists():
        return "not built; install with GRASP_CUDA=1 where nvcc is"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY.name} can't be loaded ({error})"
    return None


def project_native(
    Ts: list[Tensor], outs: list[Tensor], bases: list[Tensor], Cs: list[Tensor], left: bool
) -> None:
    """Each of `Ts` projected into its place in `outs`, which may be the tensor itself.

    One launch for all small matrices of a device, one more for each of 2²⁰ elements or more in
    16 bits; arguments as `project_` has checked.
    """
    staged: list[tuple[Tensor, Tensor]] = []
    by_device: dict[torch.device, tuple[list, list, list, list]] = {}
    for i, T in enumerate(Ts):
        basis = bases[i].float().contiguous()
        C = Cs[i].float().contiguous() if Cs else None
        group = by_device.setdefault(T.device, ([], [], [], []))
        for matrix, out, part in matrices(T, outs[i], C, left, staged):
            for kept, given in zip(group, (matrix, out, basis, part), strict=True):
                if given is not None:
                    kept.append(given)
    for group in by_device.values():
        torch.ops.grasp_native.project_all(*group, left)
    for kept, out in staged:
        out.copy_(kept)


def orthonormalize_native(Ws: list[Tensor], ranks: list[Tensor], rtols: list[float]) -> None:
    """Each `W [d, k]` in place and its rank; one launch for each device and dtype."""
    Qs = [torch.empty(W.shape, dtype=torch.float64, device=W.device) for W in Ws]
    for device in dict.fromkeys(W.device for W in Ws):
        chosen = [i for i, W in enumerate(Ws) if W.device == device]
        torch.ops.grasp_native.orthonormalize_all(
            *([given[i] for i in chosen] for given in (Ws, Qs, ranks, rtols))
        )
