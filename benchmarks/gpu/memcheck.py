"""Every kernel under compute-sanitizer, on small shapes with ragged ends.

Run as a script with the names of backends, it is what the sanitizer looks at.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

from .inside import Inside, LeftOut

HOME = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda")
FOUND = 9  # the exit status of the sanitizer when it finds something


def measure(inside: Inside) -> None:
    if inside.tiny:  # as far as it goes without the tool
        small(inside.backends, "cpu")
        inside.check(True, what="memcheck", tool=None)
        return
    places = [str(HOME / "bin"), str(HOME / "compute-sanitizer"), os.environ.get("PATH", "")]
    tool = shutil.which("compute-sanitizer", path=os.pathsep.join(places))
    if tool is None:
        raise LeftOut("compute-sanitizer is not on the PATH")
    inside.each(("memcheck", "racecheck"), lambda check: _under(inside, tool, check))


def _under(inside: Inside, tool: str, check: str) -> None:
    # Each tensor an allocation of its own, so that its ends are seen.
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [tool, "--tool", check, "--error-exitcode", str(FOUND), sys.executable]
    command += ["-m", "gpu.memcheck", *inside.backends]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=inside.left())
    print(done.stdout, done.stderr)
    errors = [x for x in done.stdout.splitlines() if x.startswith("=========")][:6]
    inside.check(
        done.returncode == 0,
        what=check,
        backends=inside.backends,
        exit=done.returncode,
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
        # Ragged, then as large matrices, then with more directions than stay in registers.
        projections = [(37, 300, 12), (1024, 1032, 12), (1024, 4096, 16), (40, 1032, 150)]
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
    except RuntimeError as reason:
        if "can't run" not in str(reason):
            raise


if __name__ == "__main__":
    small(sys.argv[1:], "cuda")
