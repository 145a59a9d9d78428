"""Projection by the CUDA library: `csrc/project.cuh`, and `project_list.cuh` for lists."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .matrices import Row, listed

LARGEST_K = 64
SIDE = 16  # positions of a strip, as `csrc/project_list.cuh` has it


def refusal(T: Tensor, basis: Tensor) -> str | None:
    """Why these can't be projected here, or None."""
    k = basis.shape[-1]
    return f"k = {k} is above {LARGEST_K}" if k > LARGEST_K else None


def project_cuda(
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
