"""The compiled CUDA library: built where a compiler is, loaded when it is first asked for."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from grasp_kernels.matrices import Row, listed

SIDE = 16  # positions of a strip, as `csrc/project_list.cuh` has it
LIBRARY = Path(__file__).with_name("_native.so")

torch.library.define(
    "grasp_native::project_all",
    "(Tensor rows, int device, int energies) -> ()",
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
    for device, found in listed(Ts, outs, bases, Cs, left, staged, packed=True).items():
        launch = Launch(found.rows, device)
        launch.run(launch.places(tuple(found.pointers)))
    for kept, out in staged:
        out.copy_(kept)


def launches(rows: Sequence[Row], device: torch.device) -> list[tuple["Launch", list[int]]]:
    """One for all, and which of the rows are in it."""
    return [(Launch(rows, device), list(range(len(rows))))]


class Launch:
    """Matrices of one device, laid out for the library."""

    def __init__(self, rows: Sequence[Row], device: torch.device):
        self.device = device
        strips = [-(-row.n // SIDE) for row in rows]
        self.count = sum(strips)
        self.owners = [i for i, count in enumerate(strips) for _ in range(count)]
        """The matrix that each strip is of."""
        self.table = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), len(Row._fields))

    def places(self, pointers: tuple[int, ...]) -> Tensor:
        """The table with the addresses of each matrix and its projection before its row."""
        return torch.cat([torch.tensor(pointers).reshape(-1, 2), self.table], 1)

    def run(self, places: Tensor, energies: Tensor | None = None) -> None:
        """Project all where they lie; `energies [strips, 2]` as `project_triton.Launch.run`."""
        address = 0 if energies is None else energies.data_ptr()
        torch.ops.grasp_native.project_all(places, self.device.index, address)


def orthonormalize_native(Ws: list[Tensor], ranks: list[Tensor], rtols: list[float]) -> None:
    """Each `W [d, k]` in place and its rank; one launch for each device and dtype."""
    Qs = [torch.empty(W.shape, dtype=torch.float64, device=W.device) for W in Ws]
    for device in dict.fromkeys(W.device for W in Ws):
        chosen = [i for i, W in enumerate(Ws) if W.device == device]
        torch.ops.grasp_native.orthonormalize_all(
            *([given[i] for i in chosen] for given in (Ws, Qs, ranks, rtols))
        )
