"""One trained parameter with the basis that it is kept off."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import grasp_kernels as gk
from grasp.guard.weights import Whole
from grasp.model import Trained

SAVED = ("basis", "pinned", "average", "total", "blocked")


@dataclass
class Guarded:
    """A trained parameter with what it is kept off."""

    trained: Trained
    weight: Whole
    basis: Tensor  # [d_out, k], or [d_in, k] of inputs
    pinned: Tensor  # C: [k, n] on the left side, [n, k] on the right
    average: Tensor | None = None  # of the drift gradient
    total: Tensor | None = None  # Σ ‖G‖², and what of it was blocked, 0-d fp64 on the CPU
    blocked: Tensor | None = None

    @classmethod
    def of(cls, trained: Trained, basis: Tensor) -> "Guarded":
        """Pinned to what the parameter does along the basis now.

        A LoRA A starts random and goes to 0 there, which changes no output while B is 0.
        """
        self = cls(trained, Whole(trained), basis.to(trained.parameter.device), torch.empty(0))
        self.pinned = self.coefficients(self.weight.local)
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
                on = "cpu" if key in ("total", "blocked") else self.parameter.device
                setattr(self, key, None if t is None else t.to(on))

    @property
    def left(self) -> bool:
        return self.trained.side == "left"

    def coefficients(self, T: Tensor, basis: Tensor | None = None) -> Tensor:
        """Uᵀ T, or T U on the right side, of the weight as a whole; `T` as `local` is."""
        U = self.weight.part(self.basis if basis is None else basis)
        T = T.detach().to(torch.promote_types(T.dtype, torch.float32))
        (C,) = self.weight.summed([U.mT.to(T) @ T if self.left else T @ U.to(T)])
        return C

    def widen(self, basis: Tensor) -> None:
        """Take a basis whose leading columns are the present one's.

        Along a new direction it goes back to where it started, as far as that is known.
        """
        added = basis[:, self.basis.shape[1] :]
        self.basis = basis.contiguous()
        C = self.coefficients(self.weight.start(), added)
        self.pinned = torch.cat([self.pinned, C], 0 if self.left else -1)

    def leak(self) -> dict[str, float]:
        """Its rank, the share of the gradient's energy that was blocked, and what got through."""
        blocked = 0.0
        if self.total is not None and float(self.total) > 0:
            blocked = max(0.0, float(self.blocked / self.total))
        return {"rank": self.basis.shape[1], "blocked": blocked, "through": self._through()}

    def _through(self) -> float:
        moved = self.coefficients(self.weight.local) - self.pinned
        whole = self.weight.local.detach().float()
        if self.trained.partner is not None:
            other = self.trained.partner.detach().float()
            whole, moved = ((T @ other if self.left else other @ T) for T in (whole, moved))
        size = float(whole.norm())
        return float(moved.norm()) / size if size > 0 else 0.0


class Projections:
    """Projects guarded parameters, or their gradients, in a launch for each side.

    What it lays out holds until a basis grows; make a new one then.

    Args:
        guarded: those whose bases are not empty.
        gradients: project gradients, and count what was blocked; else the parameters themselves,
            back to where they were pinned.
    """

    def __init__(self, guarded: Sequence[Guarded], gradients: bool):
        groups: dict[tuple, list[Guarded]] = {}
        for g in guarded:  # a weight that is kept off outputs and inputs is listed for each
            groups.setdefault((g.trained.holds, g.trained.side), []).append(g)
        self.gradients = gradients
        self.projectors = [
            (
                gk.Projector(
                    [g.weight.local for g in group],
                    [g.weight.part(g.basis) for g in group],
                    None if gradients else [g.pinned for g in group],
                    side=side,
                    measure=gradients,
                ),
                group,
            )
            for (_, side), group in groups.items()
        ]

    def __call__(self) -> None:
        for projector, group in self.projectors:
            projector([g.weight.gradient for g in group] if self.gradients else None)

    def count(self) -> None:
        """Add what was blocked since the last time to each parameter's count."""
        for projector, group in self.projectors if self.gradients else ():
            for g, (total, blocked) in zip(group, projector.energies(), strict=True):
                g.total = total if g.total is None else g.total + total
                g.blocked = blocked if g.blocked is None else g.blocked + blocked
