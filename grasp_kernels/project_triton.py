"""Projection in Triton: which kernel takes which matrix, and the launches of a list."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from . import factors_triton, strips_triton
from .matrices import Row, listed
from .tables import capturing

FEW = 256  # rows up to which a matrix is cut along d, above which into strips
KEPT = 256  # lists

Launch = factors_triton.Launch | strips_triton.Launch


def refusal(T: Tensor, basis: Tensor) -> str | None:
    """Why these can't be projected here as fast as elsewhere, or None."""
    (d, k), widest = basis.shape, strips_triton.WIDEST
    if k > widest and T.numel() > FEW * d:
        return f"k = {k} of {T.numel() // d} rows is a matrix product, which PyTorch's libraries do"
    return None


def project_triton(
    Ts: list[Tensor], outs: list[Tensor], bases: list[Tensor], Cs: list[Tensor], left: bool
) -> None:
    """Each of `Ts` projected into its place in `outs`, which may be the tensor itself.

    One launch for each device, dtype and tiling in the list; arguments as `project_` has checked.
    """
    staged: list[tuple[Tensor, Tensor]] = []
    for device, found in listed(Ts, outs, bases, Cs, left, staged).items():
        lay_out = launches if capturing() else _kept_launches
        for launch, chosen in lay_out(tuple(found.rows), device):
            pointers = tuple(p for i in chosen for p in found.pointers[2 * i : 2 * i + 2])
            launch.run(launch.places(pointers))
    for kept, out in staged:
        out.copy_(kept)


def launches(rows: Sequence[Row], device: torch.device) -> list[tuple[Launch, list[int]]]:
    """One for each dtype, side and tiling, and which of the rows are in it."""
    few = [i for i, row in enumerate(rows) if row.n <= FEW or row.k > strips_triton.WIDEST]
    many = [i for i, row in enumerate(rows) if not (row.n <= FEW or row.k > strips_triton.WIDEST)]
    found = [
        (launch, [chosen[i] for i in these])
        for module, chosen in ((factors_triton, few), (strips_triton, many))
        for launch, these in module.launches([rows[i] for i in chosen], device)
    ]
    return found


_kept_launches = lru_cache(KEPT)(launches)
