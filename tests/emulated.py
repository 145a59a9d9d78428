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
        *((n, c.c_int) for n in ("n", "d", "k", "slice")),
        ("energies", c.c_void_p),
    ]


class Entry(c.Structure):
    _fields_ = [
        *((n, c.c_void_p) for n in ("input", "out", "basis", "C")),
        *((n, c.c_int) for n in ("in_step", "out_step", "n", "d", "first")),
        ("k", c.c_short),
        ("kind", c.c_ubyte),
        ("flags", c.c_ubyte),  # bit 0: left; bit 1: C is [k, n]
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


def project(
    folder: Path,
    T: Tensor,
    U: Tensor,
    C: Tensor | None,
    side: str,
    blocks: int,
    clusters: int,
    energies: Tensor | None = None,
) -> Tensor:
    """By a cluster of `blocks` blocks for each strip, the strips shared among the clusters."""
    out = torch.full_like(T, 7.0)  # poisoned: what is not written shows
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
        -(-d // (16 * blocks)) * 16,
        None if energies is None else energies.data_ptr(),
    )
    half, left = int(T.dtype == torch.float16), int(side == "left")
    assert library(folder).project(c.byref(job), half, left, blocks, clusters) == 0
    return out


def project_list(
    folder: Path,
    Ts: list[Tensor],
    Us: list[Tensor],
    Cs: list[Tensor | None],
    sides: list[str],
    energies: Tensor | None = None,
) -> list[Tensor]:
    """Of unlike matrices, each from its own side."""
    outs = [torch.full_like(T, 7.0) for T in Ts]
    Us = [U.contiguous() for U in Us]
    entries, first = [], 0
    for T, out, U, C, side in zip(Ts, outs, Us, Cs, sides, strict=True):
        d, k = U.shape
        n = T.numel() // d
        left = int(side == "left")
        pointers = T.data_ptr(), out.data_ptr(), U.data_ptr(), None if C is None else C.data_ptr()
        entry = (*pointers, T.stride(0), out.stride(0), n, d, first, k, KINDS[T.dtype], 3 * left)
        entries.append(Entry(*entry))
        first += -(-n // 16)
    table = (Entry * len(entries))(*entries)
    widest = max(U.shape[1] for U in Us)
    address = c.c_void_p(None if energies is None else energies.data_ptr())
    assert library(folder).project_entries(table, len(entries), first, widest, address) == 0
    return outs


def moved(folder: Path) -> tuple[int, int]:
    """Bytes of matrices read from and written to global memory since the last call."""
    counts = c.c_int64(), c.c_int64()
    library(folder).moved(*map(c.byref, counts))
    return counts[0].value, counts[1].value
