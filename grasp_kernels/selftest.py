"""Whether projections are right on this machine: seconds, against fp64."""

from itertools import product

import torch

from .project import project
from .testing import assert_no_worse, orthonormal, project_fp64, project_torch

SHAPES = ((64, 96, 8), (512, 1024, 16), (256, 768, 300))  # m, d, k: small, large, a wide basis
DTYPES = (torch.float32, torch.bfloat16)


def self_test(device: torch.device | str) -> str:
    """Project on a device, in both forms, fp32 and bf16, in the backend that is chosen there.

    Returns:
        How far it is from fp64 at most, and PyTorch's own products.

    Raises:
        AssertionError: a projection is further from fp64 than it may be; says which.
    """
    worst, theirs = 0.0, 0.0
    generator = torch.Generator().manual_seed(0)
    for (m, d, k), dtype, side in product(SHAPES, DTYPES, ("right", "left")):
        T = torch.randn((m, d) if side == "right" else (d, m), generator=generator).to(dtype)
        basis = orthonormal(d, k)
        exact = project_fp64(T, basis, None, side)
        ours = project(T.to(device), basis.to(device), side=side).cpu()
        own = project_torch(T.to(device), basis.to(device), None, side).cpu()
        try:
            assert_no_worse(ours, own, exact, T)
        except AssertionError as error:
            raise AssertionError(f"{m} × {d}, k {k}, {dtype}, {side}: {error}") from error
        if dtype == torch.float32:
            worst = max(worst, float((ours.double() - exact).abs().max()))
            theirs = max(theirs, float((own.double() - exact).abs().max()))
    cases = len(SHAPES) * len(DTYPES) * 2
    return f"right in {cases} cases: {worst:.1g} from fp64 at most, PyTorch {theirs:.1g} (fp32)"
