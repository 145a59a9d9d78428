"""Projection against what a user of PyTorch would write, in one run.

    python benchmarks/bench_project.py [--device cpu|cuda] [--quick]

Every figure is a ratio: `share` of the bandwidth of a plain copy (of the floor: `T` read once,
written once), and `over` each rival, its time by ours.
"""

import torch
from harness import copy_bandwidth, host_time, main, nbytes, peak_extra, timed
from torch import Tensor

import grasp_kernels as gk
from grasp_kernels.testing import orthonormal

GPU_SHAPES = [
    ("right", 8192, 4096, torch.bfloat16, 16),
    ("right", 65536, 4096, torch.bfloat16, 16),
    ("right", 16384, 8192, torch.bfloat16, 64),
    ("right", 8192, 16384, torch.bfloat16, 16),
    ("right", 16384, 4096, torch.float32, 16),
    ("left", 4096, 14336, torch.bfloat16, 16),
    ("left", 4096, 14336, torch.bfloat16, 64),
    ("left", 14336, 4096, torch.bfloat16, 16),
    ("left", 8192, 28672, torch.bfloat16, 64),
    ("left", 4096, 14336, torch.float32, 16),
]
CPU_SHAPES = [("right", 4096, 14336, torch.float32, 16), ("left", 4096, 14336, torch.float32, 16)]
# LoRA factors of a block, (outputs, inputs) of each linear map; then the number of blocks.
MODELS = {
    "8B": ([(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096)] + [(14336, 4096)] * 2, 32),
    "70B": ([(8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192)] + [(28672, 8192)] * 2, 80),
}
DOWN = {"8B": (4096, 14336), "70B": (8192, 28672)}


def naive(T: Tensor, U: Tensor, side: str) -> None:
    T -= U @ (U.mT @ T) if side == "left" else (T @ U) @ U.mT


def addmm(T: Tensor, U: Tensor, side: str) -> None:
    if side == "left":
        T.addmm_(U, U.mT @ T, alpha=-1)
    else:
        T.addmm_(T @ U, U.mT, alpha=-1)


def matrices(device: torch.device, quick: bool) -> list[dict]:
    shapes = GPU_SHAPES if device.type == "cuda" else CPU_SHAPES
    copied = copy_bandwidth(device)
    return [_matrix(device, copied, *shape) for shape in (shapes[:4] if quick else shapes)]


def _matrix(device, copied: float, side: str, m: int, n: int, dtype, k: int) -> dict:
    T = torch.randn(m, n, device=device).to(dtype)
    U = orthonormal(m if side == "left" else n, k).to(device)
    V = U.to(dtype)
    runs = {
        "ours": lambda: gk.project_(T, U, side=side),
        "naive": lambda: naive(T, V, side),
        "addmm_": lambda: addmm(T, V, side),
    }
    if device.type == "cuda":
        compiled = torch.compile(naive)
        runs["compile"] = lambda: compiled(T, V, side)
    times = timed(runs, device, 30 if device.type == "cuda" else 9)
    return {
        "side": side,
        "shape": [m, n],
        "dtype": str(dtype).removeprefix("torch."),
        "k": k,
        "backend": gk.explain(T, U, side).splitlines()[0].split(": ")[1],
        "ms": times["ours"],
        "share": 2 * nbytes([T]) / (times["ours"] / 1e3) / copied,
        "over": {name: t / times["ours"] for name, t in times.items() if name != "ours"},
        "extra_memory": {
            name: peak_extra(runs[name], device) / nbytes([T]) for name in ("ours", "addmm_")
        },
    }


def lists(device: torch.device, quick: bool) -> list[dict]:
    rows = []
    for name, (block, blocks) in MODELS.items():
        if device.type != "cuda":
            blocks = 2
        maps = [*block, DOWN[name]] * blocks
        outputs, inputs = zip(*maps, strict=True)
        # A few directions of outputs, and as many of inputs as a real model's bases have.
        for side, widths, k in (("left", outputs, 8), ("right", inputs, 8), ("right", inputs, 160)):
            shape = (lambda d: (d, 16)) if side == "left" else (lambda d: (16, d))
            Ts = [torch.randn(shape(d), device=device) for d in widths]
            bases = {d: orthonormal(d, k).to(device) for d in set(widths)}
            Us = [bases[d].clone() for d in widths]
            one = torch.ones((), device=device)

            def loop(Ts=Ts, Us=Us, side=side):
                for T, U in zip(Ts, Us, strict=True):
                    addmm(T, U, side)

            runs = {
                "ours": gk.Projector(Ts, Us, side=side),
                "project_": lambda Ts=Ts, Us=Us, side=side: gk.project_(Ts, Us, side=side),
                "foreach_mul_": lambda Ts=Ts, one=one: torch._foreach_mul_(Ts, one),
                "addmm_ loop": loop,
            }
            times = timed(runs, device, 20 if device.type == "cuda" else 5)
            rows.append(
                {
                    "list": f"{name} {side}, {len(Ts)} factors, r = 16, k = {k}, fp32",
                    "ms": times["ours"],
                    "host_us": host_time(runs["ours"], 20),
                    "over": {n: t / times["ours"] for n, t in times.items() if n != "ours"},
                }
            )
    return rows


def measure(device: torch.device, quick: bool) -> list[dict]:
    return matrices(device, quick) + lists(device, quick)


if __name__ == "__main__":
    main(__doc__, "project", measure)
