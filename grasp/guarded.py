"""One trained parameter with the basis that it is kept off."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import grasp_kernels as gk
from grasp.architecture import Trained

SAVED = ("basis", "pinned", "average", "total", "blocked")


@dataclass
class Guarded:
    """A trained parameter with what it is kept off."""

    trained: Trained
    basis: Tensor  # [d_out, k], or [d_in, k] of inputs
    pinned: Tensor  # C: [k, n] on the left side, [n, k] on the right
    average: Tensor | None = None  # of the drift gradient
    total: Tensor | None = None  # Σ ‖G‖², and what of it was blocked, 0-d fp32 on the device
    blocked: Tensor | None = None

    @classmethod
    def of(cls, trained: Trained, basis: Tensor) -> "Guarded":
        """Pinned to what the parameter does along the basis now.

        A LoRA A starts random and goes to 0 there, which changes no output while B is 0.
        """
        self = cls(trained, basis.to(trained.parameter.device), torch.empty(0))
        self.pinned = self.coefficients(self.parameter)
        if trained.holds == "inputs" and trained.partner is not None:
            self.pinned = torch.zeros_like(self.pinned)
        return self

    @property
    def name(self) -> str:
        return self.trained.name

    @property
    def parameter(self) -> nn.Parameter:
        return self.trained.parameter

    @property
    def remade(self) -> bool:
        """Whether its basis follows from the base model, which an adapter leaves as it was."""
        return self.trained.holds == "inputs" and self.trained.partner is not None

    def saved(self) -> dict[str, Tensor]:
        """What a resumed run must not make anew, by `SAVED` key."""
        keys = [key for key in SAVED if not (self.remade and key in ("basis", "pinned"))]
        return {key: t for key in keys if (t := getattr(self, key)) is not None}

    def restore(self, saved: dict[str, Tensor]) -> None:
        """Take back what `saved` gave."""
        for key in SAVED:
            if not (self.remade and key in ("basis", "pinned")):
                t = saved.get(key)
                setattr(self, key, None if t is None else t.to(self.parameter.device))

    @property
    def left(self) -> bool:
        return self.trained.side == "left"

    def coefficients(self, T: Tensor, basis: Tensor | None = None) -> Tensor:
        """Uᵀ T, or T U on the right side."""
        U = self.basis if basis is None else basis
        T = T.detach().to(torch.promote_types(T.dtype, torch.float32))
        return U.mT.to(T) @ T if self.left else T @ U.to(T)

    def has_room(self, rank: int) -> bool:
        if self.trained.holds == "inputs" or self.parameter.ndim == 1:
            return False
        return self.basis.shape[1] < min(rank, self.basis.shape[0])

    def fresh(self, count: int) -> Tensor:
        """Leading directions of the averaged drift gradient outside the basis: `[d_out, count]`."""
        D = self.average if self.left else self.average.mT  # [d_out, n]
        D = D - self.basis @ (self.basis.mT @ D)
        if min(D.shape) > 256:
            U, S, _ = torch.svd_lowrank(D, q=count + 4, niter=2)
        else:
            U, S, _ = torch.linalg.svd(D, full_matrices=False)
        return U[:, : int((S[:count] > 0).sum())]

    def widen(self, basis: Tensor) -> None:
        """Take a basis whose leading columns are the present one's.

        A LoRA's factors go to 0 along a new direction, B back to where it started; of a weight the
        start is gone, so what it does along a new direction now is what it keeps.
        """
        added = basis[:, self.basis.shape[1] :]
        self.basis = basis.contiguous()
        C = self.coefficients(self.parameter, added)
        C = C if self.trained.partner is None else torch.zeros_like(C)
        self.pinned = torch.cat([self.pinned, C], 0 if self.left else -1)

    def leak(self) -> dict[str, float]:
        """Its rank, the share of the gradient's energy that was blocked, and what got through."""
        blocked = 0.0
        if self.total is not None and float(self.total) > 0:
            blocked = max(0.0, float(self.blocked / self.total))
        return {"rank": self.basis.shape[1], "blocked": blocked, "through": self._through()}

    def _through(self) -> float:
        moved = self.coefficients(self.parameter) - self.pinned
        whole = self.parameter.detach().float()
        if self.trained.partner is not None:
            other = self.trained.partner.detach().float()
            whole, moved = ((T @ other if self.left else other @ T) for T in (whole, moved))
        size = float(whole.norm())
        return float(moved.norm()) / size if size > 0 else 0.0


def count(guarded: Sequence[Guarded], before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
    """Add the norms of gradients before and after their projection to what was blocked.

    In a few operations for all: one for each parameter would take longer than the projection.
    """
    for device in dict.fromkeys(g.parameter.device for g in guarded):
        on = [i for i, g in enumerate(guarded) if g.parameter.device == device]
        # An overflow of scaled fp16 gradients skips the step; it must not spoil the count.
        b, a = (
            torch.stack([norms[i] for i in on]).square().nan_to_num(0.0, 0.0, 0.0)
            for norms in (before, after)
        )
        for key, energy in (("total", b), ("blocked", b - a)):
            sums = []
            for i in on:
                if getattr(guarded[i], key) is None:
                    setattr(guarded[i], key, torch.zeros((), device=device))
                sums.append(getattr(guarded[i], key))
            torch._foreach_add_(sums, list(energy.unbind()))


def project(guarded: Sequence[Guarded], tensors: Sequence[Tensor], pin: bool = False) -> None:
    """Take each tensor off its parameter's basis in place, or back to where it was pinned."""
    for side in ("left", "right"):
        chosen = [i for i, g in enumerate(guarded) if g.trained.side == side]
        if chosen:
            gk.project_(
                [tensors[i] for i in chosen],
                [guarded[i].basis for i in chosen],
                [guarded[i].pinned for i in chosen] if pin else None,
                side=side,
            )
