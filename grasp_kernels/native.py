"""The compiled CUDA library: built where a compiler is, loaded when it is first asked for."""

import ctypes
import sys
from functools import cache
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_native.so")
BUILD = "GRASP_CUDA=1 pip install --no-build-isolation . (in a checkout, with nvcc and ninja)"
OPERATORS = {  # the schema, and the dispatch key that the library registers a kernel for
    "project_all": ("(Tensor rows, int device, int energies) -> ()", "CPU"),
}

for _name, (_schema, _) in OPERATORS.items():
    torch.library.define(f"grasp_native::{_name}", _schema)


def elsewhere(what: str) -> str | None:
    """That something is for Linux alone, where this is none."""
    if sys.platform == "linux":
        return None
    return f"{what} is for Linux alone, and this is {sys.platform}"


def built() -> bool:
    """Whether there is a library to load: where there is, `missing` names a fault."""
    return LIBRARY.exists()


@cache
def missing() -> str | None:
    """Load the library; why it can't be used, or None."""
    if torch.version.hip is not None:
        return f"this torch is built for ROCm {torch.version.hip}, and the library for CUDA"
    if torch.version.cuda is None:
        return "this torch is built without CUDA; pytorch.org says how to install one with it"
    if reason := elsewhere("the CUDA library"):
        return reason
    if not built():
        return f"the library is not built: {BUILD}"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        linkers = error.__cause__ or error  # torch's own words leave out why
        return f"{LIBRARY.name} does not load: {linkers}; build it for this torch: {BUILD}"
    return driver_refusal(*cuda_versions())


def cuda_versions() -> tuple[int, int]:
    """The CUDA that the library is built with, and the newest that the driver runs or 0."""
    found = ctypes.c_int(), ctypes.c_int()
    ctypes.CDLL(str(LIBRARY)).grasp_cuda_versions(*map(ctypes.byref, found))
    return found[0].value, found[1].value


def driver_refusal(built_with: int, driver: int) -> str | None:
    """Why the driver can't run it, or None: one of the same major version can."""
    if driver == 0:
        return "there is no NVIDIA driver on this machine"
    if driver // 1000 >= built_with // 1000:
        return None
    ours, theirs = (f"{v // 1000}.{v % 1000 // 10}" for v in (built_with, driver))
    return (
        f"the driver is too old: it runs CUDA up to {theirs}, and the library is built with "
        f"{ours}; update the driver, or build with an nvcc of {theirs.split('.')[0]}.x"
    )
