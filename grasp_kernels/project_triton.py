"""Projection in Triton: one launch for a list, one read of `T` from memory and one write.

    right   strip [BS, d]   c = Σ_e X[:, e] V[e, :];   X ← X − (c − C) Vᵀ
    left    strip [d, BS]   c = Σ_e U[e, :]ᵀ X[e, :];  X ← X − U (c − C)

A program owns a strip. It walks along d to find the strip's coefficients, then back, so that what
it read last, still in cache, is written first. Only as many programs run at a time as leave their
strips in the second-level cache, so the second read does not go to memory.
"""

from collections import OrderedDict
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from grasp_kernels.matrices import matrices

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MIXED = 3
COLUMNS = 14  # of a row of the table, as `_row` fills it
KEPT = 256  # tables


@triton.jit
def rounded(x, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """To the stored dtype, to nearest even: the interpreter's own cast to bf16 truncates."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + ((bits >> 16) & 1) + 0x7FFF) >> 16
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def _strip(
    row,
    index,
    DTYPE: tl.constexpr,
    LEFT: tl.constexpr,
    KP: tl.constexpr,
    BS: tl.constexpr,
    BD: tl.constexpr,
    ALIGNED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    T = tl.load(row).to(tl.pointer_type(DTYPE))
    out = tl.load(row + 1).to(tl.pointer_type(DTYPE))
    basis = tl.load(row + 2).to(tl.pointer_type(tl.float32))
    C = tl.load(row + 3)
    n, d, k = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)
    step, out_step = tl.load(row + 7), tl.load(row + 8)  # elements between rows of T
    basis_d, basis_k = tl.load(row + 9), tl.load(row + 10)
    C_n, C_k = tl.load(row + 11), tl.load(row + 12)
    if ALIGNED:
        T, out = tl.multiple_of(T, 16), tl.multiple_of(out, 16)
        step, out_step = tl.multiple_of(step, 16), tl.multiple_of(out_step, 16)
        n, d = tl.multiple_of(n, 16), tl.multiple_of(d, 16)
    # A 16-bit T is exact in tf32, and what tf32 drops of the basis is below T's own rounding. Three
    # products of halves are as good as fp32.
    PRECISION: tl.constexpr = "tf32x3" if DTYPE == tl.float32 else "tf32"
    r = tl.arange(0, BS)
    j = tl.arange(0, KP)
    e = tl.arange(0, BD)
    # Offsets inside a tile fit 32 bits; where a strip and a block begin may need 64.
    first = index.to(tl.int64) * BS
    inside_n = r < n - first
    step32, out_step32 = step.to(tl.int32), out_step.to(tl.int32)
    V_tile = e[:, None] * basis_d.to(tl.int32) + j[None, :] * basis_k.to(tl.int32)
    if LEFT:
        T, out = T + first, out + first
        tile, out_tile = e[:, None] * step32 + r[None, :], e[:, None] * out_step32 + r[None, :]
        stride, out_stride = step * BD, out_step * BD
        c = tl.zeros((KP, BS), tl.float32)
    else:
        T, out = T + first * step, out + first * out_step
        tile, out_tile = r[:, None] * step32 + e[None, :], r[:, None] * out_step32 + e[None, :]
        stride, out_stride = tl.full((), BD, tl.int64), tl.full((), BD, tl.int64)
        c = tl.zeros((BS, KP), tl.float32)
    blocks = tl.cdiv(d, BD)
    for block in range(0, blocks):
        inside_d = e < d - block * BD
        V = tl.load(
            basis + block * BD * basis_d + V_tile,
            mask=inside_d[:, None] & (j[None, :] < k),
            other=0.0,
        )
        if LEFT:
            inside = inside_d[:, None] & inside_n[None, :]
            X = tl.load(T + block * stride + tile, mask=inside, other=0.0)
            c = tl.dot(tl.trans(V), X.to(tl.float32), c, input_precision=PRECISION)
        else:
            inside = inside_n[:, None] & inside_d[None, :]
            X = tl.load(T + block * stride + tile, mask=inside, other=0.0)
            c = tl.dot(X.to(tl.float32), V, c, input_precision=PRECISION)
    if C != 0:
        pinned = C.to(tl.pointer_type(tl.float32)) + first * C_n
        if LEFT:
            inside = (j[:, None] < k) & inside_n[None, :]
            c -= tl.load(pinned + r[None, :] * C_n + j[:, None] * C_k, mask=inside, other=0.0)
        else:
            inside = inside_n[:, None] & (j[None, :] < k)
            c -= tl.load(pinned + r[:, None] * C_n + j[None, :] * C_k, mask=inside, other=0.0)
    for done in range(0, blocks):
        block = blocks - 1 - done
        inside_d = e < d - block * BD
        V = tl.load(
            basis + block * BD * basis_d + V_tile,
            mask=inside_d[:, None] & (j[None, :] < k),
            other=0.0,
        )
        if LEFT:
            inside = inside_d[:, None] & inside_n[None, :]
            X = tl.load(T + block * stride + tile, mask=inside, other=0.0)
            X = X.to(tl.float32) - tl.dot(V, c, input_precision=PRECISION)
        else:
            inside = inside_n[:, None] & inside_d[None, :]
            X = tl.load(T + block * stride + tile, mask=inside, other=0.0)
            X = X.to(tl.float32) - tl.dot(c, tl.trans(V), input_precision=PRECISION)
        target = out + block * out_stride + out_tile
        tl.store(target, rounded(X, DTYPE, INTERPRETED), mask=inside)


@triton.jit
def project_kernel(
    table,
    strips,
    count,
    COLUMNS: tl.constexpr,
    CODE: tl.constexpr,
    LEFT: tl.constexpr,
    KP: tl.constexpr,
    BS: tl.constexpr,
    BD: tl.constexpr,
    ALIGNED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Each program takes every so-many-th strip; `strips` holds (tensor, strip of it) pairs."""
    for strip in range(tl.program_id(0), count, tl.num_programs(0)):
        row = table + tl.load(strips + 2 * strip) * COLUMNS
        index = tl.load(strips + 2 * strip + 1)
        if CODE == 0:
            _strip(row, index, tl.float32, LEFT, KP, BS, BD, ALIGNED, INTERPRETED)
        elif CODE == 1:
            _strip(row, index, tl.bfloat16, LEFT, KP, BS, BD, ALIGNED, INTERPRETED)
        elif CODE == 2:
            _strip(row, index, tl.float16, LEFT, KP, BS, BD, ALIGNED, INTERPRETED)
        else:
            code = tl.load(row + 13)
            if code == 0:
                _strip(row, index, tl.float32, LEFT, KP, BS, BD, ALIGNED, INTERPRETED)
            elif code == 1:
                _strip(row, index, tl.bfloat16, LEFT, KP, BS, BD, ALIGNED, INTERPRETED)
            else:
                _strip(row, index, tl.float16, LEFT, KP, BS, BD, ALIGNED, INTERPRETED)


INTERPRETED = isinstance(project_kernel, InterpretedFunction)


def project_triton(
    Ts: list[Tensor], outs: list[Tensor], bases: list[Tensor], Cs: list[Tensor], left: bool
) -> None:
    """Each of `Ts` projected into its place in `outs`, which may be the tensor itself.

    One launch for each device and orientation in the list; arguments as `project_` has checked.
    """
    groups: dict[tuple, list[_Job]] = {}
    staged: list[tuple[Tensor, Tensor]] = []
    for i, T in enumerate(Ts):
        for matrix, out, C in matrices(T, outs[i], Cs[i] if Cs else None, left, staged):
            job = _Job(matrix, out, bases[i], C, left)
            groups.setdefault((T.device, job.left), []).append(job)
    for (device, side), jobs in groups.items():
        _launch(jobs, side, device)
    for kept, out in staged:
        out.copy_(kept)


class _Job:
    """A matrix whose rows are contiguous, and what is done to it."""

    __slots__ = ("C", "T", "basis", "left", "out")

    def __init__(self, T: Tensor, out: Tensor, basis: Tensor, C: Tensor | None, left: bool):
        if T.stride(1) != 1 or out.stride(1) != 1:  # its transpose, from the other side
            T, out, left = T.mT, out.mT, not left
            C = None if C is None else C.mT
        self.T, self.out, self.left = T, out, left
        self.basis = basis.float()
        self.C = None if C is None else C.float()

    def row(self) -> tuple[int, ...]:
        T, out, basis, C = self.T, self.out, self.basis, self.C
        d, k = basis.shape
        C_n, C_k = (0, 0) if C is None else C.stride()[::-1] if self.left else C.stride()
        return (
            T.data_ptr(),
            out.data_ptr(),
            basis.data_ptr(),
            0 if C is None else C.data_ptr(),
            T.numel() // d,
            d,
            k,
            T.stride(0),
            out.stride(0),
            *basis.stride(),
            C_n,
            C_k,
            CODES[T.dtype],
        )


def _launch(jobs: list[_Job], left: bool, device: torch.device) -> None:
    rows = tuple(job.row() for job in jobs)
    KP = max(16, triton.next_power_of_2(max(job.basis.shape[1] for job in jobs)))
    codes = {CODES[job.T.dtype] for job in jobs}
    size = max(job.T.element_size() for job in jobs)
    code = codes.pop() if len(codes) == 1 else MIXED
    options = tiling(code, left, KP, widest=max(row[4] for row in rows))
    table, strips, aligned = _tables(rows, options["BS"], device)
    count = strips.shape[0]
    strip = max(row[5] for row in rows) * options["BS"] * size
    grid = (min(count, _resident(device, strip)),)
    with on_device(device):
        project_kernel[grid](
            table, strips, count, COLUMNS, **options, ALIGNED=aligned, INTERPRETED=INTERPRETED
        )


def tiling(code: int, left: bool, KP: int, widest: int) -> dict:
    """The kernel's constants and warps: without spilled registers on any architecture.

    A strip is 64 bytes across, two sectors of memory, and reads the basis twice: a narrower one
    would read more of the basis than of `T`. A LoRA factor is no wider than its rank.
    """
    half = code in (CODES[torch.bfloat16], CODES[torch.float16])
    BS = 32 if half and widest > 16 else 16
    BD = 64 if KP <= 32 else 32
    return {"CODE": code, "LEFT": left, "KP": KP, "BS": BS, "BD": BD, "num_warps": 4}


def _resident(device: torch.device, strip: int) -> int:
    """Programs at a time: strips of `strip` bytes that leave half of the second-level cache."""
    if device.type != "cuda":
        return 4
    about = torch.cuda.get_device_properties(device)
    fits = about.L2_cache_size // 2 // strip
    return max(about.multi_processor_count, min(fits, 4 * about.multi_processor_count))


_cache: OrderedDict[tuple, tuple[Tensor, Tensor, bool]] = OrderedDict()


def _tables(
    rows: tuple[tuple[int, ...], ...], BS: int, device: torch.device
) -> tuple[Tensor, Tensor, bool]:
    """Table, strips and alignment, kept by what they hold, so that the same list costs no copy."""
    key = (rows, BS, device)
    if key in _cache:
        _cache.move_to_end(key)
        return _cache[key]
    pairs = [(i, s) for i, row in enumerate(rows) for s in range(-(-row[4] // BS))]
    # 16 elements of the smaller dtypes are 32 bytes, so whole vectors lie inside or outside.
    aligned = all(
        row[0] % 16 == row[1] % 16 == 0 and all(v % 16 == 0 for v in (*row[4:6], *row[7:9]))
        for row in rows
    )
    found = tuple(
        to_device(torch.tensor(values, dtype=dtype), device)
        for values, dtype in ((rows, torch.int64), (pairs, torch.int32))
    )
    _cache[key] = (*found, aligned)
    if len(_cache) > KEPT:
        _cache.popitem(last=False)
    return _cache[key]


def on_device(device: torch.device):
    """Triton launches on the current device, whichever holds the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A copy that may be captured in a graph: from pinned memory, which stays while it is used."""
    if device.type != "cuda":
        return host
    pinned = host.pin_memory()
    moved = pinned.to(device, non_blocking=True)
    moved._host = pinned
    return moved
