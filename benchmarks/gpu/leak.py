"""What gets through where none, half and nearly all of `T` lies in the basis, against PyTorch."""

from functools import cache
from itertools import product
from typing import NamedTuple

import torch

import grasp_kernels as gk
from grasp_kernels.testing import assert_no_worse, orthonormal, project_fp64, project_torch

from .inside import Inside

INSIDE = (0.0, 0.5, 0.97)  # share of T's energy that lies in the basis
SHAPES = ((512, 4096, 16), (48, 4096, 1640), (64, 14336, 64), (333, 1000, 7))  # n, d, k
TINY = ((9, 40, 7),)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Case(NamedTuple):
    shape: tuple[int, int, int]
    dtype: torch.dtype
    side: str
    share: float

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.side} n, d, k {self.shape} {dtype}, {self.share:.0%} in the basis"


def measure(inside: Inside) -> None:
    shapes = TINY if inside.tiny else SHAPES
    cases = [Case(*chosen) for chosen in product(shapes, DTYPES, ("right", "left"), INSIDE)]
    inside.each(cases, lambda case: _case(inside, case))


def _case(inside: Inside, case: Case) -> None:
    n, d, k = case.shape
    U = _basis(d, k, inside.device)
    T = _mixed(n, U, case.share)
    T = (T.mT if case.side == "left" else T).to(case.dtype).contiguous()
    exact = project_fp64(T, U, None, case.side)
    theirs = project_torch(T, U, None, case.side)
    for name in inside.backends:
        with gk.backend(name):
            try:
                ours = gk.project(T, U, side=case.side)
            except RuntimeError as reason:
                if "can't run" not in str(reason):
                    raise
                continue
        ours_off, theirs_off = _off(ours, exact), _off(theirs, exact)
        inside.check(
            _passes(ours, theirs, exact, T),
            case=str(case),
            backend=name,
            side=case.side,
            shape=list(T.shape),
            dtype=str(case.dtype).removeprefix("torch."),
            k=k,
            in_basis=case.share,
            leak=_leak(ours, U, case.side),
            leak_of_pytorch=_leak(theirs, U, case.side),
            error_over_pytorch=float(ours_off / theirs_off),
        )


@cache
def _basis(d: int, k: int, device: torch.device) -> torch.Tensor:
    if k <= 512:
        return orthonormal(d, k).to(device)
    return torch.linalg.qr(torch.randn(d, k, device=device, dtype=torch.float64)).Q.float()


def _mixed(n: int, U: torch.Tensor, share: float) -> torch.Tensor:
    """`[n, d]` fp64, elements about 1, of whose energy `share` lies in the basis."""
    d, k = U.shape
    V, X = U.double(), torch.randn(n, d, device=U.device, dtype=torch.float64)
    X = X - (X @ V) @ V.mT
    Y = torch.randn(n, k, device=U.device, dtype=torch.float64) @ V.mT
    mixed = (1 - share) ** 0.5 * X / X.norm() + share**0.5 * Y / Y.norm()
    return mixed * (n * d) ** 0.5


def _off(result: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    return (result.double() - exact).abs().max()


def _leak(result: torch.Tensor, U: torch.Tensor, side: str) -> float:
    """‖P(T) V‖ / ‖P(T)‖, in fp64."""
    X, V = result.double(), U.double()
    return float((V.mT @ X if side == "left" else X @ V).norm() / X.norm())


def _passes(ours, theirs, exact, T) -> bool:
    try:
        assert_no_worse(ours, theirs, exact, T)
    except AssertionError:
        return False
    return True
