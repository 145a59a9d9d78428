"""The CUDA library: built where nvcc is, and loaded where it is built."""

import os
import subprocess
import sys
from pathlib import Path

from .inside import Inside, LeftOut, tool

ROOT = Path(__file__).resolve().parent.parent.parent


def measure(inside: Inside) -> None:
    from grasp_kernels import native

    if inside.tiny:
        inside.add(what="library", missing=native.missing())
        return
    nvcc = tool("nvcc")
    done = _built(inside, nvcc) if nvcc else None
    if nvcc and (done is None or done.returncode):
        inside.failed = True
        return
    if not native.LIBRARY.exists():
        why = done.stderr.strip().rpartition("\n")[2] if done else "nvcc is not there"
        raise LeftOut(f"{why}; the rest goes on with Triton alone")
    reason = native.missing()
    if reason:
        inside.failed = True
        inside.add(what="library", missing=reason, failed=reason)
    else:
        inside.add(what="library", missing=None)


def _built(inside: Inside, nvcc: str) -> subprocess.CompletedProcess | None:
    """For this card alone; where something else lacks, `setup.py` says so and leaves it out."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}{'a' * (major == 9)}"
    env = os.environ | {"GRASP_CUDA": "auto", "GRASP_CUDA_ARCHS": arch}
    env.setdefault("CUDA_HOME", str(Path(nvcc).parent.parent))
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = inside.under(command, "the build", env=env, cwd=ROOT)
    if done is not None and done.returncode:
        inside.add(what="build", architecture=arch, failed=f"setup.py: {done.stderr[-300:]}")
    elif done is not None:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        version = said.strip().rpartition("\n")[2]
        inside.add(what="build", architecture=arch, nvcc=version, passed=True)
    return done
