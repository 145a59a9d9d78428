"""`csrc/project.cuh`: a cluster of blocks holds a strip; of 16 bits alone."""

from collections.abc import Iterator
from math import ceil

from ..aot import CudaJob, TritonJob
from ..static_model import Chip, Named, Work
from .shapes import Case, large

BS, PAD, WARPS = 32, 8, 8  # of csrc/project.cuh


def cases(chip: Chip) -> Iterator[Case]:
    for T in large():
        fits = _cluster(T.side, T.d, T.k, chip) if T.dtype != "fp32" and T.k <= 64 else None
        if fits is None:
            continue
        blocks, slice_, KP, shared = fits
        strips, threads = ceil(T.n / BS), 32 * WARPS
        clusters = chip.multiprocessors * (2 if 2 * shared < chip.shared else 1) // blocks
        chunks = BS * slice_ / 8 / threads
        turns = WARPS // (KP // 16)
        item = {
            "load": chunks,
            "first": slice_ / 16 / turns * (BS / 16) * 2,
            "share": BS * KP / threads,
            "exchange": max(1, BS * KP / blocks / threads),
            "gather": blocks,
            "spread": blocks,
            "second": (BS / 16) * (slice_ / 16) / WARPS * (KP / 16) * 2,
            "store": chunks,
        }
        gathers = (
            Named("gather", "LD. !ST.", per="LD."),
            Named("spread", "ST. !LD.", per="ST."),
        )
        inner = (
            Named("load", "LDGSTS !HMMA", per="LDGSTS"),
            Named("first", "HMMA LDSM !STS", per="HMMA"),
            Named("share", "STS !HMMA !LDGSTS !ST.", per="STS"),
            Named("exchange", "LD. ST.", gathers),
            Named("second", "HMMA STS", per="HMMA"),
            Named("store", "STG LDS !HMMA", per="STG"),
        )
        code = f"project_kernelI13__nv_bfloat16Lb{int(T.side == 'left')}ELi{KP}E"
        yield Case(
            T.name,
            CudaJob("project.cu", code, shared, threads),
            Work(
                tensor=T.bytes,
                once=2 * T.bytes + T.basis,
                again=0,
                resident=T.basis,
                l2=2 * T.bytes + T.basis * (chip.multiprocessors // blocks),
                items=[item] * strips,
                programs=min(strips, clusters),
                loop=Named("strip", "HMMA STG", inner),
                blocks=blocks,
            ),
        )


def _cluster(side: str, d: int, k: int, chip: Chip) -> tuple[int, int, int, int] | None:
    """Blocks, slice of d, KP and bytes of shared memory, as csrc/project.cu chooses them."""
    KP = next(x for x in (16, 32, 64) if k <= x)
    for limit in (chip.shared_block // 2, chip.shared_block):
        for blocks in (1, 2, 4, 8, 16) if chip.clusters else (1,):
            slice_ = ceil(d / (blocks * 16)) * 16
            row, rows = (BS, slice_) if side == "left" else (slice_, BS)
            shared = slice_ * (KP + PAD) * 2 + rows * (row + PAD) * 2
            shared += WARPS // (KP // 16) * BS * KP * 4 + BS * KP * 4 + BS * (KP + PAD) * 2
            shared += (2 + WARPS) * 8
            if shared <= limit:
                return blocks, slice_, KP, shared
    return None


def jobs() -> list[TritonJob]:
    return []  # nvcc compiles all there are at once
