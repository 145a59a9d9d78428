"""The CUDA library: built where nvcc is, and loaded where it is built."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from .inside import Inside, LeftOut

ROOT = Path(__file__).resolve().parent.parent.parent


def measure(inside: Inside) -> None:
    import torch

    from grasp_kernels import native

    if inside.tiny:
        inside.add(what="library", missing=native.missing())
        return
    nvcc = _nvcc()
    if nvcc:
        major, minor = torch.cuda.get_device_capability()
        arch = f"{major}{minor}{'a' * (major == 9)}"
        env = os.environ | {"GRASP_CUDA": "auto", "GRASP_CUDA_ARCHS": arch}
        env.setdefault("CUDA_HOME", str(Path(nvcc).parent.parent))
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        status = subprocess.run(command, env=env, cwd=ROOT).returncode
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        inside.check(
            status == 0, what="build", architecture=arch, nvcc=said.strip().rpartition("\n")[2]
        )
        if status:
            return
    if not native.LIBRARY.exists():
        lacks = "setup.py left it out, and the log has why" if nvcc else "nvcc is not there"
        raise LeftOut(f"{lacks}; the rest goes on with Triton alone")
    reason = native.missing()
    inside.check(reason is None, what="library", case=reason or "the library", missing=reason)


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which(str(Path(home) / "bin" / "nvcc"))
