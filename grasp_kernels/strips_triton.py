"""Projection of matrices of many rows: one read of `T` from memory and one write.

    right   strip [BS, d]   c = Σ_e X[:, e] V[e, :];   X ← X − (c − C) Vᵀ
    left    strip [d, BS]   c = Σ_e U[e, :]ᵀ X[e, :];  X ← X − U (c − C)

A program owns a strip. It walks along d to find the strip's coefficients, which stay in registers,
then back, so that what it read last, still in cache, is written first. Only as many programs run at
a time as leave their strips in the second-level cache, so the second read does not go to memory.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .matrices import CODES, Row, unit
from .tables import Kept, Table, on_device
from .triton_tools import basis_tile, nearest_tf32, product, rounded

COLUMNS = len(Row._fields)
WIDEST = 64  # directions whose coefficients stay in registers


@triton.jit
def _add_energy(energy, total, removed):
    """To what a strip had and lost so far; one program owns it. An overflow is left out."""
    finite = total < float("inf")
    tl.store(energy, tl.load(energy) + tl.where(finite, total, 0.0))
    tl.store(energy + 1, tl.load(energy + 1) + tl.where(finite, removed, 0.0))


@triton.jit
def _strip(
    place,
    row,
    index,
    energy,
    DTYPE: tl.constexpr,
    LEFT: tl.constexpr,
    KP: tl.constexpr,
    BS: tl.constexpr,
    BD: tl.constexpr,
    UNIT: tl.constexpr,
    VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
):
    ACROSS: tl.constexpr = BD if LEFT else BS
    ALONG: tl.constexpr = BS // 4 if LEFT else BD // 4
    # A 16-bit T is exact in tf32, and of many rows what tf32 drops of the basis is far below T's
    # own rounding: one product in place of two or three.
    SPLIT: tl.constexpr = DTYPE == tl.float32
    T = tl.load(place).to(tl.pointer_type(DTYPE))
    out = tl.load(place + 1).to(tl.pointer_type(DTYPE))
    basis = tl.load(row).to(tl.pointer_type(tl.float32))
    C = tl.load(row + 1)
    n, d, k = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    step, out_step = tl.load(row + 5), tl.load(row + 6)  # elements between rows of T
    basis_d, basis_k = tl.load(row + 7), tl.load(row + 8)
    C_n, C_k = tl.load(row + 9), tl.load(row + 10)
    if UNIT > 1:
        T, out = tl.multiple_of(T, 16), tl.multiple_of(out, 16)
        step, out_step = tl.multiple_of(step, UNIT), tl.multiple_of(out_step, UNIT)
        n, d = tl.multiple_of(n, UNIT), tl.multiple_of(d, UNIT)
    r, j, e = tl.arange(0, BS), tl.arange(0, KP), tl.arange(0, BD)
    # Offsets inside a tile fit 32 bits; where a strip and a block begin may need 64.
    first = index.to(tl.int64) * BS
    inside_n, ours = r < n - first, j < k
    step32, out_step32 = step.to(tl.int32), out_step.to(tl.int32)
    across, along, k32 = basis_d.to(tl.int32), basis_k.to(tl.int32), k.to(tl.int32)
    if VECTOR:
        basis, basis_d = tl.multiple_of(basis, 16), tl.multiple_of(basis_d, 4)
        across = tl.multiple_of(across, 4)
    if LEFT:
        T, out = T + first, out + first
        tile, out_tile = e[:, None] * step32 + r[None, :], e[:, None] * out_step32 + r[None, :]
        stride, out_stride = step * BD, out_step * BD
        c = tl.zeros((KP, BS), tl.float32)
    else:
        T, out = T + first * step, out + first * out_step
        tile, out_tile = r[:, None] * step32 + e[None, :], r[:, None] * out_step32 + e[None, :]
        stride, out_stride = tl.full((), BD, tl.int64), tl.full((), BD, tl.int64)
        c = tl.zeros((BS, KP), tl.float32)
    squares = tl.zeros((ACROSS, ALONG), tl.float32)
    blocks = tl.cdiv(d, BD)
    for block in tl.range(0, blocks, num_stages=STAGES):
        inside_d = e < d - block * BD
        here, start = (d - block * BD).to(tl.int32), basis + block * BD * basis_d
        V = basis_tile(start, e, j, here, k32, across, along, VECTOR)
        V = V if SPLIT else nearest_tf32(V)
        if LEFT:
            inside = inside_d[:, None] & inside_n[None, :]
            X = tl.load(T + block * stride + tile, mask=inside, other=0.0).to(tl.float32)
            c = product(tl.trans(V), X, c, SPLIT, SPLIT)
        else:
            inside = inside_n[:, None] & inside_d[None, :]
            X = tl.load(T + block * stride + tile, mask=inside, other=0.0).to(tl.float32)
            c = product(X, V, c, SPLIT, SPLIT)
        if energy is not None:
            # Fours of one thread are added at once: fewer registers.
            squares += tl.sum(tl.reshape(X * X, (ACROSS, ALONG, 4)), 2)
    if energy is not None:
        _add_energy(energy, tl.sum(squares), tl.sum(c * c))
    if C != 0:
        pinned = C.to(tl.pointer_type(tl.float32)) + first * C_n
        if LEFT:
            inside = ours[:, None] & inside_n[None, :]
            c -= tl.load(pinned + r[None, :] * C_n + j[:, None] * C_k, mask=inside, other=0.0)
        else:
            inside = inside_n[:, None] & ours[None, :]
            c -= tl.load(pinned + r[:, None] * C_n + j[None, :] * C_k, mask=inside, other=0.0)
    c = c if SPLIT else nearest_tf32(c)
    for done in tl.range(0, blocks, num_stages=STAGES):
        block = blocks - 1 - done
        inside_d = e < d - block * BD
        here, start = (d - block * BD).to(tl.int32), basis + block * BD * basis_d
        V = basis_tile(start, e, j, here, k32, across, along, VECTOR)
        V = V if SPLIT else nearest_tf32(V)
        if LEFT:
            inside = inside_d[:, None] & inside_n[None, :]
        else:
            inside = inside_n[:, None] & inside_d[None, :]
        X = tl.load(T + block * stride + tile, mask=inside, other=0.0).to(tl.float32)
        if LEFT:
            X -= product(V, c, tl.zeros_like(X), SPLIT, SPLIT)
        else:
            X -= product(c, tl.trans(V), tl.zeros_like(X), SPLIT, SPLIT)
        target = out + block * out_stride + out_tile
        tl.store(target, rounded(X, DTYPE), mask=inside)


@triton.jit(do_not_specialize=["count"])
def strips_kernel(
    places,
    table,
    strips,
    energies,
    count,
    COLUMNS: tl.constexpr,
    CODE: tl.constexpr,
    LEFT: tl.constexpr,
    KP: tl.constexpr,
    BS: tl.constexpr,
    BD: tl.constexpr,
    UNIT: tl.constexpr,
    VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Each program takes every so-many-th strip.

    `strips` holds (matrix, strip of it) pairs, `places` where each matrix lies and where its
    projection goes, `table` a `Row` for each; `energies`, if given, has a pair for each strip.
    """
    if CODE == 0:
        DTYPE: tl.constexpr = tl.float32
    elif CODE == 1:
        DTYPE: tl.constexpr = tl.bfloat16
    else:
        DTYPE: tl.constexpr = tl.float16
    for strip in range(tl.program_id(0), count, tl.num_programs(0)):
        matrix = tl.load(strips + 2 * strip)
        index = tl.load(strips + 2 * strip + 1)
        place, row = places + 2 * matrix, table + matrix * COLUMNS
        energy = energies
        if energies is not None:
            energy = energies + 2 * strip
        _strip(place, row, index, energy, DTYPE, LEFT, KP, BS, BD, UNIT, VECTOR, STAGES)


class Launch:
    """Matrices of one device, dtype and side, laid out for the kernel."""

    def __init__(self, rows: Sequence[Row], device: torch.device, options: dict):
        self.device, self.options = device, options
        BS = options["BS"]
        pairs = [(i, s) for i, row in enumerate(rows) for s in range(-(-row.n // BS))]
        self.count = len(pairs)
        self.owners = [i for i, _ in pairs]
        """The matrix that each strip is of."""
        self.table = Table(rows, torch.int64, device)
        self.strips = Table(pairs, torch.int32, device)
        size = 4 if options["CODE"] == CODES[torch.float32] else 2
        strip = max(row.d for row in rows) * BS * size
        self.grid = (min(self.count, _resident(device, strip)),)
        self.places = Kept(self._places)

    def _places(self, pointers: tuple[int, ...]) -> tuple[Table, bool]:
        """Of each matrix where it lies and where its projection goes; whether all are aligned."""
        aligned = all(p % 16 == 0 for p in pointers)
        return Table(pointers, torch.int64, self.device), aligned

    def run(self, places: tuple[Table, bool], energies: Tensor | None = None) -> None:
        """Project all where they lie.

        Args:
            places: from `places(pointers)`, of each matrix its own address and its projection's.
            energies: `[strips, 2]` fp32, to which each strip's ‖T‖² and what of it lay in the basis
                are added.
        """
        where, aligned = places
        options = self.options if aligned else {**self.options, "UNIT": 1}
        tables = [t.here() for t in (where, self.table, self.strips)]
        with on_device(self.device):
            strips_kernel[self.grid](*tables, energies, self.count, COLUMNS, **options)


def launches(rows: Sequence[Row], device: torch.device) -> list[tuple[Launch, list[int]]]:
    """One for each dtype, side and tiling, and which of the rows are in it."""
    chosen: dict[tuple, list[int]] = {}
    for i, row in enumerate(rows):
        options = {**tiling(row.code, bool(row.left), row.k), "UNIT": unit(row)}
        options["VECTOR"] = bool(row.vector)
        chosen.setdefault(tuple(options.items()), []).append(i)
    return [
        (Launch([rows[i] for i in these], device, dict(options)), these)
        for options, these in chosen.items()
    ]


def tiling(code: int, left: bool, k: int) -> dict:
    """The kernel's constants and warps: without spilled registers on any architecture.

    A strip is 128 bytes across and reads the basis twice: a narrower one would read more of the
    basis than of `T`.
    """
    exact = code == CODES[torch.float32]
    KP = max(16, triton.next_power_of_2(k))
    BD = 32 if exact and KP == 32 else 64
    sizes = {"KP": KP, "BS": 32 if exact else 64, "BD": BD, "STAGES": 4 if KP < 64 else 3}
    if exact and left and KP == 64:
        sizes |= {"BS": 16}
    # All the registers there are: left to itself the assembler spills some to run more programs.
    return {"CODE": code, "LEFT": left, **sizes, "num_warps": 8, "maxnreg": 255}


def _resident(device: torch.device, strip: int) -> int:
    """Programs at a time: strips of `strip` bytes that leave half of the second-level cache."""
    if device.type != "cuda":
        return 4
    about = torch.cuda.get_device_properties(device)
    fits = about.L2_cache_size // 2 // strip
    return max(about.multi_processor_count, min(fits, 4 * about.multi_processor_count))
