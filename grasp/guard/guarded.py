"""One trained parameter with the basis that it is kept off."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

import grasp_kernels as gk
from grasp.bases.spectrum import InputBasis, complement
from grasp.guard.inside import Inside
from grasp.guard.weights import Whole, exact
from grasp.model import Trained
from grasp_kernels.arguments import Side
from grasp_kernels.matrices import in_vectors

SAVED = ("basis", "pinned", "average", "total", "blocked")
SHARE = 1e-7  # of a factor's start: what it holds along a basis counts as nothing below
ROUNDED = torch.finfo(torch.bfloat16).eps ** 2  # of a projected gradient's energy, still in a basis


class Pin(NamedTuple):
    """What a weight is set back to after a step: its coefficients `C` along a basis."""

    weight: Whole
    side: Side
    basis: Tensor
    C: Tensor
    inside: bool = False  # the basis is of what is left, in which the weight is kept


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
    basis: Tensor  # [d_out, k], or [d_in, k] of inputs; W [d_in, d_in − k] if `inside`
    pinned: Tensor  # C: [k, n] on the left side, [n, k] on the right, as `coefficients` gives it
    average: Tensor | None = None  # of the drift gradient, where `weight.local` lies
    total: Tensor | None = None  # Σ ‖G‖², and what of it was blocked, 0-d fp64 on the CPU
    blocked: Tensor | None = None
    share: float | None = None  # of inputs' energy on held-out prompts, that is blocked
    inside: bool = False
    """Whether the basis is W, what is left, which takes less than what is blocked: A ← A W Wᵀ."""

    @classmethod
    def of(cls, trained: Trained, weight: Whole, partner: Whole | None, basis: Tensor) -> "Guarded":
        """Pinned to what the parameter did along the basis when training began."""
        self = cls(trained, weight, partner, basis.to(weight.local.device), torch.empty(0))
        self.pinned = self.coefficients(weight.start())
        return self

    @property
    def name(self) -> str:
        return self.trained.name

    @property
    def parameter(self) -> nn.Parameter:
        return self.trained.parameter

    @property
    def device(self) -> torch.device:
        """Where what this process holds of the weight lies."""
        return self.weight.local.device

    @property
    def left(self) -> bool:
        return self.trained.side == "left"

    def saved(self) -> dict[str, Tensor]:
        """What a resumed run must not make anew, by `SAVED` key, of the weight as a whole."""
        found = {key: t for key in SAVED if (t := getattr(self, key)) is not None}
        found["pinned"] = self.weight.whole(self.pinned, self.trained.side)
        return found if self.average is None else found | {"average": self.drift()}

    def restore(self, saved: dict[str, Tensor]) -> None:
        """Take back what `saved` gave."""
        for key in SAVED:
            t = saved.get(key)
            on = "cpu" if key in ("total", "blocked") else self.device
            setattr(self, key, None if t is None else t.to(on))
        self.pinned = self.weight.own(self.pinned, self.trained.side)
        self.average = None if self.average is None else self.weight.own(self.average)

    def coefficients(self, T: Tensor, basis: Tensor | None = None) -> Tensor:
        """Uᵀ T, or T U on the right side, where `T` lies as `local` does.

        Of the weight as a whole where the basis multiplies what is split, else of this part.
        """
        basis = self.basis if basis is None else basis
        return _coefficients(self.weight, T, basis, self.trained.side)

    def drift(self) -> Tensor | None:
        """The averaged drift gradient of the weight as a whole."""
        return None if self.average is None else self.weight.whole(self.average)

    def laid(self, G: Tensor) -> Tensor:
        """Of a gradient as `sharding.gradients` gives it what lies as `weight.local` does."""
        return self.weight.laid(G)

    def take(self, basis: InputBasis) -> None:
        """Be kept off what its map takes in."""
        inside = basis.complement and self.may_be_inside
        self.hold(basis.directions if inside else basis.V, inside)
        self.share = basis.share

    def hold(self, basis: Tensor, inside: bool) -> None:
        """Take a basis of inputs in place of the present one: V, or W if it is to be `inside`."""
        self.basis = self.basis[:, :0]
        self.pinned = self.coefficients(self.weight.start())
        self.inside = inside
        self.widen(basis)

    @property
    def may_be_inside(self) -> bool:
        """Whether W will do: nothing is pinned of a LoRA whose B began at 0."""
        return self.partner is not None and self.weight.kept is None

    @property
    def blocked_basis(self) -> Tensor:
        """What it is kept off, `[d, k]`."""
        return complement(self.basis) if self.inside else self.basis

    def start(self) -> str:
        """What a kept finding depends on besides the model and its prompts: nothing."""
        return ""

    def found(self) -> tuple[dict, dict[str, Tensor]]:
        """What `take` came to, as facts and tensors."""
        facts = {"share": self.share, "inside": self.inside}
        return facts, {"W" if self.inside else "V": self.basis}

    def take_up(self, facts: dict, tensors: dict[str, Tensor]) -> None:
        """Come to what `found` gave; a basis is shared by all that it is handed to."""
        self.hold(tensors["W" if facts["inside"] else "V"], facts["inside"])
        self.share = facts["share"]

    def widen(self, basis: Tensor) -> None:
        """Take a basis whose leading columns are the present one's."""
        basis = basis.to(self.device)
        added = basis[:, self.basis.shape[1] :]
        self.basis = in_vectors(basis)
        C = self.coefficients(self.weight.start(), added)
        self.pinned = torch.cat([self.pinned, C], 0 if self.left else -1)

    def pins(self) -> list[Pin]:
        """What holds ΔW: this parameter's pin, and the other factor's where the start asks it."""
        if not self.basis.shape[1]:
            return []
        own = Pin(self.weight, self.trained.side, self.basis, self.pinned, self.inside)
        if self.partner is None or self.partner.kept is None:
            return [own]
        side, start = self.trained.side, exact(self.weight.start())
        # Not `pinned`, as fp32 has it: a direction that carries little may be all of the other's.
        carried = exact(self.weight.whole(self.coefficients(start), side))
        U, S, _ = torch.linalg.svd(carried.mT if self.left else carried, full_matrices=False)
        Q = U[:, S > SHARE * float(self.weight.whole(start).norm())].to(self.device, torch.float32)
        pins = [own]
        if Q.shape[1]:
            C = _coefficients(self.partner, self.partner.start(), Q, side)
            pins.append(Pin(self.partner, side, Q, C))
        return [pin for pin in pins if pin.weight.trains]  # others stay as they began

    def change(self) -> "Change":
        """How far the weight is from where it began, and how much of that lies in the basis."""
        U = exact(self.basis)
        if self.partner is None:
            now, start = _now(self.weight), _began(self.weight)
            D = now - start
            inside = U.mT @ D if self.left else D @ U
            return Change(float(D.norm()), float(inside.norm()), float(start.norm()))
        B, A = (self.weight, self.partner) if self.left else (self.partner, self.weight)
        B1, A1 = _now(B), _now(A)
        if B.kept is None:
            size = _product_norm(B1, A1)
            if self.left:
                return Change(size, float((U.mT @ B1 @ A1).norm()), 0.0)
            along = A1 if self.inside else A1 @ U
            for _ in range(2 if self.inside else 0):  # W is orthonormal to rounding alone
                along = along - along @ U @ U.mT  # A V Vᵀ in the end
            return Change(size, _product_norm(B1, along), 0.0)
        B0, A0 = _began(B), _began(A)
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
        d, k = self.basis.shape
        rank = d - k if self.inside else k
        return {"rank": rank, "blocked": blocked, "through": change.through}


def blocked_bases(guarded: Sequence[Guarded]) -> dict[str, Tensor]:
    """What each is kept off, by name; empty ones left out. One that several share is made once."""
    held = [g for g in guarded if g.basis.shape[1]]
    first = {id(g.basis): g for g in reversed(held)}
    made = {key: g.blocked_basis for key, g in first.items()}
    return {g.name: made[id(g.basis)] for g in held}


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


def _coefficients(weight: Whole, T: Tensor, basis: Tensor, side: Side) -> Tensor:
    (C,) = weight.summed([weight.times(T, basis, side)], side)
    return C


def _now(weight: Whole) -> Tensor:
    return exact(weight.now())


def _began(weight: Whole) -> Tensor:
    return exact(weight.whole(weight.start()))


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
        again: these may have been projected before, and are counted where they were not.
    """

    def __init__(self, guarded: Sequence[Guarded], gradients: bool, again: bool = False):
        groups: dict[tuple, list[tuple[Guarded, Pin]]] = {}
        for g in guarded:  # a weight that is kept off outputs and inputs is listed for each
            pins = [p for p in g.pins() if p.weight is g.weight or not gradients]
            for n, pin in enumerate(pins):
                key = n, g.trained.holds, pin.side, pin.weight.kind(pin.side), pin.inside
                groups.setdefault(key, []).append((g, pin))
        self.gradients, self.again = gradients, again
        self.projectors = [
            (_projector([pin for _, pin in group], None, gradients), group)
            for group in groups.values()
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
                if self.again and float(blocked) <= ROUNDED * float(total):
                    continue
                g.total = total if g.total is None else g.total + total
                g.blocked = blocked if g.blocked is None else g.blocked + blocked


def averaged(guarded: Sequence[Guarded], shown: Callable[[Tensor], list[Tensor]]) -> list:
    """Projectors of what stands beside the parameters and is held as they are.

    Args:
        shown: of what an optimizer holds, the tensors of its shape that it keeps as weights.
    """
    groups: dict[tuple, list[tuple[Tensor, Pin]]] = {}
    for g in guarded:
        for n, pin in enumerate(g.pins()):
            for T in shown(pin.weight.stepped):
                key = n, g.trained.holds, pin.side, pin.weight.kind(pin.side), pin.inside
                groups.setdefault(key, []).append((pin.weight.trained.of(T), pin))
    return [
        _projector([pin for _, pin in group], [T for T, _ in group]) for group in groups.values()
    ]


def _projector(
    pins: Sequence[Pin], tensors: Sequence[Tensor] | None, gradients: bool = False
) -> gk.Projector | Inside:
    """Of pins on one side and weights of one kind; of gradients and in W nothing is pinned."""
    weights, inside = [pin.weight for pin in pins], pins[0].inside
    off = weights[0].projector(
        weights,
        tensors,
        [pin.basis for pin in pins],
        None if gradients or inside else [pin.C for pin in pins],
        pins[0].side,
        measure=gradients,
    )
    return Inside(off, weights, tensors) if inside else off
