"""An identity whose gradient stays off a subspace: G ← G − (G V) Vᵀ going back."""

import torch
from torch import Tensor

from .project import check_matrix


class _ProjectGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h: Tensor, basis: Tensor) -> Tensor:
        ctx.save_for_backward(basis)
        return h.view_as(h)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (basis,) = ctx.saved_tensors
        return torch.ops.grasp.project(gradient, basis, None, False), None


def project_gradient(h: Tensor, basis: Tensor) -> Tensor:
    """Return `h` unchanged; on the way back its gradient loses the component along the basis.

        forward  h ← h        backward  G ← G − (G V) Vᵀ

    Args:
        h: `[..., d]`; fp64, fp32, bf16, fp16.
        basis: `[d, k]` with orthonormal columns, k ≤ d.

    Raises:
        TypeError, ValueError: as `project`.
    """
    check_matrix("h", h)
    check_matrix("basis", basis)
    if basis.ndim != 2 or h.ndim < 1 or h.shape[-1] != basis.shape[0]:
        raise ValueError(
            f"h is {list(h.shape)} and basis {list(basis.shape)}; give [..., d] and [d, k]"
        )
    if h.device != basis.device:
        raise ValueError(f"h is on {h.device}, basis on {basis.device}; move one of them")
    return _ProjectGradient.apply(h, basis)
