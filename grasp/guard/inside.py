"""Projections onto what is left, where that is less than what is blocked.

    right   T ← T − (T − T W Wᵀ)      left   T ← T − (T − W Wᵀ T)      W [d, p], V the rest: T V = 0

What goes is what the projector off W leaves of T, whatever kind of weight T is of.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from grasp.guard.weights import Whole


class OffW(Protocol):
    """What `Whole.projector` makes."""

    def __call__(self, Ts: Sequence[Tensor] | None = None) -> None: ...

    def energies(self) -> Tensor: ...


class Inside:
    """What `grasp_kernels.Projector` is for V, for W.

    Args:
        off: the projector off W of the same weights and tensors, with nothing pinned.
        weights: of one kind.
        tensors: as long as what an optimizer holds for each; None for the weights themselves.
    """

    def __init__(self, off: OffW, weights: Sequence[Whole], tensors: Sequence[Tensor] | None):
        self.off, self.weights, self.tensors = off, list(weights), tensors

    @torch.no_grad()
    def __call__(self, Ts: Sequence[Tensor] | None = None) -> None:
        """Project the tensors it was made of, or what this process holds of others, `Ts`."""
        if not self.weights[0].moves:
            return
        parts = [T.detach() for T in (self._parts() if Ts is None else Ts)]
        before = torch._foreach_mul(parts, 1)  # copies, in a launch
        self.off(Ts)
        torch._foreach_neg_(parts)
        torch._foreach_add_(parts, before)

    def energies(self) -> Tensor:
        """Σ ‖T‖² and what of it was taken out `[n, 2]`, since the last time; fp64 on the CPU."""
        total, kept = self.off.energies().unbind(1)
        return torch.stack([total, (total - kept).clamp_min(0)], 1)

    def _parts(self) -> list[Tensor]:
        if self.tensors is None:
            return [w.local for w in self.weights]
        return [w.of(T) for w, T in zip(self.weights, self.tensors, strict=True)]
