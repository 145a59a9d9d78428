"""Every kernel under compute-sanitizer, on small shapes with ragged ends.

Run as a script with the name of a backend, it is what the sanitizer looks at.
"""

import os
import sys
from collections.abc import Callable
from itertools import product

from .inside import Inside, LeftOut, tool

FOUND = 9  # the exit status of the sanitizer when it finds something


def measure(inside: Inside) -> None:
    if inside.tiny:
        small(inside.backends, "cpu")
        return inside.add(what="memcheck", tool=None)
    sanitizer = tool("compute-sanitizer")
    if sanitizer is None:
        raise LeftOut("compute-sanitizer is not there")
    cases = list(product(("memcheck", "racecheck"), inside.backends))
    inside.each(cases, lambda case: under(inside, sanitizer, *case), " of ".join)


def under(inside: Inside, sanitizer: str, check: str, backend: str) -> None:
    """One of the sanitizer's checks of one backend: a line, and what the sanitizer found."""
    # Each tensor an allocation of its own, so that its ends are seen.
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [sanitizer, "--tool", check, "--error-exitcode", str(FOUND), sys.executable]
    command += ["-m", "gpu.memcheck", backend]
    done = inside.under(command, f"{check} of {backend}", env=env)
    if done is None:
        return
    errors = [x for x in done.stdout.splitlines() if x.startswith("=========")][:6]
    inside.check(
        done.returncode == 0,
        case=f"{check} of {backend}",
        what=check,
        backend=backend,
        status=done.returncode,
        said=errors if done.returncode else [],
    )


def small(names: list[str], kind: str) -> None:
    """Every operation by each backend, as far as it can."""
    import torch

    import grasp_kernels as gk
    from grasp_kernels.testing import orthonormal

    made = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=made).to(kind)

    projections = [(5, 40, 7)]
    if kind == "cuda":
        # Ragged, as large matrices, as LoRA factors; few directions, and more than registers hold.
        projections = [(37, 300, 12), (1024, 1032, 12), (1024, 4096, 16), (40, 1032, 150)]
        projections.append((16, 1032, 400))
    cases = list(product(projections, ("right", "left"), (torch.float32, torch.bfloat16)))
    for name in names:
        with gk.backend(name):
            for (n, d, k), side, dtype in cases:
                left = side == "left"
                T = drawn(*((d, n) if left else (n, d))).to(dtype)
                C, U = drawn(*((k, n) if left else (n, k))), orthonormal(d, k).to(kind)
                _if_it_can(gk.project_, [T, T.clone()], [U, U], [C, C], side=side)
                _if_it_can(_measured, T, U, side)
            _if_it_can(gk.orthonormalize_, [drawn(130, 7), torch.zeros(9, 3, device=kind)])
    if kind == "cuda":
        torch.cuda.synchronize()


def _measured(T, U, side: str) -> None:
    import grasp_kernels as gk

    gk.Projector([T], [U], side=side, measure=True)()


def _if_it_can(run: Callable, *args, **kwargs) -> None:
    try:
        run(*args, **kwargs)
    except (RuntimeError, ImportError) as reason:  # an operation need not have every backend
        lacking = (getattr(reason, "name", None) or "").startswith("grasp_kernels.")
        if "can't run" not in str(reason) and not lacking:
            raise


if __name__ == "__main__":
    small(sys.argv[1:], "cuda")
