"""Stages, warps and block widths of the Triton kernel, each on the same matrices.

The constants come from `tiling` in `grasp_kernels/project_triton.py`, which is replaced here by one
that changes what it returns: that is where a variant that wins goes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import NamedTuple

import bench_project as bench
import harness
import torch

import grasp_kernels as gk

from .inside import Inside

HOOK = "tiling"
STAGES = {"num_stages", "stages", "STAGES"}
MATRICES = [
    bench.Matrix("right", 16384, 4096, torch.bfloat16, 16),
    bench.Matrix("left", 4096, 14336, torch.bfloat16, 16),
    bench.Matrix("right", 16384, 4096, torch.bfloat16, 64),
    bench.Matrix("right", 16384, 4096, torch.float32, 16),
]
TINY = [bench.Matrix("right", 40, 96, torch.bfloat16, 16)]


class Variant(NamedTuple):
    stages: int | None
    warps: int
    BD: int

    def applied(self, options: dict) -> dict:
        """The kernel's constants changed; stages as it has them, or Triton's own."""
        named = STAGES & options.keys() or {"num_stages"}
        changed = options | {"num_warps": self.warps} | dict.fromkeys(named, self.stages)
        return changed | {"BD": self.BD} if "BD" in options else changed


def measure(inside: Inside) -> None:
    matrices = TINY if inside.tiny else MATRICES
    variants = [Variant(*v) for v in product((4, 3, 5), (8, 4), (128, 64, 32))]
    variants = [None, *variants[: 2 if inside.tiny else None]]
    first, rest = matrices[:2], matrices[2:]
    cases = [(m, v) for v in variants for m in first] + list(product(rest, variants))
    made: dict = {}
    inside.each(cases[:1], lambda case: _case(inside, made, *case), _name)
    inside.each(cases[1:], lambda case: _case(inside, made, *case), _name, trial=True)


def _name(case: tuple[bench.Matrix, Variant | None]) -> str:
    return f"{case[0]}, {case[1] or 'as it is'}"


def _case(inside: Inside, made: dict, matrix: bench.Matrix, variant: Variant | None) -> None:
    if matrix not in made:
        made[matrix] = matrix.made(inside.device)
    T, U = made[matrix]
    T.normal_()  # what another variant projected would hide one that does nothing
    target = torch.empty_like(T)
    with _changed(variant) as used, gk.backend("triton"):
        run = gk.Projector([T], [U], side=matrix.side)
        times = harness.timed(
            {"copy": lambda: target.copy_(T), "triton": run},
            inside.device,
            2 if inside.tiny else 12,
        )
    X = T.float()
    through = (U.mT @ X if matrix.side == "left" else X @ U).norm() / X.norm()
    inside.add(
        sound=bool(through <= max(1e-5, 4 * torch.finfo(matrix.dtype).eps)),
        case=_name((matrix, variant)),
        **matrix.about(),
        hook=f"grasp_kernels.project_triton.{HOOK}",
        variant=variant._asdict() if variant else None,
        options=used[-1] if used else None,
        ms=times["triton"],
        share=times["copy"] / times["triton"],
        leak=float(through),
    )


@contextmanager
def _changed(variant: Variant | None) -> Iterator[list[dict]]:
    """Inside, the kernel is laid out with this variant; what it then used is in the list."""
    from grasp_kernels import project_triton

    own: Callable[..., dict] | None = getattr(project_triton, HOOK, None)
    if own is None:
        raise LookupError(f"project_triton has no {HOOK}; name the function that gives constants")
    used: list[dict] = []

    def changed(*args, **kwargs):
        options = own(*args, **kwargs)
        used.append(variant.applied(options) if variant else options)
        return used[-1]

    setattr(project_triton, HOOK, changed)
    try:
        yield used
    finally:
        setattr(project_triton, HOOK, own)
