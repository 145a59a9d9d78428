"""Orthonormalisation of a list in Triton: a few launches for all of it, nothing read on the host.

    W ← W X,  X from the Gram matrix of W;  the same again, or column by column, where that is
    not enough: a state on the device says so, and the launches that have nothing to do return

A matrix is split over d into parts by its own k alone, and their shares are added up in order: what
else is in the list changes no result.
"""

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import orthonormalize_columns as columns
from .orthonormalize_gram import COLUMNS, apply_kernel, eliminate_kernel, gram_kernel
from .tables import Table, on_device

WIDEST = 256
SCRATCH = 2**25  # numbers in fp64 for the matrices that go column by column at a time, if one fits
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def refusal(W: Tensor) -> str | None:
    """Why this can't be orthonormalised here, or None."""
    k = W.shape[-1]
    return f"k = {k} is above {WIDEST}" if k > WIDEST else None


def orthonormalize_triton(Ws: list[Tensor], ranks: list[Tensor], rtols: list[float]) -> None:
    """Each `W [d, k]` in place and its rank; arguments as `orthonormalize_` has checked.

    The same launches for each device, dtype, power of two above k and layout in the list.
    """
    groups: dict[tuple, list[int]] = {}
    for i, W in enumerate(Ws):
        groups.setdefault((W.device, W.dtype, padded(W.shape[1]), _layout(W)), []).append(i)
    for (device, dtype, K, layout), members in groups.items():
        rows = [_row(Ws[i], ranks[i], rtols[i]) for i in members]
        table = Table(rows, torch.int64, device).here()
        with on_device(device):
            _launch(table, [Ws[i].shape for i in members], dtype, K, layout)


def _launch(table: Tensor, shapes: list, dtype: torch.dtype, K: int, layout: int) -> None:
    count, longest = len(shapes), max(1, *(d for d, _ in shapes))
    gram, eliminate, apply = tilings(K, dtype, layout)
    parts, slices = (triton.cdiv(longest, tall["PART"]) for tall in (gram, apply))
    wide = {"dtype": torch.float64, "device": table.device}
    states = torch.empty(count, dtype=torch.int32, device=table.device)
    partials = torch.empty(count, parts, K, K, **wide)
    X = torch.empty(count, 2 * K * K + 5 * K, **wide)
    for second in passes(dtype):
        blocks = gram["BLOCKS"] ** 2
        gram_kernel[(count * parts * blocks,)](table, states, partials, parts, second, **gram)
        eliminate_kernel[(count,)](table, states, partials, X, parts, SECOND=second, **eliminate)
        apply_kernel[(count * slices,)](table, states, X, slices, second, **apply)
    room = max(d * (1 + k) + k for d, k in shapes)
    programs = min(count, max(1, SCRATCH // max(1, room)))
    scratch = torch.empty(programs * room, **wide)
    columns.columns_kernel[(programs,)](
        table, states, X, scratch, count, room, COLUMNS, DTYPES[dtype], K, **columns.OPTIONS
    )


def passes(dtype: torch.dtype) -> tuple[bool, ...]:
    """For each, whether it is the second; a 16-bit W can't hold what a second one starts from."""
    return (False, True) if dtype == torch.float32 else (False,)


def padded(k: int) -> int:
    """Columns that the kernels work on."""
    return max(16, triton.next_power_of_2(k))


def tilings(K: int, dtype: torch.dtype, layout: int) -> tuple[dict, dict, dict]:
    """Constants and warps of the Gram matrix, of its elimination and of the product.

    No tile of a product has more than 32 rows: with 64, Triton 3.7 fails on fp64 for sm_100.
    """
    warps = 4 if K < 64 else 8
    shared = {"COLUMNS": COLUMNS, "DTYPE": DTYPES[dtype]}
    tall = {**shared, "LAYOUT": layout, "BD": 32}
    sharp = torch.finfo(dtype).eps / 8
    return (
        {
            **tall,
            "BLOCKS": triton.cdiv(K, 32),
            "BK": min(K, 32),
            "BD": 16 if layout == 2 else 32,
            "PART": max(512, 8 * K),
            **_warps(4),
        },
        {
            **shared,
            "SHARP": sharp,
            "BK": min(K, 32) if K < 128 else 16,
            "K": K,
            **_warps(warps),
        },
        {
            **tall,
            "BK": min(K, 32) if K <= 64 else 16,
            "BD": 32 if K < 256 else 16,
            "K": K,
            "PART": 256,
            **_warps(warps),
        },
    )


def _warps(count: int) -> dict:
    """With all the registers there are: else the assembler spills some to run more programs."""
    return {"num_warps": count, "maxnreg": min(255, 2048 // count)}


def configurations(dtype: torch.dtype, layout: int, K: int) -> list[tuple[str, dict]]:
    """What is launched for matrices of one kind: names of kernels and their constants."""
    shared = {"COLUMNS": COLUMNS, "DTYPE": DTYPES[dtype], "K": K}
    named = list(zip(("gram", "eliminate", "apply"), tilings(K, dtype, layout), strict=True))
    return [("columns", {**shared, **columns.OPTIONS})] + [
        (name, {"SECOND": second, **options}) for second in passes(dtype) for name, options in named
    ]


def _layout(W: Tensor) -> int:
    """0 with contiguous rows and 1 with contiguous columns, in whole vectors; else 2."""
    (d, k), (step, unit) = W.shape, W.stride()
    if W.data_ptr() % 16 == 0:
        if unit == 1 and step % 8 == 0 and k % 8 == 0:
            return 0
        if step == 1 and unit % 8 == 0 and d % 8 == 0:
            return 1
    return 2


def _row(W: Tensor, rank: Tensor, rtol: float) -> tuple[int, ...]:
    bits = struct.unpack("q", struct.pack("d", rtol))[0]
    return (W.data_ptr(), *W.stride(), rank.data_ptr(), *W.shape, bits)
