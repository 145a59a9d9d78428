"""Tensors of any layout as the matrices that the kernels take, each a row of numbers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

FAR = 2**25  # elements between rows: 64 of them, a tile of the kernels, fit a 32-bit offset

Matrix = tuple[Tensor, Tensor, Tensor | None]  # T, where its projection goes, C


def matrices(
    T: Tensor, out: Tensor, C: Tensor | None, left: bool, staged: list[tuple[Tensor, Tensor]]
) -> list[Matrix]:
    """`T` cut into matrices with a stride of 1, the same one in `T` and `out`, and no huge one.

    Where that can't be, a copy is worked on; `(copy, out)` joins `staged`, to be copied back.
    """
    if T.numel() == 0:
        return []
    if T.ndim == 1:
        T, out, C = T[None], out[None], None if C is None else C[None]
    if T.ndim > 2 and not left and T.is_contiguous() and out.is_contiguous():
        T, out = T.flatten(0, -2), out.flatten(0, -2)
        C = None if C is None else C.flatten(0, -2)
    if T.ndim > 2:
        parts = (
            matrices(T[i], out[i], None if C is None else C[i], left, staged)
            for i in range(T.shape[0])
        )
        return [matrix for part in parts for matrix in part]
    if not any(_is_plain(T, dim) and _is_plain(out, dim) for dim in (0, 1)):
        kept = torch.empty_like(out, memory_format=torch.contiguous_format)
        staged.append((kept, out))
        T, out = T.contiguous(), kept
    return [(T, out, C)]


def _is_plain(T: Tensor, dim: int) -> bool:
    return T.stride(dim) == 1 and T.stride(1 - dim) < FAR


CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Row(NamedTuple):
    """All that a kernel has to know of a matrix and what is done to it, but where it lies.

    The matrix is stored `[n, d]` with `left` false and `[d, n]` with `left` true, its rows
    contiguous. Positions along n have k coefficients each.
    """

    basis: int  # address of [d, k] fp32
    C: int  # address of fp32 coefficients, or 0
    n: int
    d: int
    k: int
    step: int  # elements between rows of the matrix
    out_step: int
    basis_d: int  # strides
    basis_k: int
    C_n: int
    C_k: int
    code: int  # in CODES
    left: int
    vector: int  # whether the basis can be read in vectors of 16 bytes


def row(T: Tensor, out: Tensor, basis: Tensor, C: Tensor | None, left: bool) -> Row:
    """Of a matrix that `matrices` gave; basis and C in fp32."""
    if T.stride(1) != 1 or out.stride(1) != 1:  # its transpose, from the other side
        T, out, left = T.mT, out.mT, not left
        C = None if C is None else C.mT
    d, k = basis.shape
    C_n, C_k = (0, 0) if C is None else C.stride()[::-1] if left else C.stride()
    return Row(
        basis.data_ptr(),
        0 if C is None else C.data_ptr(),
        T.numel() // d,
        d,
        k,
        T.stride(0),
        out.stride(0),
        *basis.stride(),
        C_n,
        C_k,
        CODES[T.dtype],
        left,
        _in_vectors(basis),
    )


def _in_fp32(basis: Tensor) -> Tensor:
    basis = basis.float()
    return basis.contiguous() if max(basis.stride()) >= FAR else basis


def _in_vectors(basis: Tensor) -> bool:
    """Whether rows are contiguous, 16-byte aligned, and memory goes on to a multiple of 4 columns.

    What lies beyond the last column is read and thrown away.
    """
    (d, k), (step, unit_step) = basis.shape, basis.stride()
    end = basis.storage_offset() + (d - 1) * step + -(-k // 4) * 4
    return (
        unit_step == 1
        and step % 4 == 0
        and basis.data_ptr() % 16 == 0
        and end * 4 <= basis.untyped_storage().nbytes()
    )


def in_vectors(basis: Tensor) -> Tensor:
    """The basis `[d, k]` as kernels read it fastest, each row from a multiple of 16 bytes.

    On a CPU, where that gains nothing, without gaps.
    """
    if basis.device.type == "cpu":
        return basis.contiguous()
    d, k = basis.shape
    if basis.stride(1) == 1 and basis.stride(0) % 4 == 0:
        return basis
    wide = basis.new_zeros(d, -(-k // 4) * 4)
    wide[:, :k] = basis
    return wide[:, :k]


def unit(row: Row) -> int:
    """Elements that all lengths are multiples of, so that whole vectors lie inside or outside."""
    lengths = (row.d, row.step, row.out_step, *((row.n,) if row.left else ()))
    least = 4 if row.code == CODES[torch.float32] else 8  # of 16 bytes
    fits = (u for u in (16, 8, 4) if u >= least and all(v % u == 0 for v in lengths))
    return next(fits, 1)


@dataclass
class Listed:
    """The matrices of a list that lie on one device."""

    rows: list[Row] = field(default_factory=list)
    pointers: list[int] = field(default_factory=list)
    """Of each matrix where it lies, and where its projection goes."""
    members: list[tuple[int, int]] = field(default_factory=list)
    """Of each matrix the tensor of the list that holds it, and the bytes from that one's start."""
    kept: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    """What the rows' addresses point to."""
    matrices: list[Tensor] = field(default_factory=list)
    """What the pointers point to, some of them copies made for it."""


def listed(
    Ts: Sequence[Tensor],
    outs: Sequence[Tensor],
    bases: Sequence[Tensor],
    Cs: Sequence[Tensor],
    left: bool,
    staged: list[tuple[Tensor, Tensor]],
) -> dict[torch.device, Listed]:
    """A list as rows by device."""
    found: dict[torch.device, Listed] = {}
    same: dict[int, Tensor] = {}  # a basis that several share stays one
    for i, T in enumerate(Ts):
        if bases[i].shape[-1] == 0:  # nothing to take off
            staged += [] if outs[i] is T else [(T, outs[i])]
            continue
        if (U := same.get(id(bases[i]))) is None:
            U = same[id(bases[i])] = _in_fp32(bases[i])
        C = Cs[i].float() if Cs else None
        on = found.setdefault(T.device, Listed())
        for piece, piece_out, V, piece_C in _pieces(T, outs[i], U, C):
            for matrix, out, part in matrices(piece, piece_out, piece_C, left, staged):
                on.rows.append(row(matrix, out, V, part, left))
                on.pointers += (matrix.data_ptr(), out.data_ptr())
                on.members.append((i, matrix.data_ptr() - T.data_ptr()))
                on.kept.append((V, part))
                on.matrices.append(matrix)
    return found


def _pieces(
    T: Tensor, out: Tensor, basis: Tensor, C: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Parts that have one basis `[d, k]` each."""
    if basis.ndim == 2:
        yield T, out, basis, C
        return
    for i in range(T.shape[0]):
        yield from _pieces(T[i], out[i], basis[i], None if C is None else C[i])
