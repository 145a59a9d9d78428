"""Orthonormalisation column by column: for the matrices whose rank their Gram matrix leaves open.

    for each column:  w ← w / ‖w‖;  twice:  w ← w − Q (Qᵀ w);  keep w / ‖w‖ where ‖w‖ > its limit

The definition's own order in fp64 throughout: a column rounded before the next is taken off it
would hide that the next depends on it. A kept column goes at once before the ones that are dropped.
"""

import triton
import triton.language as tl

from .triton_tools import rounded

OPEN = tl.constexpr(2)  # of a matrix's state: its rank has to be found here
OPTIONS = {"BK": 64, "BD": 8, "num_warps": 16}


@triton.jit
def _inverse_root(total):
    """1 / √total in fp64, and 0 of 0."""
    return tl.where(total > 0, 1.0 / tl.sqrt(tl.where(total > 0, total, 1.0)), 0.0)


@triton.jit
def _tile(Q, at, j, d, k, rank):
    """Some of the columns found so far, `Q [d, k]` in fp64."""
    inside = (at[:, None] < d) & (j[None, :] < rank)
    return tl.load(Q + at[:, None].to(tl.int64) * k + j[None, :], mask=inside, other=0.0)


@triton.jit
def _each_column(row, limits, c, DTYPE: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr):
    W = tl.load(row).to(tl.pointer_type(DTYPE))
    step, unit = tl.load(row + 1), tl.load(row + 2)
    rank_out = tl.load(row + 3).to(tl.pointer_type(tl.int64))
    d, k = tl.load(row + 4), tl.load(row + 5)
    w = c + k  # the column at hand, [d], after its coefficients, and then Q
    Q = w + d
    j = tl.arange(0, BK)
    e = tl.arange(0, BD)
    blocks = tl.cdiv(d, BD)
    rank = tl.full((), 0, tl.int64)
    for column in range(0, k):
        limit = tl.load(limits + column)
        total = tl.full((), 0.0, tl.float64)
        for block in range(0, blocks):
            at = block * BD + e
            x = tl.load(W + at.to(tl.int64) * step + column * unit, mask=at < d, other=0.0)
            x = x.to(tl.float32).to(tl.float64)
            total += tl.sum(x * x, 0)
            tl.store(w + at, x, mask=at < d)
        tl.debug_barrier()
        scale = _inverse_root(total)
        for again in tl.static_range(2):
            for first in range(0, rank, BK):
                part = tl.zeros((BK,), tl.float64)
                for block in range(0, blocks):
                    at = block * BD + e
                    x = tl.load(w + at, mask=at < d, other=0.0) * scale
                    part += tl.sum(_tile(Q, at, first + j, d, k, rank) * x[:, None], 0)
                tl.store(c + first + j, part, mask=first + j < rank)
            tl.debug_barrier()
            total = tl.full((), 0.0, tl.float64)
            for block in range(0, blocks):
                at = block * BD + e
                x = tl.load(w + at, mask=at < d, other=0.0) * scale
                for first in range(0, rank, BK):
                    part = tl.load(c + first + j, mask=first + j < rank, other=0.0)
                    x -= tl.sum(_tile(Q, at, first + j, d, k, rank) * part[None, :], 1)
                total += tl.sum(x * x, 0)
                tl.debug_barrier()  # other threads have read what these write over
                tl.store(w + at, x, mask=at < d)
            tl.debug_barrier()
            if again == 0:
                kept = tl.where(tl.sqrt(total) > limit, d, 0)  # rows to write: all or none
            scale = _inverse_root(total)
        for block in range(0, blocks):
            at = block * BD + e
            x = tl.load(w + at, mask=at < d, other=0.0) * scale
            tl.store(Q + at.to(tl.int64) * k + rank, x, mask=at < kept)
        tl.debug_barrier()
        rank += tl.where(kept > 0, 1, 0)
    for block in range(0, blocks):
        at = block * BD + e
        for first in range(0, k, BK):
            x = rounded(_tile(Q, at, first + j, d, k, rank).to(tl.float32), DTYPE)
            inside = (at[:, None] < d) & (first + j[None, :] < k)
            tl.store(W + at[:, None].to(tl.int64) * step + (first + j[None, :]) * unit, x, inside)
    tl.store(rank_out, rank)
    tl.debug_barrier()  # before the next matrix takes the place of this one's Q


@triton.jit(do_not_specialize=["count", "room"])
def columns_kernel(
    table,
    states,
    X,
    scratch,
    count,
    room,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    """Each program takes every so-many-th matrix, in `room` elements of scratch of its own."""
    size = tl.full((), 2 * K * K + 5 * K, tl.int64)  # of what `X` holds for a matrix
    c = scratch + tl.program_id(0).to(tl.int64) * room
    for matrix in range(tl.program_id(0), count, tl.num_programs(0)):
        if tl.load(states + matrix) == OPEN:
            limits = X + matrix * size + 2 * K * K + K
            _each_column(table + matrix * COLUMNS, limits, c, DTYPE, BK, BD)
