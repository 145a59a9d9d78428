"""Which directions hold a share of what a map takes in, judged on prompts that were held out.

    C = Σ x̂ x̂ᵀ [d, d]      x̂ of length 1, on the prompts that are looked at
    V [d, k]               the leading eigenvectors of C, k the least with
                           Σ ‖x̂ᵀ V‖² ≥ energy · Σ ‖x̂‖²   over held-out prompts
    W [d, d − k]           the others: (I − V Vᵀ) = W Wᵀ

k is at most the rank of C, as further directions would be noise, and leaves a sixteenth of the
space to learn in. Of the widest inputs, whose eigenvectors would take minutes, W is a subspace in
which C is small, a quarter of the space at most: V holds the share that is asked for, or more.
So it is where few directions are to be left, of inputs that are not narrow.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from grasp_kernels.autocast import in_bf16
from grasp_kernels.matrices import in_vectors

HELD = 4096  # inputs of held-out prompts that are kept to judge by
TOGETHER = 1024  # inputs that are added up at once
WIDEST = 4096  # d up to which all eigenvectors are found; above it three quarters or more is V
NARROW = 1024  # d up to which they are found where few directions are to be left
ROOM = 16  # of d one part is always left to learn in
TINY = torch.finfo(torch.float32).tiny
NOISE = 1e-6  # of the largest eigenvalue: what is below is rounding
PANELS = 8  # of C, one at a time: it is symmetric, so what is above them is left out


class Moments:
    """The inputs of one map: their second moments, and held-out ones as they are.

    Args:
        width: d.
        device: where they are added up, fp32.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu"):
        self._C = torch.zeros(width, width, device=device)
        self.count = 0
        self._waiting: list[Tensor] = []
        self._held: list[Tensor] = []

    def add(self, x: Tensor, held: bool) -> None:
        """Take in rows `[tokens, d]` of any dtype; of 16 bits they keep as many at length 1."""
        dtype = x.dtype if x.dtype.itemsize == 2 else torch.float32
        for part in x.split(TOGETHER):
            part = torch.nn.functional.normalize(part.to(self._C.device).float(), dim=1).to(dtype)
            if held:
                self._held.append(part[: HELD - sum(map(len, self._held))])
                continue
            self.count += len(part)
            self._waiting.append(part)
            if sum(map(len, self._waiting)) >= TOGETHER:
                self._add_up()

    @property
    def C(self) -> Tensor:
        """Σ x̂ x̂ᵀ on and below its diagonal; what is above is of no meaning."""
        self._add_up()
        return self._C

    @property
    def total(self) -> float | None:
        """Σ ‖x̂‖² of held-out inputs; None if there are none."""
        return sum(float(x.float().square().sum()) for x in self._held) or None

    def along(self, D: Tensor) -> Tensor:
        """Σ (x̂ᵀ D)² `[m]` of held-out inputs, for the columns of `D [d, m]`."""
        zero = D.new_zeros(D.shape[1])
        return sum(((x.to(D.device).float() @ D).square().sum(0) for x in self._held), zero)

    def _add_up(self) -> None:
        if not self._waiting:
            return
        x = torch.cat(self._waiting)
        self._waiting = []
        with in_bf16() if x.dtype == torch.bfloat16 else nullcontext():
            x = x.float()
            for low, high in _panels(len(self._C)):
                self._C[low:, low:high].addmm_(x[:, low:].mT, x[:, low:high])


def _panels(d: int) -> list[tuple[int, int]]:
    bounds = [d * i // PANELS for i in range(PANELS + 1)]
    return [(low, high) for low, high in pairwise(bounds) if low < high]


@dataclass(frozen=True)
class InputBasis:
    """What is blocked of a map's inputs: `V`, or `W`, the rest, where that is smaller."""

    directions: Tensor  # [d, k] or [d, d − k], fp32, orthonormal
    complement: bool
    share: float
    """Of the energy of held-out inputs that V holds, or of those looked at where none are held."""
    sample: float
    """Of the energy of the inputs that V was found on."""
    tokens: int
    C: Tensor
    """Their second moments `[d, d]`, on and below the diagonal."""

    @property
    def rank(self) -> int:
        d, n = self.directions.shape
        return d - n if self.complement else n

    @cached_property
    def V(self) -> Tensor:
        """`[d, k]`; all that are kept off it share one."""
        return complement(self.directions) if self.complement else self.directions

    def inside(self, T: Tensor) -> Tensor:
        """T V Vᵀ of `T [n, d]`, in T's dtype."""
        D = self.directions.to(T.device).to(T.dtype)  # in this order: MPS has no fp64
        if not self.complement:
            return T @ D @ D.mT
        for _ in range(2):  # W is orthonormal to rounding alone
            T = T - T @ D @ D.mT
        return T


def complement(basis: Tensor) -> Tensor:
    """An orthonormal basis `[d, d − m]` of what an orthonormal one `[d, m]` leaves."""
    whole = torch.linalg.qr(basis, mode="complete").Q
    return in_vectors(whole[:, basis.shape[1] :].contiguous())


def choose(
    moments: Moments,
    energy: float,
    rank: int | None = None,
    bottom: bool = False,
    free: int | None = None,
) -> InputBasis:
    """The basis of a map's inputs.

    Args:
        energy: share of held-out inputs' energy that V is to hold, above 0 and below 1.
        rank: largest k; None sets no limit.
        bottom: as many directions, but those of the least energy: a control.
        free: largest d − k: where more would be left, so many are drawn at random among them.
    """
    C, d = moments.C, len(moments.C)
    C = C.cpu() if C.device.type == "mps" else C  # which has no eigh
    found = None
    if rank is None and not bottom:
        if free is not None and d > max(NARROW, free):
            found = _free(C, moments, energy, free)
        if found is None and d > WIDEST:
            found = _others(C, moments, energy)
    found = found or _leading(C, moments, energy, rank, bottom)
    if free is not None and free < found.left:
        found = _few(C, moments, found, free)
    sample = found.inside / max(float(C.diagonal().sum()), TINY)
    share = found.along / moments.total if moments.total else sample
    if found.others:
        share, sample = 1 - share, 1 - sample
    D = in_vectors(found.D).to(moments.C.device)
    return InputBasis(D, found.others, share, sample, moments.count, moments.C)


class _Found(NamedTuple):
    """V, or W if it is the `others`, with what it holds."""

    D: Tensor  # [d, k] or [d, d − k]
    others: bool
    inside: float  # tr(Dᵀ C D)
    along: float  # of held-out inputs, or as `inside` if there are none

    @property
    def left(self) -> int:
        """d − k"""
        d, n = self.D.shape
        return n if self.others else d - n


def _few(C: Tensor, moments: Moments, found: _Found, free: int) -> _Found:
    """W `[d, free]`: random directions off V, or of those that are left."""
    D = found.D
    n = D.shape[1] if found.others else len(C)
    drawn = torch.randn(n, free, generator=torch.Generator().manual_seed(0)).to(C)
    if found.others:
        drawn = D @ drawn
    else:
        for _ in range(2):
            drawn -= D @ (D.mT @ drawn)
    W = torch.linalg.qr(drawn.double()).Q.to(C)  # once more at each step: A W Wᵀ is to keep ‖A‖
    lower = C.tril()
    inside = 2 * (W * (lower @ W)).sum() - (C.diagonal()[:, None] * W.square()).sum()
    return _Found(W, True, float(inside), float(moments.along(W).sum()))


def _leading(C: Tensor, moments: Moments, energy: float, rank: int | None, bottom: bool) -> _Found:
    """V by way of all eigenvectors, or W where that is smaller."""
    values, vectors = torch.linalg.eigh(C)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    d = len(C)
    each = moments.along(vectors) if moments.total else values
    total = float(each.sum())
    k = int((each.double().cumsum(0) < energy * total).sum()) + 1
    most = int((values > NOISE * values[0]).sum())
    k = min(k, most, d - -(-d // ROOM), d if rank is None else rank)
    others = d - k < k
    m = d - k if others else k
    chosen = slice(d - m, None) if bottom != others else slice(m)
    D = torch.linalg.qr(vectors[:, chosen]).Q
    return _Found(D, others, float(values[chosen].sum()), float(each[chosen].sum()))


def _others(C: Tensor, moments: Moments, energy: float) -> _Found | None:
    """W, a quarter of the space at most; None if so few inputs leave more empty.

        (C + ε) Y = Ω [d, d/4],    Y = W R    ⇒    C W = (Ω − ε Y) R⁻¹

    A random subspace goes through C's inverse, so that W is where C is small; any of its columns
    hold about as much of what is held out. ε, a thousandth of the mean eigenvalue, keeps it from
    telling apart what is nearly empty. Source: Halko et al., arXiv:0909.4061, 4.5.
    """
    d, count = len(C), moments.count
    most, ridge = d // 4, 1e-3 * float(C.diagonal().mean())
    if d - count > most or (found := _through_inverse(C, ridge, most)) is None:
        return None
    W, inside = found
    each = moments.along(W) if moments.total else inside
    total = moments.total or float(C.diagonal().sum())
    few = int((each.double().cumsum(0) <= (1 - energy) * total).sum())
    m = max(d - count, -(-d // ROOM), few)
    return _Found(W[:, :m].contiguous(), True, float(inside[:m].sum()), float(each[:m].sum()))


def _free(C: Tensor, moments: Moments, energy: float, free: int) -> _Found | None:
    """W `[d, free]`; None if V would hold less than it is to.

        (C + ε) Y = Ω [d, free],    ε = (1 − energy) / 3 · tr C / d

    A third of the mean of what is left over, if it were of all directions: those of a smaller
    eigenvalue are drawn alike.
    """
    ridge = (1 - energy) / 3 * float(C.diagonal().mean())
    if (found := _through_inverse(C, ridge, free)) is None:
        return None
    W, each = found
    along = float((moments.along(W) if moments.total else each).sum())
    total = moments.total or float(C.diagonal().sum())
    enough = along <= (1 - energy) * total
    return _Found(W, True, float(each.sum()), along) if enough else None


def _through_inverse(C: Tensor, ridge: float, count: int) -> tuple[Tensor, Tensor] | None:
    """W = orth((C + ε)⁻¹ Ω) of a random `Ω [d, count]`, and diag(Wᵀ C W); None if that fails.

    Of C, what is on and below the diagonal is read, and kept.
    """
    if (solve := _factored(C, ridge)) is None:
        return None
    drawn = torch.randn(len(C), count, generator=torch.Generator().manual_seed(0)).to(C)
    W, R = torch.linalg.qr(solve(drawn))
    through = torch.linalg.solve_triangular(R, drawn, upper=True, left=False)  # (C + ε) W
    return W, ((W * through).sum(0) - ridge).clamp_min(0)


def _factored(C: Tensor, ridge: float) -> Callable[[Tensor], Tensor] | None:
    """Solves (C + ε) X = B; None if C + ε is not positive.

        C + ε = Uᵀ U,    U_ii = chol(S_ii),  U_ij = U_ii⁻ᵀ S_ij,    S = C + ε − Σ_{h<i} U_hᵀ U_h

    U lies above C's diagonal, where C is of no meaning, since a matrix of its own would be as large
    as C: 3 GB for inputs of 28,000 numbers. Its blocks on the diagonal alone are beside it.
    """
    panels = _panels(len(C))
    triangular = torch.linalg.solve_triangular
    corners: list[Tensor] = []
    for low, high in panels:
        S = C[low:, low:high].mT.clone()
        S[:, : high - low].diagonal().add_(ridge)
        S.addmm_(C[:low, low:high].mT, C[:low, low:], alpha=-1)
        corner, failed = torch.linalg.cholesky_ex(S[:, : high - low], upper=True)
        if bool(failed):
            return None
        corners.append(corner)
        C[low:high, high:] = triangular(corner.mT, S[:, high - low :], upper=False)

    def solve(B: Tensor) -> Tensor:
        X = B.clone()
        for (low, high), corner in zip(panels, corners, strict=True):
            X[low:high] -= C[:low, low:high].mT @ X[:low]
            X[low:high] = triangular(corner.mT, X[low:high], upper=False)
        for (low, high), corner in zip(reversed(panels), reversed(corners), strict=True):
            X[low:high] -= C[low:high, high:] @ X[high:]
            X[low:high] = triangular(corner, X[low:high], upper=True)
        return X

    return solve
