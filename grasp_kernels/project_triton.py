"""Projection in Triton: one launch for a list, one read of `T` from memory and one write.

    right   strip [BS, d]   c = Σ_e X[:, e] V[e, :];   X ← X − (c − C) Vᵀ
    left    strip [d, BS]   c = Σ_e U[e, :]ᵀ X[e, :];  X ← X − U (c − C)

A program owns a strip. It walks along d to find the strip's coefficients, then back, so that what
it read last, still in cache, is written first. Only as many programs run at a time as leave their
strips in the second-level cache, so the second read does not go to memory. Coefficients of up to 64
directions stay in registers. Of wider bases it finds 32 after 32, each with a walk of its own, and
lays them down in a place that is the program's: `T` is rounded once whatever the rank.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .matrices import CODES, Row, listed

MIXED = 3
COLUMNS = len(Row._fields)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
WIDEST = 64  # directions whose coefficients stay in registers
KEPT = 256  # lists, and of each the places where its matrices lay


def refusal(T: Tensor, basis: Tensor) -> str | None:
    """Why these can't be projected here, or None: any shape and any k can."""
    return None


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """To the stored dtype, to nearest even: the interpreter's own cast to bf16 truncates."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + ((bits >> 16) & 1) + 0x7FFF) >> 16
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


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
    scratch,
    DTYPE: tl.constexpr,
    LEFT: tl.constexpr,
    KP: tl.constexpr,
    BS: tl.constexpr,
    BD: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    T = tl.load(place).to(tl.pointer_type(DTYPE))
    out = tl.load(place + 1).to(tl.pointer_type(DTYPE))
    basis = tl.load(row).to(tl.pointer_type(tl.float32))
    C = tl.load(row + 1)
    n, d, k = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    step, out_step = tl.load(row + 5), tl.load(row + 6)  # elements between rows of T
    basis_d, basis_k = tl.load(row + 7), tl.load(row + 8)
    C_n, C_k = tl.load(row + 9), tl.load(row + 10)
    if ALIGNED:
        T, out = tl.multiple_of(T, 16), tl.multiple_of(out, 16)
        step, out_step = tl.multiple_of(step, 16), tl.multiple_of(out_step, 16)
        n, d = tl.multiple_of(n, 16), tl.multiple_of(d, 16)
    # A 16-bit T is exact in tf32, and what tf32 drops of the basis is below T's own rounding. Three
    # products of halves are as good as fp32.
    PRECISION: tl.constexpr = "tf32x3" if DTYPE == tl.float32 else "tf32"
    r = tl.arange(0, BS)
    j = tl.arange(0, KP)
    e = tl.arange(0, BD)
    # Offsets inside a tile fit 32 bits; where a strip and a block begin may need 64.
    first = index.to(tl.int64) * BS
    inside_n = r < n - first
    step32, out_step32 = step.to(tl.int32), out_step.to(tl.int32)
    V_tile = e[:, None] * basis_d.to(tl.int32) + j[None, :] * basis_k.to(tl.int32)
    parts = 1
    if scratch is not None:
        parts = tl.cdiv(k, KP)
    if LEFT:
        T, out = T + first, out + first
        tile, out_tile = e[:, None] * step32 + r[None, :], e[:, None] * out_step32 + r[None, :]
        stride, out_stride = step * BD, out_step * BD
        c, c_tile = tl.zeros((KP, BS), tl.float32), j[:, None] * BS + r[None, :]
        squares = tl.zeros((BD, BS), tl.float32)
    else:
        T, out = T + first * step, out + first * out_step
        tile, out_tile = r[:, None] * step32 + e[None, :], r[:, None] * out_step32 + e[None, :]
        stride, out_stride = tl.full((), BD, tl.int64), tl.full((), BD, tl.int64)
        c, c_tile = tl.zeros((BS, KP), tl.float32), r[:, None] * KP + j[None, :]
        squares = tl.zeros((BS, BD), tl.float32)
    blocks = tl.cdiv(d, BD)
    removed = tl.zeros((), tl.float32)
    for part in range(0, parts):
        ours = j < k - part * KP
        V_part = basis + part * KP * basis_k
        c = tl.zeros_like(c)
        for block in range(0, blocks):
            inside_d = e < d - block * BD
            V = tl.load(
                V_part + block * BD * basis_d + V_tile,
                mask=inside_d[:, None] & ours[None, :],
                other=0.0,
            )
            if LEFT:
                inside = inside_d[:, None] & inside_n[None, :]
                X = tl.load(T + block * stride + tile, mask=inside, other=0.0).to(tl.float32)
                c = tl.dot(tl.trans(V), X, c, input_precision=PRECISION)
            else:
                inside = inside_n[:, None] & inside_d[None, :]
                X = tl.load(T + block * stride + tile, mask=inside, other=0.0).to(tl.float32)
                c = tl.dot(X, V, c, input_precision=PRECISION)
            if energy is not None:
                squares += tl.where(part == 0, X * X, 0.0)
        if energy is not None:
            removed += tl.sum(c * c)
        if C != 0:
            pinned = C.to(tl.pointer_type(tl.float32)) + first * C_n + part * KP * C_k
            if LEFT:
                inside = ours[:, None] & inside_n[None, :]
                c -= tl.load(pinned + r[None, :] * C_n + j[:, None] * C_k, mask=inside, other=0.0)
            else:
                inside = inside_n[:, None] & ours[None, :]
                c -= tl.load(pinned + r[:, None] * C_n + j[None, :] * C_k, mask=inside, other=0.0)
        if scratch is not None:
            tl.store(scratch + part * KP * BS + c_tile, c)
    if energy is not None:
        _add_energy(energy, tl.sum(squares), removed)
    if scratch is not None:
        tl.debug_barrier()  # other threads of the program read what these have written
    for done in range(0, blocks):
        block = blocks - 1 - done
        inside_d = e < d - block * BD
        if LEFT:
            inside = inside_d[:, None] & inside_n[None, :]
        else:
            inside = inside_n[:, None] & inside_d[None, :]
        X = tl.load(T + block * stride + tile, mask=inside, other=0.0).to(tl.float32)
        for part in range(0, parts):
            V = tl.load(
                basis + part * KP * basis_k + block * BD * basis_d + V_tile,
                mask=inside_d[:, None] & (j[None, :] < k - part * KP),
                other=0.0,
            )
            if scratch is not None:
                c = tl.load(scratch + part * KP * BS + c_tile)
            if LEFT:
                X -= tl.dot(V, c, input_precision=PRECISION)
            else:
                X -= tl.dot(c, tl.trans(V), input_precision=PRECISION)
        target = out + block * out_stride + out_tile
        tl.store(target, rounded(X, DTYPE), mask=inside)
    if scratch is not None:
        tl.debug_barrier()  # before the next strip's coefficients take the place of these


@triton.jit
def project_kernel(
    places,
    table,
    strips,
    energies,
    scratch,
    count,
    room,
    COLUMNS: tl.constexpr,
    CODE: tl.constexpr,
    LEFT: tl.constexpr,
    KP: tl.constexpr,
    BS: tl.constexpr,
    BD: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Each program takes every so-many-th strip.

    `strips` holds (matrix, strip of it) pairs, `places` where each matrix lies and where its
    projection goes, `table` a `Row` for each; `energies`, if given, has a pair for each strip, and
    `scratch`, for bases of more than `KP` directions, `room` elements for each program.
    """
    if scratch is not None:
        scratch += tl.program_id(0) * room
    for strip in range(tl.program_id(0), count, tl.num_programs(0)):
        matrix = tl.load(strips + 2 * strip)
        index = tl.load(strips + 2 * strip + 1)
        place, row = places + 2 * matrix, table + matrix * COLUMNS
        energy = energies
        if energies is not None:
            energy = energies + 2 * strip
        if CODE == 0:
            _strip(place, row, index, energy, scratch, tl.float32, LEFT, KP, BS, BD, ALIGNED)
        elif CODE == 1:
            _strip(place, row, index, energy, scratch, tl.bfloat16, LEFT, KP, BS, BD, ALIGNED)
        elif CODE == 2:
            _strip(place, row, index, energy, scratch, tl.float16, LEFT, KP, BS, BD, ALIGNED)
        else:
            code = tl.load(row + 11)
            if code == 0:
                _strip(place, row, index, energy, scratch, tl.float32, LEFT, KP, BS, BD, ALIGNED)
            elif code == 1:
                _strip(place, row, index, energy, scratch, tl.bfloat16, LEFT, KP, BS, BD, ALIGNED)
            else:
                _strip(place, row, index, energy, scratch, tl.float16, LEFT, KP, BS, BD, ALIGNED)


def project_triton(
    Ts: list[Tensor], outs: list[Tensor], bases: list[Tensor], Cs: list[Tensor], left: bool
) -> None:
    """Each of `Ts` projected into its place in `outs`, which may be the tensor itself.

    One launch for each device and orientation in the list; arguments as `project_` has checked.
    """
    staged: list[tuple[Tensor, Tensor]] = []
    for device, found in listed(Ts, outs, bases, Cs, left, staged, packed=False).items():
        for launch, chosen in _kept_launches(tuple(found.rows), device):
            pointers = tuple(p for i in chosen for p in found.pointers[2 * i : 2 * i + 2])
            launch.run(launch.places(pointers))
    for kept, out in staged:
        out.copy_(kept)


def launches(rows: Sequence[Row], device: torch.device) -> list[tuple["Launch", list[int]]]:
    """One for each orientation, and which of the rows are in it."""
    sides = [[i for i, row in enumerate(rows) if row.left == left] for left in (0, 1)]
    return [(Launch([rows[i] for i in chosen], device), chosen) for chosen in sides if chosen]


_kept_launches = lru_cache(KEPT)(launches)


class Launch:
    """Matrices of one device and orientation, laid out for the kernel."""

    def __init__(self, rows: Sequence[Row], device: torch.device):
        self.device = device
        widest_k = max(row.k for row in rows)
        codes = {row.code for row in rows}
        code = codes.pop() if len(codes) == 1 else MIXED
        self.options = tiling(code, bool(rows[0].left), widest_k, max(row.n for row in rows))
        KP, BS = self.options["KP"], self.options["BS"]
        pairs = [(i, s) for i, row in enumerate(rows) for s in range(-(-row.n // BS))]
        self.count = len(pairs)
        self.owners = [i for i, _ in pairs]
        """The matrix that each strip is of."""
        self.table = to_device(torch.tensor(rows, dtype=torch.int64), device)
        self.strips = to_device(torch.tensor(pairs, dtype=torch.int32), device)
        # 16 elements of the smaller dtypes are 32 bytes, so whole vectors lie inside or outside.
        self.even = all(v % 16 == 0 for r in rows for v in (r.n, r.d, r.step, r.out_step))
        size = 4 if code in (CODES[torch.float32], MIXED) else 2
        strip = max(row.d for row in rows) * BS * size
        self.grid = (min(self.count, _resident(device, strip)),)
        self.room = 0 if widest_k <= KP else triton.cdiv(widest_k, KP) * KP * BS
        self.places = lru_cache(KEPT)(self._places)

    def _places(self, pointers: tuple[int, ...]) -> tuple[Tensor, bool]:
        """On the device, and whether all are aligned; kept: a list that stays costs no copy."""
        aligned = self.even and all(p % 16 == 0 for p in pointers)
        return to_device(torch.tensor(pointers, dtype=torch.int64), self.device), aligned

    def run(self, places: tuple[Tensor, bool], energies: Tensor | None = None) -> None:
        """Project all where they lie.

        Args:
            places: from `places(pointers)`, of each matrix its own address and its projection's.
            energies: `[strips, 2]` fp32, to which each strip's ‖T‖² and what of it lay in the basis
                are added.
        """
        where, aligned = places
        scratch = None
        if self.room:
            scratch = torch.empty(self.grid[0] * self.room, device=self.device)
        with on_device(self.device):
            project_kernel[self.grid](
                where,
                self.table,
                self.strips,
                energies,
                scratch,
                self.count,
                self.room,
                COLUMNS,
                **self.options,
                ALIGNED=aligned,
            )


def tiling(code: int, left: bool, k: int, widest: int) -> dict:
    """The kernel's constants and warps: without spilled registers on any architecture.

    A strip is 64 bytes across, two sectors of memory, and reads the basis twice: a narrower one
    would read more of the basis than of `T`. A LoRA factor is no wider than its rank.
    """
    half = code in (CODES[torch.bfloat16], CODES[torch.float16])
    BS = 32 if half and widest > 16 else 16
    KP = max(16, triton.next_power_of_2(k)) if k <= WIDEST else 32
    deep = {MIXED: 0, CODES[torch.float32]: 16 if left else 32}.get(code, 32)  # largest such rank
    BD = 64 if k <= deep else 32
    sizes = {"KP": KP, "BS": BS, "BD": BD}
    # All the registers there are: left to itself the assembler spills some to run more programs.
    return {"CODE": code, "LEFT": left, **sizes, "num_warps": 4, "maxnreg": 255}


def _resident(device: torch.device, strip: int) -> int:
    """Programs at a time: strips of `strip` bytes that leave half of the second-level cache."""
    if device.type != "cuda":
        return 4
    about = torch.cuda.get_device_properties(device)
    fits = about.L2_cache_size // 2 // strip
    return max(about.multi_processor_count, min(fits, 4 * about.multi_processor_count))


def on_device(device: torch.device):
    """Triton launches on the current device, whichever holds the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A copy that may be captured in a graph: from pinned memory, which stays while it is used."""
    if device.type != "cuda":
        return host
    pinned = host.pin_memory()
    moved = pinned.to(device, non_blocking=True)
    moved._host = pinned
    return moved
