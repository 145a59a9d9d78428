"""`grasp_kernels/orthonormalize_gram.py`: three launches, once where the condition is good."""

from collections.abc import Iterator
from itertools import product

import torch

from ..aot import TritonJob
from ..static_model import Chip, Named, Work
from .shapes import Case

TAKES = {
    "gram": {"table": "*i64", "states": "*i32", "partials": "*fp64", "parts": "i32"},
    "apply": {"table": "*i64", "states": "*i32", "X": "*fp64", "parts": "i32"},
    "columns": {"table": "*i64", "states": "*i32", "X": "*fp64", "scratch": "*fp64"},
}
TAKES["columns"] |= {"count": "i32", "room": "i32"}
TAKES["eliminate"] = TAKES["gram"] | {"X": "*fp64"}
MANY, D = 64, 8192
PRODUCT = "DMMA|DFMA"  # Triton has no other for sm_100


def cases(chip: Chip) -> Iterator[Case]:
    import torch

    from grasp_kernels.orthonormalize_triton import tilings

    for k in (16, 64):
        gram, eliminate, apply = tilings(k, torch.float32, 0)
        works = {
            "gram": (gram, _gram(k, gram)),
            "eliminate": (eliminate, _eliminate(k, eliminate, D / gram["PART"])),
            "apply": (apply, _apply(k, apply)),
        }
        for stem, (chosen, work) in works.items():
            job = _job(stem, {"SECOND": False, **chosen})
            yield Case(f"{MANY} of [{D}, {k}] fp32, {stem}", job, work)


def _gram(k: int, chosen: dict) -> Work:
    parts, blocks = D / chosen["PART"], chosen["BLOCKS"]
    tensor, sums = MANY * D * k * 4, int(MANY * parts * blocks * (blocks + 1) / 2)
    shares = MANY * parts * k * k * 8
    walk = Named("walk", f"{PRODUCT} !STG")
    items = [{"walk": chosen["PART"] / chosen["BD"]}] * sums
    return _work(tensor, tensor + shares, tensor * (blocks + 1) / 2 + shares, items, walk)


def _eliminate(k: int, chosen: dict, parts: float) -> Work:
    tensor, BK = MANY * D * k * 4, chosen["BK"]
    shares, panels = MANY * parts * k * k * 8, k // BK
    loads = parts * BK * k / (32 * chosen["num_warps"])  # a thread's, of a panel of all parts
    item = {"scales": parts, "strip": loads, "panel": panels, "column": BK}
    item |= {"build": panels, "off": (panels - 1) / 2, "finish": panels}
    strip, column = Named("strip", "LDG !STG", per="LDG"), Named("column", "DFMA MUFU")
    scales = Named("scales", "LDG !STG", per="LDG")
    if panels == 1:
        loops = scales, strip, Named("panel", "DFMA STG", (column,))
    else:
        panel = Named("panel", "DFMA STG", (column, Named("off", f"{PRODUCT} !MUFU")))
        loops = scales, Named("build", "LDG STG", (strip,)), panel, Named("finish", "DFMA STG")
    return _work(tensor, shares, 2 * shares, [item] * MANY, *loops)


def _apply(k: int, chosen: dict) -> Work:
    tensor, parts = MANY * D * k * 4, MANY * D // chosen["PART"]
    inner = (Named("left", PRODUCT),) if k > chosen["BK"] else ()
    walk = Named("walk", f"{PRODUCT} STG", inner)
    item = {"walk": chosen["PART"] / chosen["BD"], "left": k / chosen["BK"]}
    return _work(tensor, 2 * tensor, 2 * tensor + parts * k * k * 8, [item] * parts, walk)


def _work(tensor: float, once: float, l2: float, items: list, *loops: Named) -> Work:
    return Work(
        tensor=tensor,
        once=once,
        again=0,
        resident=tensor,
        l2=l2,
        items=items,
        programs=len(items),
        loop=Named("program", inner=loops),
        in_turn=False,
    )


def jobs() -> list[TritonJob]:
    from grasp_kernels.orthonormalize_triton import WIDEST, configurations

    kinds = product((torch.float32, torch.bfloat16, torch.float16), (0,), (64, WIDEST))
    found = [job for kind in kinds for job in configurations(*kind)]
    return [_job(*job) for i, job in enumerate(found) if job not in found[:i]]


def _job(stem: str, chosen: dict) -> TritonJob:
    module = "orthonormalize_columns" if stem == "columns" else "orthonormalize_gram"
    return TritonJob(f"grasp_kernels.{module}", f"{stem}_kernel", TAKES[stem], chosen)
