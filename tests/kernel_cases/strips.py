"""`grasp_kernels/strips_triton.py`: a program walks along d of a strip, and back."""

from collections.abc import Iterator
from itertools import product
from math import ceil

from ..aot import TritonJob
from ..static_model import Chip, Named, Work
from .shapes import CODES, MMA, SIZES, Case, large

TAKES = {"places": "*i64", "table": "*i64", "strips": "*i32", "count": "i32"}
WALKS = Named("forward", f"{MMA} LDGSTS !STG"), Named("back", f"{MMA} STG")


def cases(chip: Chip) -> Iterator[Case]:
    from grasp_kernels.strips_triton import WIDEST, tiling

    for T in large():
        if T.k > WIDEST:
            continue  # left to PyTorch's libraries
        chosen = tiling(CODES[T.dtype], T.side == "left", T.k)
        count, strip = ceil(T.n / chosen["BS"]), T.d * chosen["BS"] * SIZES[T.dtype]
        fits = min(int(chip.l2_size / 2 / strip), 4 * chip.multiprocessors)
        programs = min(count, max(chip.multiprocessors, fits))
        blocks = ceil(T.d / chosen["BD"])
        yield Case(
            T.name,
            _job(chosen),
            Work(
                tensor=T.bytes,
                once=2 * T.bytes + T.basis,
                again=T.bytes,
                resident=programs * strip + T.basis,
                l2=3 * T.bytes + 2 * count * T.basis,
                items=[{"forward": blocks, "back": blocks}] * count,
                programs=programs,
                loop=Named("strip", f"{MMA} STG", WALKS),
            ),
        )


def jobs() -> list[TritonJob]:
    from grasp_kernels.strips_triton import tiling

    return [
        _job(tiling(*chosen), {"energies": "*fp32"})
        for chosen in product(CODES.values(), (False, True), (16, 32, 64))
    ]


def _job(chosen: dict, measured: dict[str, str] | None = None) -> TritonJob:
    from grasp_kernels.strips_triton import COLUMNS

    whole = {"COLUMNS": COLUMNS, "UNIT": 16, "VECTOR": True}
    takes = TAKES | (measured or {})
    return TritonJob("grasp_kernels.strips_triton", "strips_kernel", takes, {**chosen, **whole})
