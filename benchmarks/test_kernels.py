"""The kernels on your own machine: pip install pytest-benchmark; pytest benchmarks/test_kernels.py

Each shape by every backend that runs here and by plain PyTorch.
"""

import pytest
import torch
from bench_project import addmm

import grasp_kernels as gk
from grasp_kernels.testing import orthonormal

pytest.importorskip("pytest_benchmark")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [("right", 4096, 4096), ("left", 4096, 4096)]


def run(name: str, operation):
    """`operation` by a backend, to its end; skipped where the backend can't."""

    def call():
        with gk.backend(name):
            operation()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    try:
        call()
    except RuntimeError as refused:
        pytest.skip(str(refused))
    return call


@pytest.mark.parametrize(("side", "m", "n"), SHAPES)
@pytest.mark.parametrize("name", ["cuda", "triton", "reference", "addmm_"])
def test_project(benchmark, name, side, m, n):
    T = torch.randn(m, n, device=DEVICE)
    U = orthonormal(m if side == "left" else n, 16).to(DEVICE)
    if name == "addmm_":
        benchmark(lambda: addmm(T, U, side))
    else:
        benchmark(run(name, lambda: gk.project_(T, U, side=side)))


@pytest.mark.parametrize("name", ["cuda", "triton", "reference", "qr"])
def test_orthonormalize(benchmark, name):
    start = [torch.randn(1024, 8, device=DEVICE) for _ in range(16)]
    if name == "qr":
        benchmark(lambda: [torch.linalg.qr(W).Q for W in start])
    else:
        benchmark(run(name, lambda: gk.orthonormalize_([W.clone() for W in start])))
