"""Projections onto what is left, where that is less than what is blocked.

    right   T ← T W Wᵀ        left   T ← W Wᵀ T        W [d, p], V the rest: T V = 0

in fp32 whatever a run sets for its own products, since TF32 would round T out of W again.
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
        bases: `[d, p]` each, orthonormal. Those that are one tensor are multiplied with at once.
        measure: add up the energies that `energies` returns.
    """

    def __init__(
        self, tensors: Sequence[Tensor], bases: Sequence[Tensor], side: Side, measure: bool = False
    ):
        self.tensors, self.side, self.measure = tensors, side, measure
        self._sums: Tensor | None = None
        shared: dict[int, list[int]] = {}
        for i, W in enumerate(bases):
            shared.setdefault(id(W), []).append(i)
        self._groups = [(bases[each[0]], each) for each in shared.values()]

    @torch.no_grad()
    @set_aside()
    def __call__(self, Ts: Sequence[Tensor] | None = None) -> None:
        """Project the tensors it was made of, or `Ts` in their place."""
        Ts = [T.detach() for T in (self.tensors if Ts is None else Ts)]
        rows = Ts if self.side == "right" else [T.mT for T in Ts]
        kept, coefficients = [rows[0]] * len(Ts), [rows[0]] * len(Ts)
        for W, each in self._groups:
            X = torch.cat([rows[i] for i in each])
            X = X.to(torch.promote_types(X.dtype, torch.float32))
            C = X @ W.to(X)
            counts = [len(rows[i]) for i in each]
            parts = zip(each, (C @ W.to(C).mT).split(counts), C.split(counts), strict=True)
            for i, part, own in parts:
                kept[i], coefficients[i] = part, own
        if self.measure:
            norms = torch._foreach_norm([T.float() for T in Ts]) + torch._foreach_norm(coefficients)
            found = torch.stack([n.to(norms[0].device) for n in norms]).view(2, -1).mT
            found = found if found.device.type == "mps" else found.double()  # which has no fp64
            squares = found.square()
            squares = torch.where(squares[:, :1].isfinite(), squares, 0)  # what overflowed is none
            self._sums = squares if self._sums is None else self._sums + squares
        for T, part in zip(rows, kept, strict=True):
            T.copy_(part)

    def energies(self) -> Tensor:
        """Σ ‖T‖² and what of it was taken out `[n, 2]`, since the last time; fp64 on the CPU."""
        count = sum(len(each) for _, each in self._groups)
        sums = torch.zeros(count, 2) if self._sums is None else self._sums
        self._sums = None
        total, kept = sums.cpu().double().unbind(1)
        return torch.stack([total, (total - kept).clamp_min(0)], 1)
