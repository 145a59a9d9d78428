"""One trained parameter with the basis that it is kept off."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

import grasp_kernels as gk
from grasp.bases.spectrum import InputBasis
from grasp.guard.weights import Whole
from grasp.model import Trained
from grasp_kernels.matrices import in_vectors

SAVED = ("basis", "pinned", "average", "total", "blocked")
SHARE = 1e-7  # of a factor's start: what it holds along a basis counts as nothing below


class Pin(NamedTuple):
    """What a weight is set back to after a step: its coefficients `C` along a basis."""

    weight: Whole
    side: str
    basis: Tensor
    C: Tensor


@dataclass
class Guarded:
    """A trained parameter with what it is kept off.

    Pinned is ΔW, the change from where training began. Of a weight trained itself, and of a LoRA
    whose B began at 0, holding this parameter's coefficients along the basis does that. Of a LoRA
    that goes on from B₀ A₀ the other factor is held too, where this one's start carries it:

        Uᵀ B = Uᵀ B₀ and Qᵀ A = Qᵀ A₀, Q = orth(B₀ᵀ U)      ⇒  Uᵀ (B A − B₀ A₀) = 0
        A V = A₀ V and B R = B₀ R,    R = orth(A₀ V)         ⇒  (B A − B₀ A₀) V = 0
    """

    trained: Trained
    weight: Whole
    partner: Whole | None  # the other factor of a LoRA
    basis: Tensor  # [d_out, k], or [d_in, k] of inputs
    pinned: Tensor  # C: [k, n] on the left side, [n, k] on the right
    average: Tensor | None = None  # of the drift gradient
    total: Tensor | None = None  # Σ ‖G‖², and what of it was blocked, 0-d fp64 on the CPU
    blocked: Tensor | None = None
    share: float | None = None  # of inputs' energy on held-out prompts, that the basis holds

    @classmethod
    def of(cls, trained: Trained, weight: Whole, partner: Whole | None, basis: Tensor) -> "Guarded":
        """Pinned to what the parameter did along the basis when training began."""
        self = cls(trained, weight, partner, basis.to(trained.parameter.device), torch.empty(0))
        self.pinned = self.coefficients(weight.start())
        return self

    @property
    def name(self) -> str:
        return self.trained.name

    @property
    def parameter(self) -> nn.Parameter:
        return self.trained.parameter

    @property
    def left(self) -> bool:
        return self.trained.side == "left"

    def saved(self) -> dict[str, Tensor]:
        """What a resumed run must not make anew, by `SAVED` key."""
        return {key: t for key in SAVED if (t := getattr(self, key)) is not None}

    def restore(self, saved: dict[str, Tensor]) -> None:
        """Take back what `saved` gave."""
        for key in SAVED:
            t = saved.get(key)
            on = "cpu" if key in ("total", "blocked") else self.parameter.device
            setattr(self, key, None if t is None else t.to(on))

    def coefficients(self, T: Tensor, basis: Tensor | None = None) -> Tensor:
        """Uᵀ T, or T U on the right side, of the weight as a whole; `T` as `local` is."""
        U = self.weight.part(self.basis if basis is None else basis)
        T = T.detach().to(torch.promote_types(T.dtype, torch.float32))
        (C,) = self.weight.summed([U.mT.to(T) @ T if self.left else T @ U.to(T)])
        return C

    def take(self, basis: InputBasis) -> None:
        """Be kept off what its map takes in."""
        self.widen(basis.V.to(self.parameter.device))
        self.share = basis.share

    def start(self) -> str:
        """What a kept finding depends on besides the model and its prompts: nothing."""
        return ""

    def found(self) -> tuple[dict, dict[str, Tensor]]:
        """What `take` came to, as facts and tensors."""
        return {"share": self.share}, {"V": self.basis}

    def take_up(self, facts: dict, tensors: dict[str, Tensor]) -> None:
        """Come to what `found` gave; `V` is shared by all that it is handed to."""
        self.widen(tensors["V"].to(self.parameter.device))
        self.share = facts["share"]

    def widen(self, basis: Tensor) -> None:
        """Take a basis whose leading columns are the present one's."""
        added = basis[:, self.basis.shape[1] :]
        self.basis = in_vectors(basis)
        C = self.coefficients(self.weight.start(), added)
        self.pinned = torch.cat([self.pinned, C], 0 if self.left else -1)

    def pins(self) -> list[Pin]:
        """What holds ΔW: this parameter's pin, and the other factor's where the start asks it."""
        if not self.basis.shape[1]:
            return []
        own = Pin(self.weight, self.trained.side, self.basis, self.pinned)
        if self.partner is None or self.partner.kept is None:
            return [own]
        carried = self.pinned.mT if self.left else self.pinned  # [r, k]
        U, S, _ = torch.linalg.svd(carried.double(), full_matrices=False)
        Q = U[:, S > SHARE * float(self.weight.start().double().norm())].float()
        T = self.partner.start().float()
        across = ("left", Q, Q.mT @ T) if self.left else ("right", Q, T @ Q)
        pins = [own, Pin(self.partner, *across)] if Q.shape[1] else [own]
        return [pin for pin in pins if pin.weight.trains]  # others stay as they began

    def change(self) -> "Change":
        """How far the weight is from where it began, and how much of that lies in the basis."""
        U = _exact(self.basis)
        if self.partner is None:
            now, start = _exact(self.weight.local), _exact(self.weight.start())
            D = now - start
            inside = U.mT @ D if self.left else D @ U
            return Change(float(D.norm()), float(inside.norm()), float(start.norm()))
        B, A = (self.weight, self.partner) if self.left else (self.partner, self.weight)
        B1, A1 = _exact(B.local), _exact(A.local)
        if B.kept is None:
            size = _product_norm(B1, A1)
            inside = float((U.mT @ B1 @ A1).norm()) if self.left else _product_norm(B1, A1 @ U)
            return Change(size, inside, 0.0)
        B0, A0 = _exact(B.start()), _exact(A.start())
        D = B1 @ A1 - B0 @ A0
        inside = U.mT @ D if self.left else D @ U
        factors = float(B0.norm() * A0.norm()) / len(A0) ** 0.5
        return Change(float(D.norm()), float(inside.norm()), max(_product_norm(B0, A0), factors))

    def leak(self, change: "Change | None" = None) -> dict[str, float]:
        """Its rank, the share of the gradient's energy that was blocked, and what got through."""
        blocked = 0.0
        if self.total is not None and float(self.total) > 0:
            blocked = max(0.0, float(self.blocked / self.total))
        change = change or self.change()
        return {"rank": self.basis.shape[1], "blocked": blocked, "through": change.through}


class Change(NamedTuple):
    """Frobenius norms of ΔW, of what of it lies in a basis, and of what training began with.

    Of a LoRA B₀ A₀ that is ‖B₀‖ ‖A₀‖ / √r if that is more: factors are rounded, not their product.
    """

    size: float
    inside: float
    start: float

    @property
    def through(self) -> float:
        return self.inside / self.size if self.size else self.inside


def _exact(T: Tensor) -> Tensor:
    T = T.detach()
    return (T.cpu() if T.device.type == "mps" else T).double()  # MPS has no fp64


def _product_norm(B: Tensor, A: Tensor) -> float:
    """‖B A‖ without B A: of `[d_out, r]` and `[r, d_in]`."""
    return float(((B.mT @ B) * (A @ A.mT)).sum().clamp_min(0).sqrt())


class Projections:
    """Projects guarded parameters, or their gradients, in a launch for each side.

    What it lays out holds until a basis grows; make a new one then.

    Args:
        guarded: those whose bases are not empty.
        gradients: project gradients, and count what was blocked; else the parameters themselves,
            back to where they were pinned.
    """

    def __init__(self, guarded: Sequence[Guarded], gradients: bool):
        groups: dict[tuple, list[tuple[Guarded, Pin]]] = {}
        for g in guarded:  # a weight that is kept off outputs and inputs is listed for each
            pins = [p for p in g.pins() if p.weight is g.weight or not gradients]
            for n, pin in enumerate(pins):
                groups.setdefault((n, g.trained.holds, pin.side), []).append((g, pin))
        self.gradients = gradients
        self.projectors = [
            (
                gk.Projector(
                    [pin.weight.local for _, pin in group],
                    [pin.weight.part(pin.basis) for _, pin in group],
                    None if gradients else [pin.C for _, pin in group],
                    side=side,
                    measure=gradients,
                ),
                group,
            )
            for (_, _, side), group in groups.items()
        ]

    def __call__(self) -> None:
        for projector, group in self.projectors:
            if self.gradients:
                projector([g.weight.gradient for g, _ in group])
            elif any(pin.weight.is_part for _, pin in group):
                projector([pin.weight.local for _, pin in group])
            else:
                projector()

    def count(self) -> None:
        """Add what was blocked since the last time to each parameter's count."""
        for projector, group in self.projectors if self.gradients else ():
            for (g, _), (total, blocked) in zip(group, projector.energies(), strict=True):
                g.total = total if g.total is None else g.total + total
                g.blocked = blocked if g.blocked is None else g.blocked + blocked


def averaged(guarded: Sequence[Guarded], shown: Callable[[Tensor], list[Tensor]]) -> list:
    """Projectors of what stands beside the parameters and is held as they are.

    Args:
        shown: of a parameter, the tensors of its shape that an optimizer keeps as weights.
    """
    groups: dict[tuple, list[tuple[Tensor, Pin]]] = {}
    for g in guarded:
        for n, pin in enumerate(g.pins()):
            for T in shown(pin.weight.trained.parameter):
                part = pin.weight.trained.of(T)
                groups.setdefault((n, g.trained.holds, pin.side), []).append((part, pin))
    return [
        gk.Projector(
            [T for T, _ in group],
            [pin.weight.part(pin.basis) for _, pin in group],
            [pin.C for _, pin in group],
            side=side,
        )
        for (_, _, side), group in groups.items()
    ]
