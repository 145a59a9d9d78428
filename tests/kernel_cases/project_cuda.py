"""`csrc/project.cuh`: clusters; of a block one warp moves strips, eight multiply, one adds up."""

from collections.abc import Iterator
from functools import partial
from math import ceil

from ..aot import CudaJob, TritonJob
from ..cluster_model import simulated
from ..static_model import Chip, Named, Work
from .shapes import SIZES, Case, large

MULTIPLIERS = 8  # warps
TYPES = {"fp32": "f", "bf16": "13__nv_bfloat16"}  # as names are mangled
PROCESSORS = 128  # on which clusters of up to 16 blocks find room, of an H100's 132


def cases(chip: Chip) -> Iterator[Case]:
    from grasp_kernels.project_cuda import plan

    for T in large():
        size = SIZES[T.dtype]
        found = plan(size, T.d, T.k, chip.shared_block) if chip.clusters else None
        if found is None:
            continue
        strip = found.strip * found.width * size  # bytes of a block's
        count = ceil(T.n / found.strip)
        clusters = min(count, PROCESSORS // found.blocks)
        basis = clusters * T.basis
        yield Case(
            T.name,
            CudaJob("project.cu", _name(T, found), found.bytes, 416 if T.side == "left" else 320),
            Work(
                tensor=T.bytes,
                once=2 * T.bytes + T.basis,
                again=0,
                resident=T.basis,
                l2=2 * T.bytes + basis,
                items=[{}] * count,
                programs=clusters,
                loop=Named("strip", "HMMA", ahead=found.stages - 1),
                blocks=found.blocks,
                warps=MULTIPLIERS,
                bulk=(found.stages - 1) * strip,
                stages=partial(_cycles, found, size, count, clusters, basis, chip),
            ),
        )


def _cycles(
    found, size: int, count: int, clusters: int, basis: float, chip: Chip, strip: float
) -> float:
    """Of a launch whose strips take `strip` cycles each, half of it for either product."""
    until_kept = 1500 + basis / (chip.l2 / chip.clock)
    speed = chip.copy / chip.clock
    return simulated(found, size, count, clusters, strip / 2, until_kept, speed)


def _name(T, found) -> str:
    sizes = f"ELi{found.kp}ELi{found.slice}ELi{found.strip}E"
    return f"I{TYPES[T.dtype]}Lb{int(T.side == 'left')}{sizes}"


def jobs() -> list[TritonJob]:
    return []  # nvcc compiles all there are at once
