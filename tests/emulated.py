"""The CUDA kernels' own code on a CPU: built with the C++ compiler, called through ctypes."""

import ctypes as c
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

CSRC = Path(__file__).parent.parent / "csrc"
COMPILER = shutil.which("c++") or shutil.which("g++")
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Job(c.Structure):
    _fields_ = [
        *((n, c.c_void_p) for n in ("input", "out", "basis", "C")),
        *((n, c.c_int64) for n in ("in_step", "out_step", "basis_d", "basis_k", "C_n", "C_k")),
        *((n, c.c_int) for n in ("n", "d", "k", "width", "stages")),
        ("energies", c.c_void_p),
    ]


class Plan(c.Structure):
    _fields_ = [
        (n, c.c_int) for n in ("kp", "slice", "strip", "blocks", "width", "stages", "bytes")
    ]


@cache
def library(folder: Path) -> c.CDLL:
    out = folder / "emulated.so"
    subprocess.run(
        [COMPILER, "-O2", "-std=c++17", "-shared", "-fPIC", "-Wall", "-Werror", "-o", out]
        + [CSRC / "emulate.cpp"],
        check=True,
        capture_output=True,
        text=True,
    )
    return c.CDLL(str(out))


def _C(C: Tensor | None, side: str) -> tuple[int | None, int, int]:
    if C is None:
        return None, 0, 0
    return C.data_ptr(), *(C.stride()[::-1] if side == "left" else C.stride())


def strip(dtype: torch.dtype, slice: int) -> int:
    """Positions of a strip in the kernels that are built here."""
    return 32 if slice == 128 and dtype != torch.float32 else 16


def project(
    folder: Path,
    T: Tensor,
    U: Tensor,
    C: Tensor | None,
    side: str,
    out: Tensor,
    *,
    slice: int = 128,
    blocks: int = 1,
    clusters: int = 1,
    stages: int = 2,
    seed: int = 0,
    energies: Tensor | None = None,
) -> Tensor:
    """Into `out`, by clusters of `blocks` blocks with `slice` of d and `stages` strips each."""
    d, k = U.shape
    pointer, C_n, C_k = _C(C, side)
    job = Job(
        T.data_ptr(),
        out.data_ptr(),
        U.data_ptr(),
        pointer,
        T.stride(0),
        out.stride(0),
        *U.stride(),
        C_n,
        C_k,
        T.numel() // d,
        d,
        k,
        -(-d // (slice // 8 * blocks)) * (slice // 8),
        stages,
        None if energies is None else energies.data_ptr(),
    )
    call = library(folder).project
    call.restype = c.c_char_p
    kind, left = KINDS[T.dtype], int(side == "left")
    error = call(c.byref(job), kind, left, slice, blocks, clusters, seed)
    assert not error, error.decode()
    return out


def plan(folder: Path, size: int, d: int, k: int, room: int) -> Plan:
    """How the kernel for elements of `size` bytes cuts d; `room` is a block's shared memory."""
    found = Plan()
    library(folder).plan(size, d, k, room, c.byref(found))
    return found


def moved(folder: Path) -> tuple[int, int]:
    """Bytes of matrices read from and written to global memory since the last call."""
    counts = c.c_int64(), c.c_int64()
    library(folder).moved(*map(c.byref, counts))
    return counts[0].value, counts[1].value
