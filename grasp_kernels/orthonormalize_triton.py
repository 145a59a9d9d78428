"""Orthonormalisation in Triton: one launch for a list, a program for each matrix, no host sync.

    for each column:  w ← w / ‖w‖;  twice:  w ← w − Q (Qᵀ w);  keep w / ‖w‖ where ‖w‖ > rtol

The definition's own order in fp64 throughout: a column rounded before the next is taken off it
would hide that the next depends on it. A kept column goes at once before the ones that are dropped.
"""

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from .matrices import CODES
from .tables import Table, on_device
from .triton_tools import rounded

COLUMNS = 8  # of a row of the table
LARGEST_K = 64


def refusal(W: Tensor) -> str | None:
    """Why this can't be orthonormalised here, or None."""
    k = W.shape[-1]
    return f"k = {k} is above {LARGEST_K}" if k > LARGEST_K else None


@triton.jit
def _inverse_root(total):
    """1 / √total in fp64, and 0 of 0."""
    return tl.where(total > 0, 1.0 / tl.sqrt(tl.where(total > 0, total, 1.0)), 0.0)


@triton.jit
def _tile(Q, at, j, d, k, rank):
    """The columns found so far, `Q [d, k]` in fp64."""
    inside = (at[:, None] < d) & (j[None, :] < rank)
    return tl.load(Q + at[:, None].to(tl.int64) * k + j[None, :], mask=inside, other=0.0)


@triton.jit
def _orthonormalize(row, DTYPE: tl.constexpr, KP: tl.constexpr, BD: tl.constexpr):
    W = tl.load(row).to(tl.pointer_type(DTYPE))
    w = tl.load(row + 1).to(tl.pointer_type(tl.float64))  # the column at hand, [d], and then Q
    rank_out = tl.load(row + 2).to(tl.pointer_type(tl.int64))
    d, k = tl.load(row + 3), tl.load(row + 4)
    step, unit = tl.load(row + 5), tl.load(row + 6)
    rtol = tl.load(row + 7).to(tl.float64, bitcast=True)
    Q = w + d
    j = tl.arange(0, KP)
    e = tl.arange(0, BD)
    blocks = tl.cdiv(d, BD)
    rank = tl.full((), 0, tl.int64)
    for column in range(0, k):
        total = tl.full((), 0.0, tl.float64)
        for block in range(0, blocks):
            at = block * BD + e
            x = tl.load(W + at.to(tl.int64) * step + column * unit, mask=at < d, other=0.0).to(
                tl.float64
            )
            total += tl.sum(x * x, 0)
            tl.store(w + at, x, mask=at < d)
        tl.debug_barrier()
        scale = _inverse_root(total)
        for again in tl.static_range(2):
            c = tl.zeros((KP,), tl.float64)
            for block in range(0, blocks):
                at = block * BD + e
                x = tl.load(w + at, mask=at < d, other=0.0) * scale
                c += tl.sum(_tile(Q, at, j, d, k, rank) * x[:, None], 0)
            total = tl.full((), 0.0, tl.float64)
            for block in range(0, blocks):
                at = block * BD + e
                x = tl.load(w + at, mask=at < d, other=0.0) * scale
                x -= tl.sum(_tile(Q, at, j, d, k, rank) * c[None, :], 1)
                total += tl.sum(x * x, 0)
                tl.store(w + at, x, mask=at < d)
            tl.debug_barrier()
            if again == 0:
                kept = tl.where(tl.sqrt(total) > rtol, d, 0)  # rows to write: all or none
            scale = _inverse_root(total)
        for block in range(0, blocks):
            at = block * BD + e
            x = tl.load(w + at, mask=at < d, other=0.0) * scale
            tl.store(Q + at.to(tl.int64) * k + rank, x, mask=at < kept)
        tl.debug_barrier()
        rank += tl.where(kept > 0, 1, 0)
    for block in range(0, blocks):
        at = block * BD + e
        x = rounded(_tile(Q, at, j, d, k, rank).to(tl.float32), DTYPE)
        inside = (at[:, None] < d) & (j[None, :] < k)
        tl.store(W + at[:, None].to(tl.int64) * step + j[None, :] * unit, x, mask=inside)
    tl.store(rank_out, rank)


@triton.jit
def orthonormalize_kernel(
    table,
    COLUMNS: tl.constexpr,
    CODE: tl.constexpr,
    KP: tl.constexpr,
    BD: tl.constexpr,
):
    row = table + tl.program_id(0) * COLUMNS
    if CODE == 0:
        _orthonormalize(row, tl.float32, KP, BD)
    elif CODE == 1:
        _orthonormalize(row, tl.bfloat16, KP, BD)
    else:
        _orthonormalize(row, tl.float16, KP, BD)


def orthonormalize_triton(Ws: list[Tensor], ranks: list[Tensor], rtols: list[float]) -> None:
    """Each `W [d, k]` in place and its rank; arguments as `orthonormalize_` has checked.

    One launch for each device and dtype in the list.
    """
    groups: dict[tuple, list[int]] = {}
    for i, W in enumerate(Ws):
        groups.setdefault((W.device, W.dtype), []).append(i)
    for (device, dtype), members in groups.items():
        sizes = [Ws[i].shape[0] * (1 + Ws[i].shape[1]) for i in members]
        scratch = [torch.empty(n, dtype=torch.float64, device=device) for n in sizes]
        rows = [
            (
                Ws[i].data_ptr(),
                column.data_ptr(),
                ranks[i].data_ptr(),
                *Ws[i].shape,
                *Ws[i].stride(),
                struct.unpack("q", struct.pack("d", rtols[i]))[0],
            )
            for i, column in zip(members, scratch, strict=True)
        ]
        table = Table(rows, torch.int64, device).here()
        KP = max(16, triton.next_power_of_2(max(Ws[i].shape[1] for i in members)))
        with on_device(device):
            orthonormalize_kernel[(len(rows),)](table, COLUMNS, CODES[dtype], **tiling(KP))


def tiling(KP: int) -> dict:
    """The kernel's constants and warps."""
    return {"KP": KP, "BD": 1024 // KP, "num_warps": 16}
