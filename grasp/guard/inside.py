"""Projections onto what is left, where that is less than what is blocked.

right   T ← T W Wᵀ        left   T ← W Wᵀ T        W [d, p], V the rest: T V = 0
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from grasp_kernels.arguments import Side
from grasp_kernels.autocast import set_aside


class Inside:
    """What `grasp_kernels.Projector` is for V, for W; products of `[r, d]` and `[d, p]` alone.

    Args:
        tensors: matrices, written in place. They may lie elsewhere at each call.
        bases: `[d, p]` each, orthonormal.
        measure: add up the energies that `energies` returns.
    """

    def __init__(
        self, tensors: Sequence[Tensor], bases: Sequence[Tensor], side: Side, measure: bool = False
    ):
        self.tensors, self.bases, self.side, self.measure = tensors, bases, side, measure
        self._sums = torch.zeros(len(bases), 2, dtype=torch.float64)

    @torch.no_grad()
    @set_aside()
    def __call__(self, Ts: Sequence[Tensor] | None = None) -> None:
        """Project the tensors it was made of, or `Ts` in their place."""
        norms = []
        for T, W in zip(self.tensors if Ts is None else Ts, self.bases, strict=True):
            X = T.detach() if self.side == "right" else T.detach().mT
            X = X.to(torch.promote_types(X.dtype, torch.float32))
            W = W.to(X)
            C = X @ W
            norms += [X.norm(), C.norm()] if self.measure else []
            kept = C @ W.mT
            T.detach().copy_(kept if self.side == "right" else kept.mT)
        if norms:
            found = torch.stack(norms).view(-1, 2)
            self._sums = self._sums.to(found.device) + found.double().square()

    def energies(self) -> Tensor:
        """Σ ‖T‖² and what of it was taken out `[n, 2]`, since the last time; fp64 on the CPU."""
        total, kept = self._sums.cpu().unbind(1)
        self._sums = torch.zeros_like(self._sums)
        return torch.stack([total, (total - kept).clamp_min(0)], 1)
