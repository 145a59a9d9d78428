"""Projection of large matrices by the CUDA library: `csrc/project.cuh`, a launch for each."""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import hardware
from .matrices import CODES, Row, listed

LARGE = 2**20  # elements from which a matrix keeps a GPU busy by itself
LARGEST_K = 64
LARGEST_CLUSTER = 8
WARPS, MOST_STAGES, GAP = 8, 8, 8  # as in csrc/project.cuh


class Plan(NamedTuple):
    """How the kernel cuts a matrix, as `Plan` in `csrc/project.cuh`."""

    kp: int
    slice: int
    strip: int
    blocks: int
    width: int
    stages: int
    bytes: int


def plan(size: int, d: int, k: int, room: int) -> Plan | None:
    """For elements of `size` bytes and `room` bytes of shared memory a block; None: no room."""
    slice = next((s for s in (512, 1024, 2048) if d <= LARGEST_CLUSTER * s), None)
    if slice is None or k > LARGEST_K:
        return None
    short = size == 2 and slice == 512
    for strip, most in ((32, 227), (16, 99)) if short else ((16, 227),):
        if found := _with_strip(size, d, k, room, slice, strip, most << 10):
            return found
    return None


def _with_strip(
    size: int, d: int, k: int, room: int, slice: int, strip: int, most: int
) -> Plan | None:
    kp = 16 if k <= 16 else 32 if k <= 32 else 64
    depth = WARPS if kp == 16 else WARPS // 2
    basis, parts = slice * kp * size, depth * strip * (kp + GAP) * 4
    inbox, total = 2 * strip * kp * 4, 2 * strip * kp * size
    scales = 2 * strip * 4 if size == 2 else 0
    fixed = basis + parts + inbox + total + scales + (2 * MOST_STAGES + 4) * 8 + 128
    stage = strip * (slice * size + 16)
    stages = min((room - fixed) // stage, MOST_STAGES)
    if stages < 2 or fixed + 2 * stage > most:
        return None
    blocks = 1
    while blocks * slice < d:
        blocks *= 2
    width = -(-d // (blocks * 32)) * 32
    return Plan(kp, slice, strip, blocks, width, stages, fixed + stages * stage)


@cache
def _room(device: torch.device) -> int:
    """Bytes of shared memory that a block may have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def refusal(T: Tensor, basis: Tensor) -> str | None:
    """Why these can't be projected here, or None.

    It refuses what the library has no kernel for, and small matrices, which one launch of
    Triton's takes together.
    """
    d, k = basis.shape
    if T.dtype not in CODES:
        return f"takes fp32, bf16 and fp16, got {T.dtype}"
    if k > LARGEST_K:
        return f"k = {k} is above {LARGEST_K}"
    if T.ndim != 2 or T.numel() < LARGE:
        return f"{list(T.shape)} is no matrix of {LARGE} elements or more"
    if d % 32:
        return f"d = {d} is no multiple of 32"
    inner = next((i for i in (1, 0) if T.stride(i) == 1), None)
    size = T.element_size()
    lengths = () if inner is None else (T.shape[inner], T.stride(1 - inner), T.storage_offset())
    if inner is None or any(length * size % 16 for length in lengths):
        return f"rows of {list(T.shape)} with strides {list(T.stride())} are not 16-byte aligned"
    major, minor = hardware(T.device).capability
    if major < 9:
        return f"needs compute capability 9.0, got {major}.{minor}"
    room = _room(T.device)
    if plan(size, d, k, room) is None:
        return f"d = {d}, k = {k} in {T.dtype} does not fit {room >> 10} KB of shared memory"
    return None


def project_cuda(
    Ts: list[Tensor], outs: list[Tensor], bases: list[Tensor], Cs: list[Tensor], left: bool
) -> None:
    """Each of `Ts` projected into its place in `outs`, which may be the tensor itself.

    A launch for each; arguments as `project_` has checked and `refusal` has let pass.
    """
    staged: list[tuple[Tensor, Tensor]] = []
    for device, found in listed(Ts, outs, bases, Cs, left, staged).items():
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
        room = _room(device)
        sizes = {code: dtype.itemsize for dtype, code in CODES.items()}
        plans = [plan(sizes[row.code], row.d, row.k, room) for row in rows]
        strips = [-(-row.n // p.strip) for row, p in zip(rows, plans, strict=True) if p]
        self.count = sum(strips)
        self.owners = [i for i, count in enumerate(strips) for _ in range(count)]
        """The matrix that each strip is of."""
        self.table = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), len(Row._fields))

    def places(self, pointers: tuple[int, ...]) -> Tensor:
        """The table with the addresses of each matrix and its projection before its row."""
        return torch.cat([torch.tensor(pointers).reshape(-1, 2), self.table], 1)

    def run(self, places: Tensor, energies: Tensor | None = None) -> None:
        """Project all where they lie; `energies [count, 2]` as `project_triton.Launch.run`."""
        address = 0 if energies is None else energies.data_ptr()
        torch.ops.grasp_native.project_all(places, self.device.index, address)
