"""Tensors of any layout as the matrices that the kernels take."""

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
