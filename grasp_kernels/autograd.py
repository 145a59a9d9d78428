"""An identity whose gradient stays off a subspace: G ← G − (G V) Vᵀ going back."""

from typing import Any

import torch
from torch import Tensor

from .arguments import check_orthonormal, check_pair
from .project import projected


class _ProjectGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, basis: Tensor) -> Tensor:
        return h.view_as(h)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        _, basis = inputs
        ctx.save_for_backward(basis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (basis,) = ctx.saved_tensors
        return projected(gradient, basis, None, False), None


def project_gradient(h: Tensor, basis: Tensor, *, check: bool = False) -> Tensor:
    """Return `h` unchanged; on the way back its gradient loses the component along the basis.

        forward  h ← h        backward  G ← G − (G V) Vᵀ

    Works under `torch.func` in reverse mode and `torch.compile`, and twice over.

    Args:
        h: `[..., d]`; fp64, fp32, bf16, fp16.
        basis: `[d, k]` with orthonormal columns, k ≤ d, or `[d]` or `[b, d, k]` as in `project`.
        check: refuse a basis that is not orthonormal to its dtype's rounding; waits for the device.

    Raises:
        TypeError, ValueError: as `project`.
        RuntimeError: compiled as one graph with a transform of `torch.func` inside it.
    """
    basis = check_pair("h", h, "basis", basis, None, left=False)
    if check:
        check_orthonormal([basis])
    if torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None:
        # There Dynamo passes over a custom backward, and nothing would be projected (pytorch issue
        # 193279). Not traced, the call is right.
        raise RuntimeError("project_gradient can't be compiled inside torch.func; compile less")
    return _ProjectGradient.apply(h, basis)
