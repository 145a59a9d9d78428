"""Remove, or pin, the component of a matrix along a subspace.

    right   T ← T − (T V − C) Vᵀ        T [m, d], V [d, k] orthonormal, C [m, k]
    left    T ← T − U (Uᵀ T − C)        T [d, n], U [d, k] orthonormal, C [k, n]

`C` absent means 0: that projects a gradient. `C = T₀ V` pins a weight to what `T₀` does on V.
A basis `[b, d, k]` is one for each leading index of `T`.
"""

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .arguments import (
    DTYPES,
    Side,
    check_distinct,
    check_orthonormal,
    check_pair,
    checked,
    is_left,
    traced,
)
from .autocast import set_aside

ACCUMULATED = {  # what products of the two are added up in
    (a, b): torch.promote_types(torch.promote_types(a, b), torch.float32)
    for a, b in product(DTYPES, repeat=2)
}


def project_ref(T: Tensor, basis: Tensor, C: Tensor | None, left: bool) -> Tensor:
    """The definition, and what every kernel is checked against."""
    if left:
        return project_ref(T.mT, basis, None if C is None else C.mT, left=False).mT
    dtype = ACCUMULATED[T.dtype, basis.dtype]
    X, V = T.to(dtype), _along(T, basis).to(dtype)
    coefficients = X @ V  # [m, k]
    if C is not None:
        coefficients = coefficients - C.to(dtype)
    return (X - coefficients @ V.mT).to(T.dtype)


def _along(T: Tensor, basis: Tensor) -> Tensor:
    """The basis with its leading indices below those of `T`."""
    batch = basis.shape[:-2]
    between = T.ndim - basis.ndim
    return basis.view(*batch, *[1] * between, *basis.shape[-2:]) if batch and between else basis


STRIP = 4 << 20  # bytes of a strip that is converted to fp32 on a CPU: it stays in cache
GPU_STRIP = 256 << 20  # and elsewhere: its products run at full speed


Norms = list[tuple[Tensor, Tensor]]  # ‖T‖ and ‖T V‖ of each piece, 0-d


def project_strips(
    T: Tensor,
    basis: Tensor,
    C: Tensor | None,
    left: bool,
    out: Tensor,
    norms: Norms | None = None,
) -> None:
    """`project_ref` into `out`, which may be `T`.

    Nothing as large as `T` is held besides: the last product is subtracted as it is made, and a
    16-bit `T` is converted a strip at a time.
    """
    dtype = ACCUMULATED[T.dtype, basis.dtype]
    most = STRIP if T.device.type == "cpu" else GPU_STRIP
    small = T.dtype == dtype or T.numel() * dtype.itemsize <= most
    together = T.ndim == basis.ndim == 3 and small  # in one product of a batch
    if T.ndim > 2 and not together:
        for i in range(T.shape[0]):
            V, part = basis[i] if basis.ndim > 2 else basis, None if C is None else C[i]
            project_strips(T[i], V, part, left, out[i], norms)
        return
    if T.ndim == 1:
        T, C, out = T[None], None if C is None else C[None], out[None]
    if T.stride(-2) < T.stride(-1):  # its rows are contiguous from the other side
        T, C, out, left = T.mT, None if C is None else C.mT, out.mT, not left
    V = basis.to(dtype)
    if together or T.dtype == out.dtype == dtype:
        _project_strip(T, V, C, left, out, norms)
        return
    d, n = V.shape[0], T.shape[1 if left else 0]
    width = max(1, most // max(1, d * dtype.itemsize))
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
    subtract = torch.baddbmm if X.ndim == 3 else torch.addmm
    if out.dtype == V.dtype:
        subtract(X, *factors, alpha=-1, out=out)
    else:
        out.copy_(subtract(X, *factors, alpha=-1))


def project(
    T: Tensor,
    basis: Tensor,
    C: Tensor | None = None,
    *,
    side: Side = "right",
    check: bool = False,
) -> Tensor:
    """Return `T` without its component along the basis, or with that component set to `C`.

        right   T − (T V − C) Vᵀ        left   T − U (Uᵀ T − C)

    Differentiable in `T`; the gradient is projected with `C = 0` on the same side. Works under
    `torch.func` in reverse mode and `torch.compile`.

    Args:
        T: `[..., d]` (right) or `[..., d, n]` (left); fp64, fp32, bf16, fp16.
        basis: `[d, k]` with orthonormal columns, k ≤ d; same dtypes. Not differentiated. `[d]` is
            one column; `[b, d, k]` is one basis for each leading index of `T`, which then is
            `[b, ..., n, d]` (right) or `[b, ..., d, n]` (left).
        C: `[..., k]` (right) or `[..., k, n]` (left), in fp32 or `T`'s dtype; None means 0.
        side: which side of `T` the basis multiplies.
        check: refuse a basis that is not orthonormal to its dtype's rounding; waits for the device.

    Returns:
        A new tensor of `T`'s shape and dtype, accumulated in fp32 or better.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape or device.
    """
    left = is_left(side)
    basis = check_pair("T", T, "basis", basis, C, left)
    for name, constant in (("basis", basis), ("C", C)):
        if constant is not None and constant.requires_grad:
            raise ValueError(
                f"{name} requires grad, but project is differentiable in T only; detach it"
            )
    if check:
        check_orthonormal([basis])
    return projected(T, basis, C, left)


def project_(
    Ts: Tensor | Sequence[Tensor | None],
    bases: Tensor | Sequence[Tensor],
    Cs: Tensor | Sequence[Tensor] | None = None,
    *,
    side: Side = "right",
    check: bool = False,
) -> None:
    """Project a matrix, or each of a list, in place; not recorded by autograd.

        right   T ← T − (T V − C) Vᵀ        left   T ← T − U (Uᵀ T − C)

    Args:
        Ts: one tensor or a list; shapes and dtypes as in `project`, and may differ in a list. None
            in a list, such as a gradient that isn't there, is left out with its basis and C.
        bases: one basis for all, or one for each, as in `project`.
        Cs: as `bases`; None means 0.
        side: which side of each `T` the basis multiplies.
        check: as in `project`; one wait for the whole list.

    Raises:
        TypeError, ValueError: as `project`; also for a tensor listed twice, for memory that
            overlaps itself (an expanded tensor), and for a tensor that autograd still needs.
    """
    given = checked(Ts, bases, Cs, side, check)
    tensors = given.tensors
    if not tensors:
        return
    with torch.no_grad():
        if traced(tensors):
            torch.ops.grasp.project_(*given)
        else:  # the boundary of a registered op costs more than a small projection
            _project_body("project_", tensors, tensors, given.bases, given.Cs, given.left)
            torch.autograd.graph.increment_version(tensors)


def explain(T: Tensor, basis: Tensor, side: Side = "right") -> str:
    """Say which backend would project `T`, and why each faster one was refused."""
    basis = check_pair("T", T, "basis", basis, None, is_left(side))
    return dispatch.describe("project", *_one_of(T, basis))


def projected(T: Tensor, basis: Tensor, C: Tensor | None, left: bool) -> Tensor:
    """`project` of arguments in one form; recorded only where something asks for it."""
    if _is_recorded(T) or (T.requires_grad and torch.is_grad_enabled()):
        return _Project.apply(T, basis, C, left)
    return _project_into_new(T, basis, C, left)


def _is_recorded(T: Tensor) -> bool:
    """Whether the tensor is traced, or a transform of `torch.func` is at work."""
    return traced([T]) or torch._C._are_functorch_transforms_active()


def _project_into_new(T: Tensor, basis: Tensor, C: Tensor | None, left: bool) -> Tensor:
    out = torch.empty_like(T, memory_format=torch.contiguous_format)
    _project_body("project", [T], [out], [basis], [] if C is None else [C], left)
    return out


_project_op = torch.library.custom_op("grasp::project", _project_into_new, mutates_args=())


@_project_op.register_fake
def _(T: Tensor, basis: Tensor, C: Tensor | None, left: bool) -> Tensor:
    return torch.empty_like(T, memory_format=torch.contiguous_format)


class _Project(torch.autograd.Function):
    """The operator with its derivative, which `torch.func` can go through any number of times.

    An operator's own `register_autograd` can't be nested in `torch.func`, and a `jvp` of this can't
    be compiled: so there is none.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(T: Tensor, basis: Tensor, C: Tensor | None, left: bool) -> Tensor:
        run = _project_op if _is_recorded(T) else _project_into_new
        return run(T, basis, C, left)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, basis, _, ctx.left = inputs
        ctx.save_for_backward(basis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (basis,) = ctx.saved_tensors
        return projected(gradient, basis, None, ctx.left), None, None, None


_project_op.register_autograd(_Project.backward, setup_context=_Project.setup_context)


@_project_op.register_vmap
def _(info, in_dims, T: Tensor, basis: Tensor, C: Tensor | None, left: bool):
    T_dim, basis_dim, C_dim, _ = in_dims
    T = _in_front(T, T_dim, info.batch_size)
    C = None if C is None else _in_front(C, C_dim, info.batch_size)
    if basis_dim is None and basis.ndim == 2:
        return _project_op(T, basis, C, left), 0
    basis = _in_front(basis, basis_dim, info.batch_size)
    if T.ndim < basis.ndim:  # a vector for each basis
        return _project_op(T[:, None], basis, None if C is None else C[:, None], left)[:, 0], 0
    return _project_op(T, basis, C, left), 0


def _in_front(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


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
        lies = (T.shape, T.stride(), T.data_ptr() % 16) if T.device.type != "cpu" else None
        alike = (T.dtype, T.device, U.dtype, U.device, U.shape, lies)
        if (name := chosen_for.get(alike)) is None:
            name = chosen_for[alike] = dispatch.choose(op, *_one_of(T, U))
        by_backend.setdefault(name, []).append(i)
    return by_backend


def _one_of(T: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """One matrix of a batch with its basis: what a backend is asked about."""
    while basis.ndim > 2:
        if not T.shape[0]:
            return T.new_empty(0, basis.shape[-2]), basis.new_empty(basis.shape[-2:])
        T, basis = T[0], basis[0]
    return T, basis


def _project_each(Ts, outs, bases, Cs, left: bool) -> None:
    for i, T in enumerate(Ts):
        project_strips(T, bases[i], Cs[i] if Cs else None, left, outs[i])


@torch.library.custom_op("grasp::project_", mutates_args=("Ts",))
def _project_in_place_op(
    Ts: list[Tensor], bases: list[Tensor], Cs: list[Tensor], left: bool
) -> None:
    check_distinct(Ts)  # here they are real; where the call was traced they had no addresses
    _project_body("project_", Ts, Ts, bases, Cs, left)


@_project_in_place_op.register_fake
def _(Ts: list[Tensor], bases: list[Tensor], Cs: list[Tensor], left: bool) -> None:
    return None
