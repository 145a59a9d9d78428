"""The matrices and lists that all kernels are asked about, and what is said of each."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ..aot import CudaJob, TritonJob
from ..static_model import Work

SIZES = {"fp32": 4, "bf16": 2}
CODES = {"fp32": 0, "bf16": 1, "fp16": 2}
MMA = "HMMA|HGMMA|UTCHMMA"  # a tensor core's product, whatever its form


@dataclass(frozen=True)
class Case:
    """A launch: how its kernel is compiled, and what it has to do."""

    name: str
    job: TritonJob | CudaJob
    work: Work


class Matrix(NamedTuple):
    """T is `[n, d]` from its right side and `[d, n]` from its left."""

    side: str
    n: int
    d: int
    k: int
    dtype: str

    @property
    def name(self) -> str:
        n, d = (self.n, self.d) if self.side == "right" else (self.d, self.n)
        return f"{self.side} [{n}, {d}] {self.dtype} k {self.k}"

    @property
    def bytes(self) -> int:
        return self.n * self.d * SIZES[self.dtype]

    @property
    def basis(self) -> int:
        """Bytes of it."""
        return self.d * self.k * 4


LARGE = [  # side, n, d, dtype, ranks
    ("right", 16384, 4096, "bf16", (16, 64, 256)),
    ("right", 65536, 4096, "bf16", (16, 64, 256)),
    ("right", 16384, 4096, "fp32", (16, 64, 256)),
    ("right", 65536, 4096, "fp32", (16, 64, 256)),
    ("right", 16384, 8192, "bf16", (64,)),
    ("right", 8192, 16384, "bf16", (16,)),
    ("left", 14336, 4096, "bf16", (16, 64)),
    ("left", 4096, 14336, "bf16", (16, 64)),
    ("left", 28672, 8192, "bf16", (16, 64)),
    ("left", 14336, 4096, "fp32", (16,)),
]


def large() -> Iterator[Matrix]:
    for side, n, d, dtype, ranks in LARGE:
        for k in ranks:
            yield Matrix(side, n, d, k, dtype)


# Of the 32 layers of an 8B model: q, k, v, o, gate, up, down.
INPUTS = (4096, 4096, 4096, 4096, 4096, 4096, 14336)
OUTPUTS = (4096, 1024, 1024, 4096, 14336, 14336, 4096)
SHARED = (0, 0, 0, 3, 4, 4, 6)  # whose basis of inputs each has: q, k, v are given the same ones


class Factors(NamedTuple):
    """fp32 LoRA factors of rank 16, a basis for each or shared where inputs are."""

    name: str
    matrices: list[Matrix]
    basis_of: list[int]


def _factors(name: str, side: str, ds: tuple, k: int, wide: int = 0) -> Factors:
    one = [Matrix(side, 16, d, wide if d == 14336 and wide else k, "fp32") for d in ds]
    shared = SHARED if side == "right" else range(7)
    bases = [layer * 7 + i for layer in range(32) for i in shared]
    return Factors(f"{name}, 224 fp32", one * 32, bases)


LISTS = [
    _factors("LoRA A k 8", "right", INPUTS, 8),
    _factors("LoRA B k 4", "left", OUTPUTS, 4),
    _factors("LoRA B k 16", "left", OUTPUTS, 16),
    _factors("LoRA A wide", "right", INPUTS, 1640, wide=5700),
]
