"""Projection of many matrices of few rows, such as LoRA factors, in one launch.

    right   c = Σ_p X[:, p] V[p, :];      X[:, e] ← X[:, e] − (c − C) V[e, :]ᵀ
    left    c = Σ_p U[p, :]ᵀ X[p, :];     X[e, :] ← X[e, :] − U[e, :] (c − C)

A matrix of 16 rows is too little for one program and too long: it is cut along d. Each piece of
work is either a part of a sum (`_coefficients`: one block of columns of the basis, one part p of d)
or a stretch e of the result (`_take_off`), which waits until its sums are there.

    pieces  [c: g0 p0] [c: g0 p1] [c: g1 p0] ... | [off: g0 e0] [c: g9 p0] [off: g0 e1] ...
                                                 ^ `lead` pieces of sums run ahead

Programs draw pieces in this order from one counter. A piece waits only for pieces before it, which
running programs hold, so no number of programs can lock up. Whoever finishes a sum's last part adds
all parts up, in their order: the result does not depend on timing.

Matrices that share a basis, as the maps of one input do, are stacked into one group, and the basis,
which is most of what is read when k is large, is read once for all of them.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .factors_layout import Group, Layout, at_once, by_tiling
from .matrices import Row
from .tables import Kept, Table, on_device
from .triton_tools import basis_tile, product, rounded

GROUP = tl.constexpr(len(Group._fields))


@triton.jit
def _starts(
    rows, first, r, n, begin, step, DTYPE: tl.constexpr, LEFT: tl.constexpr, UNIT: tl.constexpr
):
    """Where each row of the group is at `begin` of d, or from the left side the one of all."""
    if LEFT:
        start = tl.load(rows + 2 * first).to(tl.pointer_type(DTYPE)) + begin * step
    else:
        start = tl.load(rows + 2 * (first + r), mask=r < n, other=0)
        start = start.to(tl.pointer_type(DTYPE)) + begin
    return tl.multiple_of(start, 16) if UNIT > 1 else start


@triton.jit
def _tile(row, r, at, n, d, step, LEFT: tl.constexpr):
    """Pointers to a tile of X, and which lie inside; `row` the rows' starts, or the one of all."""
    if LEFT:
        tile, inside = row + at[:, None] * step + r[None, :], (at[:, None] < d) & (r[None, :] < n)
    else:
        tile, inside = row[:, None] + at[None, :], (r[:, None] < n) & (at[None, :] < d)
    return tile, inside


@triton.jit
def _coefficients(
    group,
    rows,
    pinned,
    scratch,
    counters,
    energies,
    block,
    part,
    DTYPE: tl.constexpr,
    LEFT: tl.constexpr,
    BR: tl.constexpr,
    KB: tl.constexpr,
    BD: tl.constexpr,
    UNIT: tl.constexpr,
    VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One part of one block of columns of c, and by whoever is last the sum of all parts."""
    ONE_WARP: tl.constexpr = KB * BR == 256  # adds squares up at once, where others keep a tile
    SPLIT: tl.constexpr = DTYPE == tl.float32  # 16 bits are exact in tf32
    d, k, n = tl.load(group + 3), tl.load(group + 4), tl.load(group + 5).to(tl.int32)
    basis_d, basis_k = tl.load(group + 1), tl.load(group + 2)
    across, along = basis_d.to(tl.int32), basis_k.to(tl.int32)  # within a tile
    if VECTOR:
        basis_d, across = tl.multiple_of(basis_d, 4), tl.multiple_of(across, 4)
    first, step, length = tl.load(group + 6), tl.load(group + 7), tl.load(group + 10)
    d, n = tl.multiple_of(d, UNIT), tl.multiple_of(n, UNIT if LEFT else 1)
    step, length = tl.multiple_of(step, UNIT), tl.multiple_of(length, 16)
    parts = tl.cdiv(d, length).to(tl.int32)
    r, j, e = tl.arange(0, BR), tl.arange(0, KB), tl.arange(0, BD)
    begin = part.to(tl.int64) * length
    here, inside_k = tl.multiple_of((d - begin).to(tl.int32), UNIT), (k - block * KB).to(tl.int32)
    blocks = tl.cdiv(tl.minimum(length, d - begin), BD).to(tl.int32)
    basis = tl.load(group).to(tl.pointer_type(tl.float32)) + begin * basis_d + block * KB * basis_k
    basis = tl.multiple_of(basis, 16) if VECTOR else basis
    row = _starts(rows, first, r, n, begin, step, DTYPE, LEFT, UNIT)
    if LEFT:
        acc, square = tl.zeros((KB, BR), tl.float32), tl.zeros((BD, BR), tl.float32)
        kept = j[:, None] * BR + r[None, :]
    else:
        acc, square = tl.zeros((BR, KB), tl.float32), tl.zeros((BR, BD), tl.float32)
        kept = r[:, None] * KB + j[None, :]
    squares = tl.zeros((BR,), tl.float32)
    for i in tl.range(0, blocks, num_stages=STAGES):
        at = i * BD + e
        start = basis + i * BD * basis_d
        start = tl.multiple_of(start, 16) if VECTOR else start
        V = basis_tile(start, e, j, here - i * BD, inside_k, across, along, VECTOR)
        tile, inside = _tile(row, r, at, n, here, step, LEFT)
        X = tl.load(tile, mask=inside, other=0.0).to(tl.float32)
        if LEFT:
            acc = product(tl.trans(V), X, acc, True, SPLIT)
        else:
            acc = product(X, V, acc, SPLIT, True)
        if energies is not None:
            if ONE_WARP:
                squares += tl.sum(X * X, 0 if LEFT else 1)
            else:
                square += X * X
    energy = scratch + tl.load(group + 13)
    if energies is not None:
        if block == 0:
            squares += tl.sum(square, 0 if LEFT else 1)
            tl.store(energy + part * BR + r, squares)
    counter = counters + tl.load(group + 14)
    is_last = parts == 1
    if parts > 1:
        sums = scratch + tl.load(group + 11) + block * parts * BR * KB
        tl.store(sums + part * BR * KB + kept, acc)
        tl.debug_barrier()
        is_last = tl.atomic_add(counter + 1 + block, 1, sem="acq_rel") == parts - 1
        if is_last:
            acc = tl.zeros_like(acc)
            for p in range(0, parts):
                acc += tl.load(sums + p * BR * KB + kept, cache_modifier=".cg")
    if is_last:
        if energies is not None:
            tl.store(energy + (parts + block) * BR + r, tl.sum(acc * acc, 0 if LEFT else 1))
        C_k = tl.load(group + 9)
        C = tl.load(pinned + first + r, mask=r < n, other=0).to(tl.pointer_type(tl.float32))
        C += block * KB * C_k
        there = (C.to(tl.int64) != 0) & (r < n)
        if LEFT:
            inside = (j[:, None] < inside_k) & there[None, :]
            acc -= tl.load(C[None, :] + j[:, None] * C_k, mask=inside, other=0.0)
        else:
            inside = (j[None, :] < inside_k) & there[:, None]
            acc -= tl.load(C[:, None] + j[None, :] * C_k, mask=inside, other=0.0)
        tl.store(scratch + tl.load(group + 12) + block * BR * KB + kept, acc)
        tl.debug_barrier()
        tl.atomic_add(counter, 1, sem="release")


@triton.jit
def _add_energies(energies, energy, first, n, parts, blocks, BR: tl.constexpr):
    """To what each row had and lost so far. A row that overflows is left out."""
    r = tl.arange(0, BR)
    had, lost = tl.zeros((BR,), tl.float32), tl.zeros((BR,), tl.float32)
    for i in range(0, parts):
        had += tl.load(energy + i * BR + r, cache_modifier=".cg")
    for i in range(parts, parts + blocks):
        lost += tl.load(energy + i * BR + r, cache_modifier=".cg")
    at, finite = energies + 2 * (first + r), (r < n) & (had < float("inf"))
    tl.store(at, tl.load(at, mask=finite, other=0.0) + had, mask=finite)
    tl.store(at + 1, tl.load(at + 1, mask=finite, other=0.0) + lost, mask=finite)


@triton.jit
def _take_off(
    group,
    rows,
    scratch,
    counters,
    energies,
    part,
    DTYPE: tl.constexpr,
    LEFT: tl.constexpr,
    BR: tl.constexpr,
    KB: tl.constexpr,
    BD: tl.constexpr,
    WHOLE: tl.constexpr,
    UNIT: tl.constexpr,
    VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One stretch of the result: `length` of d, or of a wide basis `BD`."""
    d, k, n = tl.load(group + 3), tl.load(group + 4), tl.load(group + 5).to(tl.int32)
    basis_d, basis_k = tl.load(group + 1), tl.load(group + 2)
    across, along = basis_d.to(tl.int32), basis_k.to(tl.int32)  # within a tile
    if VECTOR:
        basis_d, across = tl.multiple_of(basis_d, 4), tl.multiple_of(across, 4)
    first, step, out_step = tl.load(group + 6), tl.load(group + 7), tl.load(group + 8)
    length = tl.multiple_of(tl.load(group + 10), 16)
    d, n = tl.multiple_of(d, UNIT), tl.multiple_of(n, UNIT if LEFT else 1)
    step, out_step = tl.multiple_of(step, UNIT), tl.multiple_of(out_step, UNIT)
    counter, blocks = counters + tl.load(group + 14), tl.cdiv(k, KB).to(tl.int32)
    while tl.atomic_add(counter, 0, sem="acquire") < blocks:
        pass
    if energies is not None:
        if part == 0:
            energy = scratch + tl.load(group + 13)
            parts = tl.cdiv(d, length).to(tl.int32)
            _add_energies(energies, energy, first, n, parts, blocks, BR)
    total = tl.multiple_of(scratch + tl.load(group + 12), 16)
    begin = part.to(tl.int64) * (length if WHOLE else BD)
    here = tl.multiple_of((d - begin).to(tl.int32), UNIT)
    basis = tl.load(group).to(tl.pointer_type(tl.float32)) + begin * basis_d
    basis = tl.multiple_of(basis, 16) if VECTOR else basis
    r, e = tl.arange(0, BR), tl.arange(0, BD)
    row = _starts(rows, first, r, n, begin, step, DTYPE, LEFT, UNIT)
    out = _starts(rows + 1, first, r, n, begin, out_step, DTYPE, LEFT, UNIT)
    j, k32 = tl.arange(0, KB), k.to(tl.int32)
    kept = j[:, None] * BR + r[None, :] if LEFT else r[:, None] * KB + j[None, :]
    if WHOLE:
        c = tl.load(total + kept, cache_modifier=".cg")
        for i in tl.range(0, tl.cdiv(tl.minimum(length, here), BD).to(tl.int32), num_stages=STAGES):
            at = i * BD + e
            start = basis + i * BD * basis_d
            start = tl.multiple_of(start, 16) if VECTOR else start
            V = basis_tile(start, e, j, here - i * BD, k32, across, along, VECTOR)
            tile, inside = _tile(row, r, at, n, here, step, LEFT)
            X = tl.load(tile, mask=inside, other=0.0).to(tl.float32)
            if LEFT:
                X -= product(V, c, tl.zeros_like(X), True, True)
            else:
                X -= product(c, tl.trans(V), tl.zeros_like(X), True, True)
            target, _ = _tile(out, r, at, n, here, out_step, LEFT)
            tl.store(target, rounded(X, DTYPE), mask=inside)
    else:
        tile, inside = _tile(row, r, e, n, here, step, LEFT)
        X = tl.load(tile, mask=inside, other=0.0).to(tl.float32)
        off = tl.zeros_like(X)
        for i in tl.range(0, tl.cdiv(k, KB).to(tl.int32), num_stages=STAGES):
            start = basis + i * KB * basis_k
            start = tl.multiple_of(start, 16) if VECTOR else start
            V = basis_tile(start, e, j, here, k32 - i * KB, across, along, VECTOR)
            c = tl.load(total + i * BR * KB + kept, cache_modifier=".cg")
            if LEFT:
                off = product(V, c, off, True, True)
            else:
                off = product(c, tl.trans(V), off, True, True)
        target, _ = _tile(out, r, e, n, here, out_step, LEFT)
        tl.store(target, rounded(X - off, DTYPE), mask=inside)


@triton.jit(do_not_specialize=["count"])
def factors_kernel(
    rows,
    pinned,
    groups,
    pieces,
    scratch,
    counters,
    energies,
    count,
    CODE: tl.constexpr,
    LEFT: tl.constexpr,
    BR: tl.constexpr,
    KB: tl.constexpr,
    BD: tl.constexpr,
    WHOLE: tl.constexpr,
    UNIT: tl.constexpr,
    VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Programs draw pieces until none is left.

    `rows [n, 2]` holds where each row lies and where its projection goes, `pinned [n]` where its
    coefficients are, `groups` a `Group` each, `pieces` (group, block of columns or −1, part).
    `counters` are 0 at first: the next piece, then each group's. `energies`, if given, has a pair
    for each row.
    """
    if CODE == 0:
        DTYPE: tl.constexpr = tl.float32
    elif CODE == 1:
        DTYPE: tl.constexpr = tl.bfloat16
    else:
        DTYPE: tl.constexpr = tl.float16
    piece = tl.atomic_add(counters, 1, sem="relaxed")
    while piece < count:
        group = groups + tl.load(pieces + 3 * piece).to(tl.int64) * GROUP
        block, part = tl.load(pieces + 3 * piece + 1), tl.load(pieces + 3 * piece + 2)
        if block >= 0:
            _coefficients(
                group, rows, pinned, scratch, counters, energies, block, part,
                DTYPE, LEFT, BR, KB, BD, UNIT, VECTOR, STAGES,
            )  # fmt: skip
        else:
            _take_off(
                group, rows, scratch, counters, energies, part,
                DTYPE, LEFT, BR, KB, BD, WHOLE, UNIT, VECTOR, STAGES,
            )  # fmt: skip
        piece = tl.atomic_add(counters, 1, sem="relaxed")


class Launch:
    """Matrices of one device, dtype and side, with tiles that suit all, laid out for the kernel."""

    def __init__(self, rows: Sequence[Row], device: torch.device, options: dict):
        self.device, self.options = device, options
        resident = _resident(device, options)
        laid = Layout(rows, options, resident)
        self.owners, self.count = laid.owners, len(laid.owners)
        self.pieces, self.sizes = len(laid.pieces), (laid.scratch, laid.counters)
        self.grid = (min(self.pieces, resident),)
        self.pinned = Table(laid.pinned, torch.int64, device)
        self.groups = Table(laid.groups, torch.int64, device)
        self.order = Table(laid.pieces, torch.int32, device)
        self._owner_of, self._within = torch.tensor(laid.owners), torch.tensor(laid.within)
        self.places = Kept(self._places)

    def _places(self, pointers: tuple[int, ...]) -> tuple[Table, bool]:
        """Of each row where it lies and where its projection goes; whether all are aligned."""
        starts = torch.tensor(pointers, dtype=torch.int64).reshape(-1, 2)
        aligned = all(p % 16 == 0 for p in pointers)
        return Table(starts[self._owner_of] + self._within, torch.int64, self.device), aligned

    def run(self, places: tuple[Table, bool], energies: Tensor | None = None) -> None:
        """Project all where they lie.

        Args:
            places: from `places(pointers)`, of each matrix its own address and its projection's.
            energies: `[rows, 2]` fp32, to which each row's ‖x‖² and what of it lay in the basis
                are added.
        """
        where, aligned = places
        options = {k: v for k, v in self.options.items() if k != "LENGTH"}
        options["UNIT"] = options["UNIT"] if aligned else 1
        # Made for each run: another stream may run the same launch.
        scratch = torch.empty(self.sizes[0], device=self.device)
        counters = torch.zeros(self.sizes[1], dtype=torch.int32, device=self.device)
        tables = [t.here() for t in (where, self.pinned, self.groups, self.order)]
        with on_device(self.device):
            factors_kernel[self.grid](*tables, scratch, counters, energies, self.pieces, **options)


def launches(rows: Sequence[Row], device: torch.device) -> list[tuple[Launch, list[int]]]:
    """One for each dtype, side and tiling, and which of the rows are in it."""
    return [
        (Launch([rows[i] for i in these], device, options), these)
        for options, these in by_tiling(rows)
    ]


def _resident(device: torch.device, options: dict) -> int:
    """Programs at a time."""
    if device.type != "cuda":
        return 2
    return at_once(options) * torch.cuda.get_device_properties(device).multi_processor_count
