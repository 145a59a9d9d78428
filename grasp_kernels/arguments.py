"""What the operations are given: refused at the door, or brought to one form."""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .autocast import set_aside

Side = Literal["right", "left"]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PLAIN = {Tensor, torch.nn.Parameter}  # types that hide no other tensors


class Given(NamedTuple):
    """Arguments of `project_` as lists, without the tensors that were None."""

    tensors: list[Tensor]
    bases: list[Tensor]
    Cs: list[Tensor]
    left: bool


def checked(
    Ts: Tensor | Sequence[Tensor | None],
    bases: Tensor | Sequence[Tensor],
    Cs: Tensor | Sequence[Tensor] | None,
    side: str,
    check: bool = False,
) -> Given:
    """Arguments of `project_` in one form; see there for what they may be, and the errors."""
    left = is_left(side)
    alone = Ts is None or isinstance(Ts, Tensor)
    given = [Ts] if alone else list(Ts)
    all_bases = _one_each("bases", bases, len(given))
    all_Cs = [] if Cs is None else _one_each("Cs", Cs, len(given))
    found = Given([], [], [], left)
    for i, T in enumerate(given):
        if T is None and not alone:
            continue
        name = "Ts" if alone else f"Ts[{i}]"
        C = None
        if all_Cs:
            C = all_Cs[i]
            check_matrix("Cs" if isinstance(Cs, Tensor) else f"Cs[{i}]", C)
            found.Cs.append(C)
        basis_name = "basis" if isinstance(bases, Tensor) else f"bases[{i}]"
        found.bases.append(check_pair(name, T, basis_name, all_bases[i], C, left))
        _check_in_place(name, T)
        found.tensors.append(T)
    if not traced(found.tensors):  # else the registered operator's own body asks
        check_distinct(found.tensors)
    if check:
        check_orthonormal(found.bases[:1] if isinstance(bases, Tensor) else found.bases)
    return found


def check_pair(
    name: str, T: Tensor, basis_name: str, basis: Tensor, C: Tensor | None, left: bool
) -> Tensor:
    """The basis as `[*b, d, k]`; refuses what doesn't fit together."""
    check_matrix(name, T)
    check_matrix(basis_name, basis)
    if basis.ndim == 1:
        basis = basis[:, None]
    *batch, d, k = basis.shape if basis.ndim else (0, 1)
    if k > d:
        raise ValueError(
            f"{basis_name} is {list(basis.shape)}; it must be [d], [d, k] or [b, d, k] with k ≤ d"
        )
    shape = T.shape
    least = len(batch) + 2 if batch or left else 1
    if len(shape) < least:
        form = "d, n" if left else "n, d" if batch else "d"
        raise ValueError(
            f"{name} is {list(shape)}; it must be [{'b, ' if batch else ''}..., {form}]"
        )
    width = shape[-2 if left else -1]
    if width != d:
        which = "left: rows" if left else "right: columns"
        raise ValueError(
            f"{name} is {list(shape)} with {width} {which} for a basis of d = {d}; "
            "transpose it or change side"
        )
    if batch and list(shape[: len(batch)]) != batch:
        raise ValueError(
            f"{name} is {list(shape)} and {basis_name} {list(basis.shape)}; a basis of [b, d, k] "
            f"is one for each of {name}'s leading b = {shape[0]}"
        )
    device = T.device
    if device != basis.device:
        raise ValueError(f"{name} is on {device}, {basis_name} on {basis.device}; move one of them")
    if C is not None:
        _check_C(name, T, C, k, left)
    return basis


def _check_C(name: str, T: Tensor, C: Tensor, k: int, left: bool) -> None:
    check_matrix("C", C)
    expected = [*T.shape[:-2], k, T.shape[-1]] if left else [*T.shape[:-1], k]
    if list(C.shape) != expected:
        raise ValueError(f"C is {list(C.shape)}; for {name} of {list(T.shape)} give {expected}")
    if C.device != T.device:
        raise ValueError(f"C is on {C.device}, {name} on {T.device}; move one of them")
    if C.dtype not in (torch.float32, T.dtype):
        raise TypeError(f"C is {C.dtype}; give fp32 or {name}'s {T.dtype}")


def is_left(side: str) -> bool:
    if side not in ("right", "left"):
        raise ValueError(f"side is {side!r}; choose 'right' or 'left'")
    return side == "left"


def _one_each(name: str, given: Tensor | Sequence[Tensor], count: int) -> list[Tensor]:
    if isinstance(given, Tensor):
        return [given] * count
    given = list(given)
    if len(given) != count:
        raise ValueError(f"{name} has {len(given)} tensors for {count} in Ts; give one for each")
    return given


def check_matrix(name: str, tensor: Tensor) -> None:
    """Refuse what is no plain dense floating-point tensor."""
    if type(tensor) not in PLAIN:
        _check_type(name, tensor)
    if tensor.is_nested:
        raise TypeError(f"{name} is nested; pass the list {name}.unbind()")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} has layout {tensor.layout}; pass {name}.to_dense()")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} is {tensor.dtype}; convert it to fp64, fp32, bf16 or fp16")


def _check_type(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; give a torch.Tensor")
    if hasattr(tensor, "to_local"):
        raise TypeError(f"{name} is a DTensor; project each process's part: pass {name}.to_local()")
    if hasattr(tensor, "__tensor_flatten__"):
        raise TypeError(
            f"{name} is a {type(tensor).__name__}, which wraps other tensors; "
            "convert it to a plain one (dequantize it)"
        )


def _check_in_place(name: str, T: Tensor) -> None:
    if _overlaps(T):
        raise ValueError(f"{name} overlaps itself (expanded?); pass {name}.contiguous()")
    if torch.is_grad_enabled() and T.requires_grad and not T.is_leaf:
        raise ValueError(f"{name} is part of an autograd graph; use project, or pass .detach()")


def _overlaps(T: Tensor) -> bool:
    """Whether two elements may share memory: an expanded tensor, or a sliding window."""
    if T.is_contiguous():
        return False
    extent = 0
    for stride, size in sorted(zip(T.stride(), T.shape, strict=True)):
        if size > 1:
            if stride <= extent:
                return True
            extent += (size - 1) * stride
    return False


def traced(tensors: Iterable[Tensor]) -> bool:
    """Whether these stand for tensors that are not there yet: then an operator is recorded."""
    return torch.compiler.is_compiling() or any(type(T) not in PLAIN for T in tensors)


def check_distinct(tensors: Sequence[Tensor]) -> None:
    """Refuse a tensor that is listed twice."""
    if torch.compiler.is_compiling():  # no addresses yet
        return
    seen: dict[tuple[torch.device, int], int] = {}
    for i, T in enumerate(tensors):
        try:
            address = T.data_ptr()
        except RuntimeError as error:
            raise TypeError(
                f"Ts[{i}] has no memory to be projected in (inside vmap?); use project"
            ) from error
        if address == 0:  # empty, or on the meta device
            continue
        if (first := seen.setdefault((T.device, address), i)) != i:
            raise ValueError(
                f"Ts[{i}] and Ts[{first}] are the same memory (tied weights?); list each once"
            )


@set_aside()
def check_orthonormal(bases: Sequence[Tensor]) -> None:
    """Refuse a basis `[*b, d, k]` whose columns are not orthonormal.

        ‖Vᵀ V − I‖ ≤ √k (ε + 64 ε₊)     ε of its dtype: it was rounded;  ε₊ of the sums' dtype

    The values are waited for, once a device.
    """
    defects: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for i, basis in enumerate(bases):
        if basis.numel():
            V = basis.to(torch.promote_types(basis.dtype, torch.float32))
            excess = V.mT @ V - torch.eye(V.shape[-1], dtype=V.dtype, device=V.device)
            defect = torch.linalg.matrix_norm(excess).amax()
            defects.setdefault(basis.device, []).append((i, defect.double()))
    for on_device in defects.values():
        members, values = zip(*on_device, strict=True)
        for i, defect in zip(members, torch.stack(values).tolist(), strict=True):
            dtype = bases[i].dtype
            sums = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
            bound = bases[i].shape[-1] ** 0.5 * (torch.finfo(dtype).eps + 64 * sums)
            if not defect <= bound:  # NaN too
                which = "basis" if len(bases) == 1 else f"bases[{i}]"
                raise ValueError(
                    f"{which} is not orthonormal: ‖VᵀV − I‖ is {defect:.2g}, above {bound:.2g} for "
                    f"{dtype}; call gk.orthonormalize_, or divide a direction by its norm"
                )
