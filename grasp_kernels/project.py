"""Remove, or pin, the component of a matrix along a subspace.

    right   T ← T − (T V − C) Vᵀ        T [m, d], V [d, k] orthonormal, C [m, k]
    left    T ← T − U (Uᵀ T − C)        T [d, n], U [d, k] orthonormal, C [k, n]

`C` absent means 0: that projects a gradient. `C = T₀ V` pins a weight to what `T₀` does on V.
"""

from collections.abc import Sequence
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from . import dispatch
from .autocast import set_aside

Side = Literal["right", "left"]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ACCUMULATED = {  # what products of the two are added up in
    (a, b): torch.promote_types(torch.promote_types(a, b), torch.float32)
    for a, b in product(DTYPES, repeat=2)
}


def project_ref(T: Tensor, basis: Tensor, C: Tensor | None, left: bool) -> Tensor:
    """The definition, and what every kernel is checked against."""
    if left:
        return project_ref(T.mT, basis, None if C is None else C.mT, left=False).mT
    dtype = ACCUMULATED[T.dtype, basis.dtype]
    X, V = T.to(dtype), basis.to(dtype)
    coefficients = X @ V  # [m, k]
    if C is not None:
        coefficients = coefficients - C.to(dtype)
    return (X - coefficients @ V.mT).to(T.dtype)


STRIP = 4 << 20  # bytes of a strip that is converted to fp32 on a CPU


Norms = list[tuple[Tensor, Tensor]]  # ‖T‖ and ‖T V‖ of each piece, 0-d


def project_strips(
    T: Tensor,
    basis: Tensor,
    C: Tensor | None,
    left: bool,
    out: Tensor,
    norms: Norms | None = None,
) -> None:
    """`project_ref` of a matrix into `out`, which may be `T`, for a CPU.

    Nothing as large as `T` is held besides: the last product is subtracted as it is made, and a
    16-bit `T` is converted a strip at a time.
    """
    if T.ndim > 2:
        for i in range(T.shape[0]):
            project_strips(T[i], basis, None if C is None else C[i], left, out[i], norms)
        return
    if T.ndim == 1:
        T, C, out = T[None], None if C is None else C[None], out[None]
    if T.stride(0) < T.stride(1):  # its rows are contiguous from the other side
        T, C, out, left = T.mT, None if C is None else C.mT, out.mT, not left
    dtype = ACCUMULATED[T.dtype, basis.dtype]
    V = basis.to(dtype)
    if T.dtype == out.dtype == dtype:
        _project_strip(T, V, C, left, out, norms)
        return
    d, n = V.shape[0], T.shape[1 if left else 0]
    width = max(1, STRIP // max(1, d * dtype.itemsize))
    for start in range(0, n, width):
        part = slice(start, start + width)
        strip = (slice(None), part) if left else part
        _project_strip(T[strip], V, None if C is None else C[strip], left, out[strip], norms)


def _project_strip(T, V: Tensor, C, left: bool, out: Tensor, norms: Norms | None) -> None:
    X = T.to(V.dtype)
    coefficients = V.mT @ X if left else X @ V
    if norms is not None:
        norms.append((torch.linalg.vector_norm(X), torch.linalg.vector_norm(coefficients)))
    if C is not None:
        coefficients -= C
    factors = (V, coefficients) if left else (coefficients, V.mT)
    if out.dtype == V.dtype:
        torch.addmm(X, *factors, alpha=-1, out=out)
    else:
        out.copy_(torch.addmm(X, *factors, alpha=-1))


def project(T: Tensor, basis: Tensor, C: Tensor | None = None, *, side: Side = "right") -> Tensor:
    """Return `T` without its component along the basis, or with that component set to `C`.

        right   T − (T V − C) Vᵀ        left   T − U (Uᵀ T − C)

    Differentiable in `T`; the gradient is projected with `C = 0` on the same side.

    Args:
        T: `[..., d]` (right) or `[..., d, n]` (left); fp64, fp32, bf16, fp16.
        basis: `[d, k]` with orthonormal columns, k ≤ d; same dtypes. Not differentiated.
        C: `[..., k]` (right) or `[..., k, n]` (left), in fp32 or `T`'s dtype; None means 0.
        side: which side of `T` the basis multiplies.

    Returns:
        A new tensor of `T`'s shape and dtype, accumulated in fp32 or better.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape or device.
    """
    left = _is_left(side)
    _check("T", T, basis, C, left)
    if basis.requires_grad:
        raise ValueError("basis requires grad, but project is differentiable in T only; detach it")
    return _project_op(T, basis, C, left)


def project_(
    Ts: Tensor | Sequence[Tensor],
    bases: Tensor | Sequence[Tensor],
    Cs: Tensor | Sequence[Tensor] | None = None,
    *,
    side: Side = "right",
) -> None:
    """Project a matrix, or each of a list, in place; not recorded by autograd.

        right   T ← T − (T V − C) Vᵀ        left   T ← T − U (Uᵀ T − C)

    Args:
        Ts: one tensor or a list; shapes and dtypes as in `project`, and may differ in a list.
        bases: one basis for all, or one for each.
        Cs: as `bases`; None means 0.
        side: which side of each `T` the basis multiplies.

    Raises:
        TypeError, ValueError: as `project`; also for a tensor listed twice, for memory that
            overlaps itself (an expanded tensor), and for a tensor that autograd still needs.
    """
    tensors, bases, Cs, left = checked(Ts, bases, Cs, side)
    if not tensors:
        return
    with torch.no_grad():
        if torch.compiler.is_compiling():
            torch.ops.grasp.project_(tensors, bases, Cs, left)
        else:  # the boundary of a registered op costs more than a small projection
            _project_body("project_", tensors, tensors, bases, Cs, left)
            torch.autograd.graph.increment_version(tensors)


def explain(T: Tensor, basis: Tensor, side: Side = "right") -> str:
    """Say which backend would project `T`, and why each faster one was refused."""
    _check("T", T, basis, None, _is_left(side))
    return dispatch.describe("project", T, basis)


@torch.library.custom_op("grasp::project", mutates_args=())
def _project_op(T: Tensor, basis: Tensor, C: Tensor | None, left: bool) -> Tensor:
    out = torch.empty_like(T, memory_format=torch.contiguous_format)
    _project_body("project", [T], [out], [basis], [] if C is None else [C], left)
    return out


@_project_op.register_fake
def _(T: Tensor, basis: Tensor, C: Tensor | None, left: bool) -> Tensor:
    return torch.empty_like(T, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:
    _, basis, C, left = inputs
    ctx.save_for_backward(basis)
    ctx.left = left
    ctx.differentiates_C = C is not None and C.requires_grad
    if ctx.differentiates_C:
        raise ValueError("C requires grad, but project is differentiable in T only; detach it")


def _backward(ctx, gradient: Tensor):
    (basis,) = ctx.saved_tensors
    return _project_op(gradient, basis, None, ctx.left), None, None, None


_project_op.register_autograd(_backward, setup_context=_setup_context)


@set_aside()
def _project_body(
    op: str,
    Ts: list[Tensor],
    outs: list[Tensor],
    bases: list[Tensor],
    Cs: list[Tensor],
    left: bool,
) -> None:
    for name, chosen in chosen_backends(op, Ts, bases).items():
        run = dispatch.implementation("project", name) or _project_each
        some_Cs = [Cs[i] for i in chosen] if Cs else []
        run(*([these[i] for i in chosen] for these in (Ts, outs, bases)), some_Cs, left)


def chosen_backends(op: str, Ts: Sequence[Tensor], bases: Sequence[Tensor]) -> dict[str, list[int]]:
    """Which of a list each backend runs."""
    by_backend: dict[str, list[int]] = {}
    chosen_for: dict[tuple, str] = {}  # what `choose` looks at is the same for most of a list
    for i, T in enumerate(Ts):
        U = bases[i]
        alike = (T.dtype, T.device, U.dtype, U.device, U.shape[1])
        if (name := chosen_for.get(alike)) is None:
            name = chosen_for[alike] = dispatch.choose(op, T, U)
        by_backend.setdefault(name, []).append(i)
    return by_backend


def _project_each(Ts, outs, bases, Cs, left: bool) -> None:
    for i, T in enumerate(Ts):
        project_plainly(T, bases[i], Cs[i] if Cs else None, left, outs[i])


def project_plainly(T, basis, C, left: bool, out: Tensor, norms: Norms | None = None) -> None:
    """The reference backend, into `out`; `norms` grows by what was measured."""
    if T.device.type == "cpu":
        project_strips(T, basis, C, left, out, norms)
        return
    projected = project_ref(T, basis, C, left)
    if norms is not None:
        dtype = ACCUMULATED[T.dtype, basis.dtype]
        X, V = T.to(dtype), basis.to(dtype)
        inside = V.mT @ X if left else X @ V
        norms.append((torch.linalg.vector_norm(X), torch.linalg.vector_norm(inside)))
    out.copy_(projected)


@torch.library.custom_op("grasp::project_", mutates_args=("Ts",))
def _project_in_place_op(
    Ts: list[Tensor], bases: list[Tensor], Cs: list[Tensor], left: bool
) -> None:
    _project_body("project_", Ts, Ts, bases, Cs, left)


@_project_in_place_op.register_fake
def _(Ts: list[Tensor], bases: list[Tensor], Cs: list[Tensor], left: bool) -> None:
    return None


def _is_left(side: str) -> bool:
    if side not in ("right", "left"):
        raise ValueError(f"side is {side!r}; choose 'right' or 'left'")
    return side == "left"


def checked(
    Ts: Tensor | Sequence[Tensor],
    bases: Tensor | Sequence[Tensor],
    Cs: Tensor | Sequence[Tensor] | None,
    side: str,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], bool]:
    """Arguments of `project_` as lists, and whether the side is left; see there for the errors."""
    left = _is_left(side)
    tensors = [Ts] if isinstance(Ts, Tensor) else list(Ts)
    bases = _one_each("bases", bases, len(tensors))
    Cs = [] if Cs is None else _one_each("Cs", Cs, len(tensors))
    for i, T in enumerate(tensors):
        name = "Ts" if isinstance(Ts, Tensor) else f"Ts[{i}]"
        _check(name, T, bases[i], Cs[i] if Cs else None, left)
        _check_in_place(name, T)
    check_distinct(tensors)
    return tensors, bases, Cs, left


def _one_each(name: str, given: Tensor | Sequence[Tensor], count: int) -> list[Tensor]:
    if isinstance(given, Tensor):
        return [given] * count
    given = list(given)
    if len(given) != count:
        raise ValueError(f"{name} has {len(given)} tensors for {count} in Ts; give one for each")
    return given


def check_matrix(name: str, tensor: Tensor) -> None:
    """Refuse what is no plain dense floating-point tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; give a torch.Tensor")
    if hasattr(tensor, "to_local"):
        raise TypeError(f"{name} is a DTensor; project each process's part: pass {name}.to_local()")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} has layout {tensor.layout}; pass {name}.to_dense()")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} is {tensor.dtype}; convert it to fp64, fp32, bf16 or fp16")


def _check(name: str, T: Tensor, basis: Tensor, C: Tensor | None, left: bool) -> None:
    check_matrix(name, T)
    check_matrix("basis", basis)
    if basis.ndim != 2 or basis.shape[1] > basis.shape[0]:
        raise ValueError(f"basis is {list(basis.shape)}; it must be [d, k] with k ≤ d")
    if T.ndim < (2 if left else 1):
        form = "[..., d, n]" if left else "[..., d]"
        raise ValueError(f"{name} is {list(T.shape)}; it must be {form}")
    d, k = basis.shape
    width = T.shape[-2 if left else -1]
    if width != d:
        side = "left: rows" if left else "right: columns"
        raise ValueError(
            f"{name} is {list(T.shape)} with {width} {side} for a basis of d = {d}; "
            "transpose it or change side"
        )
    if T.device != basis.device:
        raise ValueError(f"{name} is on {T.device}, basis on {basis.device}; move one of them")
    if C is None:
        return
    check_matrix("C", C)
    expected = [*T.shape[:-2], k, T.shape[-1]] if left else [*T.shape[:-1], k]
    if list(C.shape) != expected:
        raise ValueError(f"C is {list(C.shape)}; for {name} of {list(T.shape)} give {expected}")
    if C.device != T.device:
        raise ValueError(f"C is on {C.device}, {name} on {T.device}; move one of them")
    if C.dtype not in (torch.float32, T.dtype):
        raise TypeError(f"C is {C.dtype}; give fp32 or {name}'s {T.dtype}")


def _check_in_place(name: str, T: Tensor) -> None:
    if _overlaps(T):
        raise ValueError(f"{name} overlaps itself (expanded?); pass {name}.contiguous()")
    if torch.is_grad_enabled() and T.requires_grad and not T.is_leaf:
        raise ValueError(f"{name} is part of an autograd graph; use project, or pass .detach()")


def _overlaps(T: Tensor) -> bool:
    """Whether two elements may share memory: an expanded tensor, or a sliding window."""
    extent = 0
    for stride, size in sorted(zip(T.stride(), T.shape, strict=True)):
        if size > 1:
            if stride <= extent:
                return True
            extent += (size - 1) * stride
    return False


def check_distinct(tensors: Sequence[Tensor]) -> None:
    """Refuse a tensor that is listed twice."""
    if torch.compiler.is_compiling():
        return
    seen: dict[tuple, int] = {}
    for i, T in enumerate(tensors):
        if T.numel() == 0:
            continue
        if (first := seen.setdefault((T.device, T.data_ptr()), i)) != i:
            raise ValueError(
                f"Ts[{i}] and Ts[{first}] are the same memory (tied weights?); list each once"
            )
