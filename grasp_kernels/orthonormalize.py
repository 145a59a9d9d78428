"""Orthonormalise the columns of many tall matrices.

    for each column:  w ← w / ‖w‖;  twice:  w ← w − Q (Qᵀ w);  keep w / ‖w‖ where ‖w‖ > rtol

A column that earlier ones span becomes 0 and moves to the end, so the leading columns of an
already orthonormal basis stay as they are, and the first `rank` columns span what W spanned.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import dispatch
from .arguments import check_matrix
from .autocast import set_aside


def orthonormalize_ref(W: Tensor, rtol: float) -> tuple[Tensor, Tensor]:
    """The definition, on a batch: `W [b, d, k]` to `Q [b, d, k]` and ranks `[b]`."""
    # Double precision makes an fp32 result right to fp32 rounding up to condition 1/rtol.
    W = W.to(torch.float64)
    Q = torch.zeros_like(W)
    kept = torch.zeros(W.shape[0], W.shape[2], dtype=torch.bool, device=W.device)
    for j in range(W.shape[2]):
        spanned = Q[:, :, :j]
        w = _unit(W[:, :, j : j + 1])
        w = w - spanned @ (spanned.mT @ w)
        keep = torch.linalg.vector_norm(w, dim=1, keepdim=True) > rtol
        w = _unit(w)  # the second pass works on what is left, whatever its size
        w = _unit(w - spanned @ (spanned.mT @ w))
        Q[:, :, j : j + 1] = torch.where(keep, w, 0.0)
        kept[:, j] = keep[:, 0, 0]
    order = torch.argsort(~kept, dim=1, stable=True)
    return torch.gather(Q, 2, order[:, None, :].expand_as(Q)), kept.sum(1)


def _unit(w: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(w, dim=1, keepdim=True)
    return w / norm.clamp_min(torch.finfo(w.dtype).tiny)


def orthonormalize_(Ws: Tensor | Sequence[Tensor], *, rtol: float | None = None) -> list[Tensor]:
    """Orthonormalise the columns of each matrix in place, and return each rank.

        W ← Q  with  Qᵀ Q = I on the first `rank` columns, the others 0,  span(Q) = span(W)

    Args:
        Ws: one matrix `[d, k]` or a list; fp64, fp32, bf16, fp16; shapes may differ.
        rtol: a column counts as dependent when what the earlier ones leave of it is at most this
            share of its norm; default four units of rounding of the dtype, a hundred in fp64, in
            which the sums are made.

    Returns:
        A 0-d int64 tensor for each matrix, on its device: reading it is what synchronises.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype or shape.
    """
    tensors = [Ws] if isinstance(Ws, Tensor) else list(Ws)
    for i, W in enumerate(tensors):
        check_matrix(f"Ws[{i}]", W)
        if W.ndim != 2:
            raise ValueError(f"Ws[{i}] is {list(W.shape)}; it must be [d, k]")
    if rtol is not None and not 0 <= rtol < 1:
        raise ValueError(f"rtol is {rtol}; give a number from 0 up to 1, or None")
    if not tensors:
        return []
    ranks = [W.new_empty((), dtype=torch.int64) for W in tensors]
    with torch.no_grad():
        if torch.compiler.is_compiling():
            torch.ops.grasp.orthonormalize_(tensors, ranks, rtol)
        else:
            _orthonormalize_body(tensors, ranks, rtol)
            torch.autograd.graph.increment_version(tensors)
    return ranks


def _default_rtol(dtype: torch.dtype) -> float:
    return (100 if dtype == torch.float64 else 4) * torch.finfo(dtype).eps


@set_aside()
def _orthonormalize_body(Ws: list[Tensor], ranks: list[Tensor], rtol: float | None) -> None:
    by_backend: dict[str, list[int]] = {}
    for i, W in enumerate(Ws):
        by_backend.setdefault(dispatch.choose("orthonormalize_", W), []).append(i)
    for name, chosen in by_backend.items():
        run = dispatch.implementation("orthonormalize", name) or _orthonormalize_each
        rtols = [_default_rtol(Ws[i].dtype) if rtol is None else rtol for i in chosen]
        run([Ws[i] for i in chosen], [ranks[i] for i in chosen], rtols)


def _orthonormalize_each(Ws: list[Tensor], ranks: list[Tensor], rtols: list[float]) -> None:
    groups: dict[tuple, list[int]] = {}
    for i, W in enumerate(Ws):
        groups.setdefault((W.shape, W.dtype, W.device, rtols[i]), []).append(i)
    for (_, _, _, tolerance), members in groups.items():
        W = torch.stack([Ws[i] for i in members])
        Q, rank = orthonormalize_ref(W.cpu() if W.device.type == "mps" else W, tolerance)
        Q, rank = Q.to(W.dtype).to(W.device), rank.to(W.device)  # MPS has no fp64
        for i, q, r in zip(members, Q.unbind(), rank.unbind(), strict=True):
            Ws[i].copy_(q)
            ranks[i].copy_(r)


@torch.library.custom_op("grasp::orthonormalize_", mutates_args=("Ws", "ranks"))
def _orthonormalize_op(Ws: list[Tensor], ranks: list[Tensor], rtol: float | None) -> None:
    _orthonormalize_body(Ws, ranks, rtol)


@_orthonormalize_op.register_fake
def _(Ws: list[Tensor], ranks: list[Tensor], rtol: float | None) -> None:
    return None
