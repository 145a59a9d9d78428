"""Which implementation runs an operation, and why the faster ones were refused."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

import torch

from . import native

BACKENDS = ("cuda", "triton", "reference")  # fastest first
OLDEST = (8, 0)  # Ampere: bf16 in matrix instructions, asynchronous copies
WITHOUT = {("cuda", "orthonormalize_")}  # by Gram matrices in Triton there is little to gain
_override: ContextVar[str | None] = ContextVar("grasp_backend", default=None)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every operation inside the block on one backend, or fail with the reason it can't.

    Args:
        name: "reference", "triton" or "cuda". Outside such a block the environment variable
            `GRASP_BACKEND` decides, and where it is unset the fastest backend that can.

    Raises:
        ValueError: no backend has this name.
    """
    token = _override.set(_known(name, "backend(name)"))
    try:
        yield
    finally:
        _override.reset(token)


def choose(op: str, *tensors: torch.Tensor) -> str:
    """The backend that runs `op` on these tensors.

    Raises:
        RuntimeError: a backend was asked for by name and can't run this; the message says why.
    """
    forced = asked_for()
    if forced is not None:
        if reason := _refusal(forced, op, tensors, True):
            raise RuntimeError(f"backend {forced!r} can't run {op}: {reason}")
        return forced
    return next(name for name in BACKENDS if _refusal(name, op, tensors, False) is None)


def describe(op: str, *tensors: torch.Tensor) -> str:
    """One line for the choice, one for each faster backend with the reason it was refused."""
    forced = asked_for()
    chosen = choose(op, *tensors)
    lines = [f"{op}: {chosen}" + (" (asked for by name)" if forced else "")]
    for name in BACKENDS[: BACKENDS.index(chosen)]:
        if not forced:
            lines.append(f"  {name} refused: {_refusal(name, op, tensors, False)}")
    return "\n".join(lines)


def asked_for() -> str | None:
    """The backend that `backend` or `GRASP_BACKEND` names."""
    name = _override.get() or os.environ.get("GRASP_BACKEND")
    return _known(name, "GRASP_BACKEND") if name else None


def _known(name: str, argument: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{argument} is {name!r}; choose one of {', '.join(BACKENDS)}")
    return name


def implementation(stem: str, name: str) -> Callable | None:
    """The function behind a fast backend, loaded now; None for the reference."""
    return None if name == "reference" else getattr(module_of(stem, name), f"{stem}_{name}")


def module_of(stem: str, name: str) -> ModuleType:
    """The module that a fast backend has for an operation: `project_triton`, `project_cuda`, ...

    It holds the function of that name, and `refusal`, which says what it can't run.
    """
    return import_module(f".{stem}_{name}", __package__)


class Hardware(NamedTuple):
    """What decides for a device of type "cuda", which AMD's are too."""

    hip: str | None
    capability: tuple[int, int]


@cache
def hardware(device: torch.device) -> Hardware:
    """Asked for once a device: a list of hundreds of tensors asks for each."""
    return Hardware(torch.version.hip, torch.cuda.get_device_capability(device))


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _refusal(name: str, op: str, tensors: tuple[torch.Tensor, ...], forced: bool) -> str | None:
    """Why `name` can't run `op` here, or None."""
    if name == "reference":
        return None
    interpreted = name == "triton" and forced and os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted and (reason := _device_refusal(tensors)):
        return reason
    if (name, op) in WITHOUT:
        return f"it has no kernel for {op}"
    if name == "cuda" and (reason := native.missing()):
        if not forced:
            _warn_of_a_fault(reason)
        return reason
    if name == "triton" and not _has_triton():
        return native.elsewhere("Triton") or "triton is not installed; pip install triton"
    if odd := [t for t in tensors if t.dtype == torch.float64]:
        return f"fp64 {list(odd[0].shape)} would lose precision in it"
    return module_of(op.rstrip("_"), name).refusal(*tensors)


def _device_refusal(tensors: tuple[torch.Tensor, ...]) -> str | None:
    """Why no kernel can run where these are, or None."""
    if odd := sorted({t.device.type for t in tensors} - {"cuda"}):
        return f"needs CUDA tensors, got {', '.join(odd)}"
    device = tensors[0].device
    hip, capability = hardware(device)
    if hip is not None:
        return f"needs an NVIDIA GPU, and this torch is built for ROCm {hip}"
    if capability < OLDEST:
        found, least = (".".join(map(str, c)) for c in (capability, OLDEST))
        return f"needs compute capability {least}, and {device} has {found}"
    return None


@cache
def _warn_of_a_fault(reason: str) -> None:
    """Once a process; a library that was never built is no fault."""
    if native.built():
        message = f"the CUDA library of grasp_kernels is built and can't be used: {reason}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
