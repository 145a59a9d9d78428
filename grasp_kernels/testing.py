"""What tests and benchmarks share: errors against fp64, made inputs, a training loop that leaks."""

import math

import torch
from torch import Tensor


def orthonormal(d: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """A random basis `[d, k]`, orthonormal to fp64 before it is rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(d, k, dtype=torch.float64, generator=generator)).Q
    return Q.to(dtype)


def project_fp64(T: Tensor, basis: Tensor, C: Tensor | None, side: str) -> Tensor:
    """The formula in fp64, on the inputs as they are stored."""
    X, V = T.double(), basis.double()
    coefficients = V.mT @ X if side == "left" else X @ V
    if C is not None:
        coefficients = coefficients - C.double()
    return X - (V @ coefficients if side == "left" else coefficients @ V.mT)


def project_torch(T: Tensor, basis: Tensor, C: Tensor | None, side: str) -> Tensor:
    """The formula as a user of PyTorch writes it, in `T`'s own dtype: the error to compare with."""
    V = basis.to(T.dtype)
    coefficients = V.mT @ T if side == "left" else T @ V
    if C is not None:
        coefficients = coefficients - C.to(T.dtype)
    return T - (V @ coefficients if side == "left" else coefficients @ V.mT)


def assert_no_worse(
    ours: Tensor, theirs: Tensor, exact: Tensor, T: Tensor, factor: float = 2.0
) -> None:
    """Ours is no further from `exact` than `factor` times theirs, in the largest element.

    A few roundings are allowed besides, of the result in its dtype and of the input `T` in the
    accumulation's: where theirs happens to be exact, or all of `T` cancels, a bound of nothing
    would test luck.
    """
    if not exact.numel():
        return
    accumulated = torch.promote_types(T.dtype, torch.float32)
    room = 4 * torch.finfo(ours.dtype).eps * float(exact.abs().max())
    longest = max(float(T.double().norm(dim=dim).max()) for dim in (-2, -1))
    room += 4 * torch.finfo(accumulated).eps * longest
    error = float((ours.double() - exact).abs().max())
    other = float((theirs.double() - exact).abs().max())
    other = other if math.isfinite(other) else 0.0  # where theirs is NaN, there is nothing to beat
    assert error <= factor * other + room, f"error {error:.3g} against {other:.3g} of PyTorch"
