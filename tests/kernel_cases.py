"""Every kernel: what may be launched, and the launches whose speed is predicted.

To add a kernel: a function that gives a `Case` for each launch, with the job that compiles it and
the `Work` it is given, and a line in `FAMILIES`; in `jobs`, all configurations that can be chosen.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil

from .aot import CudaJob, TritonJob
from .static_model import Chip, Named, Work

SIZES = {"fp32": 4, "bf16": 2}
MMA = "HMMA|HGMMA|UTCHMMA"  # a tensor core's product, whatever its form
CODES = {"fp32": 0, "bf16": 1, "mixed": 3}


@dataclass(frozen=True)
class Case:
    name: str
    job: TritonJob | CudaJob
    work: Work


MATRICES = [  # side, shape of T, dtype, ranks
    ("right", (16384, 4096), "bf16", (16, 64, 256)),
    ("right", (65536, 4096), "bf16", (16, 64, 256)),
    ("right", (16384, 4096), "fp32", (16, 64, 256)),
    ("right", (65536, 4096), "fp32", (16, 64, 256)),
    ("right", (16384, 8192), "bf16", (64,)),
    ("right", (8192, 16384), "bf16", (16,)),
    ("left", (4096, 14336), "bf16", (16, 64)),
    ("left", (14336, 4096), "bf16", (16, 64)),
    ("left", (8192, 28672), "bf16", (16, 64)),
    ("left", (4096, 14336), "fp32", (16,)),
]
# A layer of an 8B model: inputs and outputs of q, k, v, o, gate, up, down; 32 layers.
INPUTS = (4096, 4096, 4096, 4096, 4096, 4096, 14336) * 32
OUTPUTS = (4096, 1024, 1024, 4096, 14336, 14336, 4096) * 32
FACTOR = 16  # LoRA's own rank
LISTS = [  # name, side, d of each factor, rank of the basis of each
    ("LoRA A k 8", "right", INPUTS, [8] * 224),
    ("LoRA B k 4", "left", OUTPUTS, [4] * 224),
    ("LoRA B k 16", "left", OUTPUTS, [16] * 224),
    ("LoRA A wide", "right", INPUTS, [1640 if d == 4096 else 5700 for d in INPUTS]),
]


def matrices() -> Iterator[tuple[str, str, int, int, int, str]]:
    """Name, side, n, d, k and dtype of each large matrix."""
    for side, shape, dtype, ranks in MATRICES:
        n, d = shape if side == "right" else shape[::-1]
        for k in ranks:
            yield f"{side} [{shape[0]}, {shape[1]}] {dtype} k {k}", side, n, d, k, dtype


def project_triton(chip: Chip) -> Iterator[Case]:
    for name, side, n, d, k, dtype in matrices():
        yield _strips(name, side, dtype, [(n, d, k)], chip)
    for name, side, ds, ks in LISTS:
        factors = [(FACTOR, d, k) for d, k in zip(ds, ks, strict=True)]
        yield _strips(f"{name}, {len(ds)} fp32", side, "fp32", factors, chip)


def _strips(
    name: str, side: str, dtype: str, sizes: Sequence[tuple[int, int, int]], chip: Chip
) -> Case:
    """Matrices of `(n, d, k)` cut into strips; a program walks along d, and back."""
    from grasp_kernels.project_triton import tiling

    size, widest = SIZES[dtype], max(k for _, _, k in sizes)
    chosen = tiling(CODES[dtype], side == "left", widest, max(n for n, _, _ in sizes))
    KP, BS, BD = (chosen[x] for x in ("KP", "BS", "BD"))
    wide = widest > KP
    strips = [(d, k) for n, d, k in sizes for _ in range(ceil(n / BS))]
    largest = max(d for d, _ in strips) * BS * size
    at_once = max(
        chip.multiprocessors, min(int(chip.l2_size / 2 / largest), 4 * chip.multiprocessors)
    )
    programs = min(len(strips), at_once)
    tensor = sum(n * d for n, d, _ in sizes) * size
    walks = sum(n * d * ceil(k / KP) for n, d, k in sizes) * size  # on the way there
    bases = [d * k * 4 for _, d, k in sizes]
    own = len(sizes) > 1  # a basis for each strip, read on the way there and back
    parts = {"part": 1, "back part": 1} if wide else {}
    items = [
        {
            "forward": ceil(d / BD),
            "back": ceil(d / BD),
            **{part: ceil(k / KP) for part in parts},
        }
        for d, k in strips
    ]
    forward, back = Named("forward", f"{MMA} LDGSTS"), Named("back", f"STG {MMA}")
    if wide:
        forward = Named("part", f"{MMA} LDGSTS", (forward,))
        back = Named("back", f"STG {MMA}", (Named("back part", MMA),))
    return Case(
        name,
        project_job(chosen, wide),
        Work(
            tensor=tensor,
            once=2 * tensor + sum(bases),
            again=walks + (sum(bases) if own else 0),
            resident=programs * sum(d * BS * size for d, _ in strips) / len(strips)
            + sum(bases) * min(1, programs / len(sizes)),
            l2=2 * tensor + (walks - tensor) + tensor + 2 * sum(d * k * 4 for d, k in strips),
            items=items,
            programs=programs,
            loop=Named("strip", f"{MMA} STG", (forward, back)),
        ),
    )


def project_job(chosen: dict, wide: bool, measured: bool = False) -> TritonJob:
    from grasp_kernels.project_triton import COLUMNS

    takes = {"places": "*i64", "table": "*i64", "strips": "*i32", "count": "i32", "room": "i32"}
    takes |= {"energies": "*fp32"} if measured else {}
    takes |= {"scratch": "*fp32"} if wide else {}
    chosen = {"COLUMNS": COLUMNS, "ALIGNED": True, **chosen}
    return TritonJob("grasp_kernels.project_triton", "project_kernel", takes, chosen)


BS, PAD, WARPS = 32, 8, 8  # of csrc/project.cuh


def project_cuda(chip: Chip) -> Iterator[Case]:
    """Those that a cluster of blocks can hold; of 16 bits alone."""
    for name, side, n, d, k, dtype in matrices():
        fits = _cluster(side, d, k, chip) if dtype != "fp32" and k <= 64 else None
        if fits is None:
            continue
        blocks, slice_, KP, shared = fits
        tensor, strips = n * d * 2, ceil(n / BS)
        threads = 32 * WARPS
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
        code = f"project_kernelI13__nv_bfloat16Lb{int(side == 'left')}ELi{KP}E"
        yield Case(
            name,
            CudaJob("project.cu", code, shared, threads),
            Work(
                tensor=tensor,
                once=2 * tensor + d * k * 4,
                again=0,
                resident=d * k * 4,
                l2=2 * tensor + d * k * 4 * (chip.multiprocessors // blocks),
                items=[item] * strips,
                programs=min(
                    strips, chip.multiprocessors * (2 if 2 * shared < chip.shared else 1) // blocks
                ),
                loop=Named("strip", "HMMA STG", inner),
                blocks=blocks,
            ),
        )


def _cluster(side: str, d: int, k: int, chip: Chip) -> tuple[int, int, int, int] | None:
    """Blocks, slice of d, KP and bytes of shared memory, as csrc/project.cu chooses them."""
    KP = next(x for x in (16, 32, 64) if k <= x)
    for limit in (chip.shared_block // 2, chip.shared_block):
        for blocks in (1, 2, 4, 8, 16) if chip.name != "A100" else (1,):
            slice_ = ceil(d / (blocks * 16)) * 16
            row, rows = (BS, slice_) if side == "left" else (slice_, BS)
            shared = slice_ * (KP + PAD) * 2 + rows * (row + PAD) * 2
            shared += WARPS // (KP // 16) * BS * KP * 4 + BS * KP * 4 + BS * (KP + PAD) * 2
            shared += (2 + WARPS) * 8
            if shared <= limit:
                return blocks, slice_, KP, shared
    return None


def orthonormalize_triton(chip: Chip) -> Iterator[Case]:
    """64 of [8192, k]: five walks along d for each column."""
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
            orthonormalize_job({"CODE": 0, **chosen}),
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


def orthonormalize_job(chosen: dict) -> TritonJob:
    from grasp_kernels.orthonormalize_triton import COLUMNS

    return TritonJob(
        "grasp_kernels.orthonormalize_triton",
        "orthonormalize_kernel",
        {"table": "*i64"},
        {"COLUMNS": COLUMNS, **chosen},
    )


FAMILIES = {
    "project_triton": project_triton,
    "project_cuda": project_cuda,
    "orthonormalize_triton": orthonormalize_triton,
}

RANKS = (16, 32, 64)
WIDE = 65  # directions, more than stay in registers


def jobs() -> list[TritonJob]:
    """Every configuration that Triton's launchers can choose, each once; fp16's are as bf16's."""
    from grasp_kernels import orthonormalize_triton, project_triton

    codes = [CODES[name] for name in ("fp32", "bf16", "mixed")]
    sides = product((False, True), (16, 64))
    found = [
        project_job(project_triton.tiling(code, left, k, widest), k == WIDE, measured=True)
        for code, (left, widest), k in product(codes, sides, (*RANKS, WIDE))
    ]
    found += [
        orthonormalize_job({"CODE": code, **orthonormalize_triton.tiling(KP)})
        for code, KP in product(codes[:2], RANKS)
    ]
    return [job for i, job in enumerate(found) if job not in found[:i]]
