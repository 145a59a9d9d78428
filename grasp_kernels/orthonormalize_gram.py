"""The kernels of orthonormalisation by Gram matrix and Cholesky factor, in fp64, split over d.

    G = Wᵀ W;   L⁻¹ G L⁻ᵀ = diag(s) with unit columns of W;   X = L⁻ᵀ diag(s)^-½;   W ← W X

The pivot s_j is what the earlier columns leave of ‖w_j‖² = 1, the definition's own measure, known
to NOISE · (1 + ‖c‖²) where c says how w_j is made of the earlier columns: row j of L⁻¹. That bound
decides. A column for which `rtol` lies inside it is put off: what the earlier ones leave of it is
made as large as they are, and no later one is freed of it. Where there was such a column, or W X is
orthonormal only roughly, the same is done to W X, with a limit for each column in place of `rtol`.
What is still open then goes to `orthonormalize_columns`. Nothing is decided on the host.
"""

import triton
import triton.language as tl

from .orthonormalize_columns import OPEN
from .triton_tools import rounded

COLUMNS = 7  # of a row of the table
DONE = tl.constexpr(0)  # a matrix's state, or OPEN
AGAIN = tl.constexpr(1)
NOISE = tl.constexpr(16 * 2.0**-52)  # five times what it was in any of 60 hard cases
# Column j of X is orthonormal to the others to within NOISE · (1 + ‖c‖²) / s_j.
ROUGH = tl.constexpr(0.125)


@triton.jit
def _read(row, rows, columns, DTYPE: tl.constexpr, LAYOUT: tl.constexpr, wanted):
    """A tile of W in fp64; 0 beyond its edges."""
    W = tl.load(row).to(tl.pointer_type(DTYPE))
    step, unit = tl.load(row + 1), tl.load(row + 2)
    d, k = tl.load(row + 4), tl.load(row + 5)
    if LAYOUT == 0:  # rows contiguous, in whole vectors
        W, step, k = tl.multiple_of(W, 16), tl.multiple_of(step, 8), tl.multiple_of(k, 8)
        places = W + rows[:, None].to(tl.int64) * step + columns[None, :]
    elif LAYOUT == 1:  # columns contiguous
        W, unit, d = tl.multiple_of(W, 16), tl.multiple_of(unit, 8), tl.multiple_of(d, 8)
        places = W + rows[:, None] + columns[None, :].to(tl.int64) * unit
    else:
        places = W + rows[:, None].to(tl.int64) * step + columns[None, :].to(tl.int64) * unit
    inside = (rows[:, None] < d) & (columns[None, :] < k) & wanted
    x = tl.load(places, mask=inside, other=0.0).to(tl.float32).to(tl.float64)
    if DTYPE != tl.float32:
        # Nothing but a new layout: Triton 3.6 fails on a product of what 16 bits were widened to.
        x = tl.sum(x[:, :, None], 2)
    return x


@triton.jit(do_not_specialize=["parts"])
def gram_kernel(
    table,
    states,
    partials,
    parts,
    SECOND: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCKS: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    PART: tl.constexpr,
):
    """A block of a part's share of G: `partials [matrix, part, BLOCKS·BK, BLOCKS·BK]`."""
    index = tl.program_id(0)
    a, b = index % BLOCKS, index // BLOCKS % BLOCKS
    part = index // (BLOCKS * BLOCKS) % parts
    matrix = index // (BLOCKS * BLOCKS) // parts
    wanted = a <= b
    if SECOND:
        wanted = wanted & (tl.load(states + matrix) == AGAIN)
    if wanted:
        row = table + matrix * COLUMNS
        d = tl.load(row + 4)
        e, j = tl.arange(0, BD), tl.arange(0, BK)
        G = tl.zeros((BK, BK), tl.float64)
        last = tl.minimum(d, (part + 1) * PART)
        for first in range(part * PART, last, BD):
            x = _read(row, first + e, a * BK + j, DTYPE, LAYOUT, True)
            y = x
            if BLOCKS > 1:
                y = _read(row, first + e, b * BK + j, DTYPE, LAYOUT, a < b)
                y = tl.where(a == b, x, y)
            G = tl.dot(tl.trans(x), y, G, out_dtype=tl.float64)
        K: tl.constexpr = BLOCKS * BK
        G_out = partials + (matrix.to(tl.int64) * parts + part) * (K * K)
        tl.store(G_out + (a * BK + j)[:, None] * K + (b * BK + j)[None, :], G)


@triton.jit
def _sum_of_parts(G, parts, i, j, BK: tl.constexpr, K: tl.constexpr):
    """G at the rows i and columns j, added up in one order; blocks below the diagonal mirror."""
    swapped = i // BK > j // BK
    place = G + tl.where(swapped, j, i) * K + tl.where(swapped, i, j)
    total = tl.load(place)
    for _ in range(1, parts):
        place += K * K
        total += tl.load(place)
    return total


@triton.jit
def _unit_scale(square):
    """1 / ‖w‖, and 0 of a column that is 0 or not finite, which counts as dependent."""
    counts = (square > 0) & (square < float("inf"))
    return tl.where(counts, 1.0 / tl.sqrt(tl.where(counts, square, 1.0)), 0.0)


@triton.jit
def _panel(
    T, vectors, first, k, rank, worst, PUT_OFF: tl.constexpr, BK: tl.constexpr, K: tl.constexpr
):
    """Rows `first` to `first + BK` of the tile finished; the rank and the largest doubt so far."""
    limits, inverses = vectors + K, vectors + 2 * K
    squares, places = vectors + 3 * K, vectors + 4 * K
    i, n = first + tl.arange(0, BK), tl.arange(0, K)
    strip = tl.load(T + i[:, None] * K + n[None, :])
    for at in range(first, tl.minimum(first + BK, k)):
        # By way of memory: a sum over the strip would cost more barriers.
        line_at = T + at * K
        tl.store(line_at + n[None, :] + 0 * i[:, None], strip, mask=i[:, None] == at)
        tl.debug_barrier()
        line = tl.load(line_at + n)
        column = tl.load(line_at + i)  # of L, by symmetry, times the pivot
        pivot, limit = tl.load(line_at + at), tl.load(limits + at)
        made_of = tl.sum(tl.where(n < at, line * line, 0.0))
        noise = NOISE * (1.0 + made_of)
        keep = pivot - noise > limit * limit
        drop = (pivot + noise <= limit * limit) | ((pivot == 0.0) & (made_of == 0.0))
        square = 1.0 / tl.where(keep, pivot, tl.maximum(pivot, noise))
        inverse = tl.where(keep, square, 0.0)
        worst = tl.maximum(worst, noise * inverse)
        # Nothing is taken off along a column that is put off.
        doubt = ROUGH if PUT_OFF else float("inf")
        worst = tl.where(keep | drop, worst, tl.maximum(worst, doubt))
        tl.store(inverses + at, inverse)
        tl.store(squares + at, tl.where(drop, 0.0, square))
        tl.store(places + at, rank.to(tl.float64))
        rank += tl.where(drop, 0, 1)
        below = tl.where(i > at, column * inverse, 0.0)
        strip = tl.where((i[:, None] > at) & (n[None, :] == at), 0.0, strip)
        strip -= below[:, None] * tl.where(n == at, 1.0, line)[None, :]
    tl.store(T + i[:, None] * K + n[None, :], strip)
    tl.debug_barrier()
    return rank, worst


@triton.jit
def _take_off(T, vectors, first, BK: tl.constexpr, K: tl.constexpr):
    """A finished panel taken off all rows below it."""
    r, n = tl.arange(0, BK), tl.arange(0, K)[None, :]
    j = first + r
    inverse = tl.load(vectors + 2 * K + j)
    within = (n >= first) & (n < first + BK)
    for top in tl.range(first + BK, K, BK, num_stages=1):  # no load before a store that it follows
        i = top + r
        L = tl.load(T + j[None, :] * K + i[:, None]) * inverse[None, :]
        line = tl.load(T + j[:, None] * K + n)
        line = tl.where(within & (n > j[:, None]), 0.0, line)
        line = tl.where(n == j[:, None], 1.0, line)
        rest = tl.where(within, 0.0, tl.load(T + i[:, None] * K + n))
        rest -= tl.dot(L, line, out_dtype=tl.float64)
        tl.debug_barrier()  # other threads have read what these write over
        tl.store(T + i[:, None] * K + n, rest)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["parts"])
def eliminate_kernel(
    table,
    states,
    partials,
    X,
    parts,
    SHARP: tl.constexpr,
    SECOND: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
    BK: tl.constexpr,
    K: tl.constexpr,
):
    """From the partials X, the rank and the state; one program a matrix.

    Of a tile beside X, row i is what is left of row i of L⁻¹ G in the columns still to come, and
    row i of L⁻¹ in those that are done.
    """
    matrix = tl.program_id(0).to(tl.int64)
    wanted = True
    if SECOND:
        wanted = tl.load(states + matrix) == AGAIN
    if wanted:
        row = table + matrix * COLUMNS
        k = tl.load(row + 5).to(tl.int32)
        rtol = tl.load(row + 6).to(tl.float64, bitcast=True)
        n, r = tl.arange(0, K), tl.arange(0, BK)
        G = partials + matrix * parts * (K * K)
        X += matrix * (2 * K * K + 5 * K)
        T, vectors = X + K * K, X + 2 * K * K
        limits, inverses = vectors + K, vectors + 2 * K
        squares, places = vectors + 3 * K, vectors + 4 * K
        scale = _unit_scale(_sum_of_parts(G, parts, n, n, BK, K))
        tl.store(vectors + n, scale)
        if SECOND:
            limit = tl.load(limits + n) * scale
            tl.debug_barrier()  # other threads have read what these write over
        else:
            limit = tl.zeros((K,), tl.float64) + rtol
        tl.store(limits + n, limit)
        tl.store(inverses + n, tl.zeros((K,), tl.float64))
        tl.store(squares + n, tl.zeros((K,), tl.float64))
        tl.debug_barrier()
        for first in range(0, K, BK):
            i = (first + r)[:, None]
            strip = _sum_of_parts(G, parts, i, n[None, :], BK, K)
            both = tl.load(vectors + i) * scale[None, :]
            tl.store(T + i * K + n[None, :], tl.where(both > 0, strip * both, 0.0))
        tl.debug_barrier()
        # What a first pass leaves has to be held by W.
        PUT_OFF: tl.constexpr = not SECOND and DTYPE == tl.float32
        rank = tl.full((), 0, tl.int32)
        worst = tl.full((), 0.0, tl.float64)
        for first in range(0, k, BK):
            rank, worst = _panel(T, vectors, first, k, rank, worst, PUT_OFF, BK, K)
            if K > BK:
                _take_off(T, vectors, first, BK, K)
        if SECOND:
            state = tl.where(worst <= SHARP, AGAIN, OPEN)
        else:
            middle = AGAIN if PUT_OFF else OPEN
            state = tl.where(worst <= SHARP, DONE, tl.where(worst <= ROUGH, middle, OPEN))
        tl.store(states + matrix, state)
        tl.store(tl.load(row + 3).to(tl.pointer_type(tl.int64)), rank.to(tl.int64))
        for first in range(0, K, BK):
            i = first + r
            L = tl.load(T + i[:, None] * K + n[None, :])
            L = tl.where(i[:, None] > n[None, :], L, tl.where(i[:, None] == n[None, :], 1.0, 0.0))
            root = tl.sqrt(tl.load(squares + i))
            # Kept columns go before the others, each in their own order.
            before = tl.load(places + i, mask=i < k, other=0.0).to(tl.int32)
            place = tl.where(root > 0, before, tl.where(i < k, rank + i - before, i))
            tl.store(X + n[None, :] * K + place[:, None], L * root[:, None] * scale[None, :])
            if PUT_OFF:
                tl.store(limits + place, tl.where(state == AGAIN, rtol * root, rtol))


@triton.jit(do_not_specialize=["parts"])
def apply_kernel(
    table,
    states,
    X,
    parts,
    SECOND: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
    LAYOUT: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    PART: tl.constexpr,
):
    """W ← W X on a part of the rows."""
    part, matrix = tl.program_id(0) % parts, tl.program_id(0) // parts
    state = tl.load(states + matrix)
    wanted = state == AGAIN
    if SECOND == 0:
        wanted = state != OPEN
    if wanted:
        row = table + matrix * COLUMNS
        W = tl.load(row).to(tl.pointer_type(DTYPE))
        step, unit = tl.load(row + 1), tl.load(row + 2)
        d, k = tl.load(row + 4), tl.load(row + 5)
        e, j, n = tl.arange(0, BD), tl.arange(0, BK), tl.arange(0, K)
        X += matrix.to(tl.int64) * (2 * K * K + 5 * K)
        last = tl.minimum(d, (part + 1) * PART)
        for first in range(part * PART, last, BD):
            rows = first + e
            Q = tl.zeros((BD, K), tl.float64)
            for left in range(0, K, BK):
                w = _read(row, rows, left + j, DTYPE, LAYOUT, True)
                w = tl.where(tl.abs(w) < float("inf"), w, 0.0)  # of a column that is dropped
                x = tl.load(X + (left + j)[:, None] * K + n[None, :])
                Q = tl.dot(w, x, Q, out_dtype=tl.float64)
            tl.debug_barrier()  # other threads of the program have read what these write over
            places = W + rows[:, None].to(tl.int64) * step + n[None, :].to(tl.int64) * unit
            inside = (rows[:, None] < d) & (n[None, :] < k)
            tl.store(places, rounded(Q.to(tl.float32), DTYPE), mask=inside)
