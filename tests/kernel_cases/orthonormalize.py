"""`grasp_kernels/orthonormalize_triton.py`: six walks along d for each column."""

from collections.abc import Iterator
from itertools import product
from math import ceil

from ..aot import TritonJob
from ..static_model import Chip, Named, Work
from .shapes import CODES, Case


def cases(chip: Chip) -> Iterator[Case]:
    from grasp_kernels.orthonormalize_triton import tiling

    for k in (16, 64):
        d, many, chosen = 8192, 64, tiling(k)
        tensor, blocks = many * d * k * 4, ceil(d / chosen["BD"])
        walks = ("size", "inside", "off", "inside again", "off again", "keep")
        marks = ("LDG STG", "LDG !STG", "LDG STG", "LDG !STG", "LDG STG")
        column = [Named(w, m) for w, m in zip(walks[:-1], marks, strict=True)]
        column.append(Named("keep", "LDG STG", per="STG"))
        loops = Named("column", "LDG STG", tuple(column)), Named("last", "STG", per="STG")
        stores = d * k / (32 * chosen["num_warps"])  # a thread's, of the result
        item = {**dict.fromkeys(walks, blocks), "column": k, "last": stores}
        fp64 = many * d * 8
        yield Case(
            f"{many} of [{d}, {k}] fp32",
            _job({"CODE": 0, **chosen}),
            Work(
                tensor=tensor,
                once=2 * tensor + k * fp64,
                again=4 * fp64 * k * k / 2,
                resident=k * fp64 / 2,  # half of the columns are there on average
                l2=2 * tensor + 6 * k * fp64 + 4 * fp64 * k * k / 2,
                items=[item] * many,
                programs=many,
                loop=Named("matrix", inner=loops),
                in_turn=False,
            ),
        )


def _job(chosen: dict) -> TritonJob:
    from grasp_kernels.orthonormalize_triton import COLUMNS

    return TritonJob(
        "grasp_kernels.orthonormalize_triton",
        "orthonormalize_kernel",
        {"table": "*i64"},
        {"COLUMNS": COLUMNS, **chosen},
    )


def jobs() -> list[TritonJob]:
    from grasp_kernels.orthonormalize_triton import tiling

    chosen = product(CODES.values(), (16, 32, 64))
    return [_job({"CODE": code, **tiling(KP)}) for code, KP in chosen]
