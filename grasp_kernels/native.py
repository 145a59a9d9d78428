"""The compiled CUDA library: built where a compiler is, loaded when it is first asked for."""

from functools import cache
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_native.so")

torch.library.define(
    "grasp_native::project_all",
    "(Tensor rows, int device, int energies) -> ()",
)
torch.library.define(
    "grasp_native::orthonormalize_all",
    "(Tensor(a!)[] Ws, Tensor(b!)[] Qs, Tensor(c!)[] ranks, float[] rtols) -> ()",
)


@cache
def missing() -> str | None:
    """Load the library; why it can't be, or None."""
    if not LIBRARY.exists():
        return "not built; install with GRASP_CUDA=1 where nvcc is"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY.name} can't be loaded ({error})"
    return None
