"""Projection against what a user of PyTorch would write, in one run.

    python benchmarks/bench_project.py [--device cpu|cuda] [--quick]

Every figure is a ratio: `share` of the speed of a plain copy of the same matrix (of the floor: `T`
read once, written once), and `over` each rival, its time by ours.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import cache
from typing import NamedTuple

import torch
from harness import host_time, main, nbytes, peak_extra, timed
from torch import Tensor

import grasp_kernels as gk
from grasp_kernels.testing import orthonormal

Runs = dict[str, Callable[[], object]]


class Matrix(NamedTuple):
    """One matrix, stored `[m, n]`, and a basis of k directions on its right or left."""

    side: str
    m: int
    n: int
    dtype: torch.dtype
    k: int

    def about(self) -> dict:
        dtype = str(self.dtype).removeprefix("torch.")
        return {"side": self.side, "shape": [self.m, self.n], "dtype": dtype, "k": self.k}

    def __str__(self) -> str:
        return "{side} {shape[0]}×{shape[1]} {dtype} k {k}".format(**self.about())

    def made(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """`T`, and its basis in fp32."""
        T = torch.randn(self.m, self.n, device=device).to(self.dtype)
        return T, _basis(self.m if self.side == "left" else self.n, self.k).to(device)


@cache
def _basis(d: int, k: int) -> Tensor:
    return orthonormal(d, k)


HALF, FULL = torch.bfloat16, torch.float32
LEFT = ((4096, 14336), (14336, 4096), (8192, 28672))
GPU_MATRICES = [  # the most telling first
    *(Matrix("right", m, 4096, HALF, k) for m in (16384, 65536) for k in (16, 64)),
    *(Matrix("left", *shape, HALF, k) for shape in LEFT for k in (16, 64)),
    *(Matrix("right", 16384, 4096, FULL, k) for k in (16, 64)),
    *(Matrix("right", 16384, 4096, dtype, 256) for dtype in (HALF, FULL)),
    Matrix("right", 16384, 8192, HALF, 64),
    Matrix("right", 8192, 16384, HALF, 16),
    *(Matrix("right", 65536, 4096, FULL, k) for k in (16, 64)),
    Matrix("left", 4096, 14336, FULL, 16),
    *(Matrix("right", 65536, 4096, dtype, 256) for dtype in (HALF, FULL)),
]
CPU_MATRICES = [Matrix("right", 4096, 14336, FULL, 16), Matrix("left", 4096, 14336, FULL, 16)]


def naive(T: Tensor, U: Tensor, side: str) -> None:
    T -= U @ (U.mT @ T) if side == "left" else (T @ U) @ U.mT


def addmm(T: Tensor, U: Tensor, side: str) -> None:
    if side == "left":
        T.addmm_(U, U.mT @ T, alpha=-1)
    else:
        T.addmm_(T @ U, U.mT, alpha=-1)


def by_backend(name: str | None, run: Callable[[], object]) -> Callable[[], object]:
    """The same on one backend; on the one that is chosen for it where `name` is None."""

    def on_it():
        with gk.backend(name) if name else nullcontext():
            run()

    return on_it


def refused(name: str, T: Tensor, U: Tensor, side: str) -> str | None:
    """Why a backend can't project this, or None."""
    try:
        with gk.backend(name):
            gk.explain(T, U, side)
    except RuntimeError as reason:
        return str(reason)
    return None


def matrix_runs(T: Tensor, U: Tensor, side: str, ours: Sequence[str | None]) -> Runs:
    """A copy, ours by each backend, and what PyTorch users write, all on one matrix."""
    target, V = torch.empty_like(T), U.to(T.dtype)
    runs: Runs = {"copy": lambda: target.copy_(T)}
    for name in ours:
        runs[name or "ours"] = by_backend(name, lambda: gk.project_(T, U, side=side))
    return runs | {"naive": lambda: naive(T, V, side), "addmm_": lambda: addmm(T, V, side)}


def compiled(T: Tensor, U: Tensor, side: str, compiler: str = "inductor") -> Callable[[], object]:
    """`naive` by `torch.compile`, which forgets the shapes that it saw before."""
    torch.compiler.reset()
    V, run = U.to(T.dtype), torch.compile(naive, backend=compiler, dynamic=False)
    return lambda: run(T, V, side)


def matrices(device: torch.device, quick: bool) -> Iterator[dict]:
    cases = GPU_MATRICES if device.type == "cuda" else CPU_MATRICES
    for case in cases[:4] if quick else cases:
        T, U = case.made(device)
        runs = matrix_runs(T, U, case.side, [None])
        if device.type == "cuda":
            runs["compile"] = compiled(T, U, case.side)
        times = timed(runs, device, 30 if device.type == "cuda" else 9)
        ours, copied = times["ours"], times.pop("copy")
        yield case.about() | {
            "backend": chosen(T, U, case.side),
            "ms": ours,
            "share": copied / ours,
            "over": {name: t / ours for name, t in times.items() if name != "ours"},
            "extra_memory": {
                name: peak_extra(runs[name], device) / nbytes([T]) for name in ("ours", "addmm_")
            },
        }


def chosen(T: Tensor, U: Tensor, side: str) -> str:
    """The backend that projects this where nobody asks for one."""
    return gk.explain(T, U, side).splitlines()[0].split(": ")[1]


# Linear maps of a block, (outputs, inputs); those with one number take in the same. Then blocks,
# and k of a basis that holds what a map takes in on a few hundred prompts: 0.4 d.
MODELS = {
    "8B": (
        [(0, 4096, 4096), (0, 1024, 4096), (0, 1024, 4096), (1, 4096, 4096)]
        + [(2, 14336, 4096), (2, 14336, 4096), (3, 4096, 14336)],
        32,
        {4096: 1640, 14336: 5700},
    ),
    "70B": (
        [(0, 8192, 8192), (0, 1024, 8192), (0, 1024, 8192), (1, 8192, 8192)]
        + [(2, 28672, 8192), (2, 28672, 8192), (3, 8192, 28672)],
        80,
        {},
    ),
    "tiny": ([(0, 48, 32), (0, 16, 32), (1, 32, 48)], 1, {32: 20, 48: 24}),
}
R = 16
WIDE = None  # in place of k: a basis of the model's own width
LISTS = [  # the model, which factors, k
    ("8B", "A", WIDE),
    ("8B", "B", 4),
    ("8B", "A", 8),
    ("8B", "B", 16),
    ("70B", "B", 4),
]


def factors(
    model: str, holds: str, k: int | None, device: torch.device, blocks: int | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """LoRA factors of a model in fp32 and their bases: A `[16, d_in]`, B `[d_out, 16]`.

    Each B has a basis of its own; maps with one input share theirs, as a guard's do.
    """
    block, usual, wide = MODELS[model]
    made: dict[int, Tensor] = {}
    Ts, Us = [], []
    for _ in range(blocks or usual):
        shared: dict[int, Tensor] = {}
        for taken_in, outputs, inputs in block:
            d = inputs if holds == "A" else outputs
            if d not in made:
                made[d] = _on_device(d, wide[d] if k is WIDE else k, device)
            key = taken_in if holds == "A" else len(shared)
            if key not in shared:
                shared[key] = made[d].clone()
            Us.append(shared[key])
            Ts.append(torch.randn((R, d) if holds == "A" else (d, R), device=device))
    return Ts, Us


def _on_device(d: int, k: int, device: torch.device) -> Tensor:
    """Thousands of directions are made where they are wanted: a CPU takes minutes over them."""
    if k > 512:
        return torch.linalg.qr(torch.randn(d, k, device=device)).Q
    return _basis(d, k).to(device)


def distinct(Us: Sequence[Tensor]) -> list[Tensor]:
    return list({U.data_ptr(): U for U in Us}.values())


def list_runs(Ts: list[Tensor], Us: list[Tensor], side: str) -> Runs:
    """Ours laid out once and anew, PyTorch one by one and grouped, and one product for each."""
    one = torch.ones((), device=Ts[0].device)

    def loop():
        for T, U in zip(Ts, Us, strict=True):
            addmm(T, U, side)

    return {
        "ours": gk.Projector(Ts, Us, side=side),
        "project_": lambda: gk.project_(Ts, Us, side=side),
        "addmm_ loop": loop,
        "grouped": _by_basis(Ts, Us) if side == "right" else _by_shape(Ts, Us),
        "foreach_mul_": lambda: torch._foreach_mul_(Ts, one),
    }


def _by_basis(Ts: list[Tensor], Us: list[Tensor]) -> Callable[[], None]:
    """Factors that share a basis go through cuBLAS together: [16, d] each, [48, d] of three."""
    groups: dict[int, tuple[Tensor, list[Tensor]]] = {}
    for T, U in zip(Ts, Us, strict=True):
        groups.setdefault(U.data_ptr(), (U, []))[1].append(T)

    def run():
        for V, group in groups.values():
            X = torch.cat(group) if len(group) > 1 else group[0]
            addmm(X, V, "right")
            if len(group) > 1:
                torch._foreach_copy_(group, X.split([T.shape[0] for T in group]))

    return run


def _by_shape(Ts: list[Tensor], Us: list[Tensor]) -> Callable[[], None]:
    """Factors of one shape as a batch; their bases are stacked once, before."""
    groups: dict[torch.Size, list[int]] = {}
    for i, T in enumerate(Ts):
        groups.setdefault(T.shape, []).append(i)
    batches = [([Ts[i] for i in g], torch.stack([Us[i] for i in g])) for g in groups.values()]

    def run():
        for group, W in batches:
            X = torch.stack(group)
            X.baddbmm_(W, W.mT @ X, alpha=-1)
            torch._foreach_copy_(group, X.unbind())

    return run


def lists(device: torch.device, quick: bool) -> Iterator[dict]:
    for model, holds, k in LISTS[:2] if quick else LISTS:
        blocks = None
        if device.type != "cuda":  # two blocks, and no wider than a CPU makes soon
            blocks, k = 2, 160 if k is WIDE else k
        Ts, Us = factors(model, holds, k, device, blocks)
        side = "right" if holds == "A" else "left"
        runs = list_runs(Ts, Us, side)
        times = timed(runs, device, 20 if device.type == "cuda" else 5)
        yield {
            "list": f"{model} {holds}, {len(Ts)} factors, r = {R}, k = {k or 'wide'}, fp32",
            "ms": times["ours"],
            "host_us": host_time(runs["ours"], 20),
            "over": {n: t / times["ours"] for n, t in times.items() if n != "ours"},
        }


def measure(device: torch.device, quick: bool) -> Iterator[dict]:
    yield from matrices(device, quick)
    yield from lists(device, quick)


if __name__ == "__main__":
    main(__doc__, "project", measure)
