"""The compiled library: built where a compiler is, bound to the stable ABI alone."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

import grasp_kernels as gk
from grasp_kernels import native
from grasp_kernels.testing import assert_no_worse, orthonormal, project_fp64, project_torch
from tests.test_orthonormalize import conditioned
from tests.test_project_triton import lists

ROOT = Path(__file__).parent.parent


def build(folder: Path, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "build_ext"]
    command += ["--build-lib", folder, "--build-temp", folder / "temp"]
    env = {**os.environ, **env}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_undefined_symbols_are_of_the_stable_abi(tmp_path):
    done = build(tmp_path, GRASP_CUDA="1", GRASP_CUDA_ARCHS="90a")
    assert done.returncode == 0, done.stderr
    library = tmp_path / "grasp_kernels" / "_native.so"
    symbols = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    names = [line.split()[-1].split("@")[0] for line in symbols.splitlines()]
    torchs = [n for n in names if "torch" in n or "c10" in n or re.match(r"_ZN?K?2at", n)]
    assert torchs and all(re.match(r"(aoti_)?torch_\w+$", n) for n in torchs), torchs
    assert not any(n.startswith("Py") for n in names)  # any Python


def test_wishes_that_can_not_be_met_are_refused(tmp_path):
    bare = {"PATH": "/nowhere", "CUDA_HOME": "", "CUDA_PATH": ""}
    done = build(tmp_path, GRASP_CUDA="1", **bare)
    assert done.returncode != 0 and "no nvcc" in done.stderr
    done = build(tmp_path, GRASP_CUDA="yes")
    assert done.returncode != 0 and "choose auto, 0 or 1" in done.stderr
    for env in ({"GRASP_CUDA": "0"}, {"GRASP_CUDA": "auto", **bare}):
        done = build(tmp_path, **env)
        assert done.returncode == 0 and not list(tmp_path.rglob("*.so")), done.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch may have it")
def test_says_why_it_is_missing():
    assert native.missing() is not None
    with gk.backend("cuda"), pytest.raises(RuntimeError, match="'cuda' can't run project"):
        gk.project(torch.randn(2, 3), torch.eye(3)[:, :1])


loaded = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))


@loaded
@settings(max_examples=200)
@given(lists())
def test_error_is_at_most_twice_pytorchs(case):
    Ts, bases, Cs, side = case
    before = [T.clone() for T in Ts]
    each = Cs or [None] * len(Ts)
    with gk.backend("cuda"):
        gk.project_(Ts, bases, Cs, side=side)
    for out, T, U, C in zip(Ts, before, bases, each, strict=True):
        assert_no_worse(out, project_torch(T, U, C, side), project_fp64(T, U, C, side), T)


@loaded
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4096, 1536), (1032, 4096), (4096, 14336), (14336, 512)])
@pytest.mark.parametrize("k", [8, 32, 64])
def test_large_matrices(side, dtype, shape, k):
    T = torch.randn(shape, device="cuda").to(dtype)
    d = shape[0] if side == "left" else shape[1]
    U, before = orthonormal(d, k).cuda(), T.clone()
    exact, theirs = project_fp64(T, U, None, side), project_torch(T, U, None, side)
    with gk.backend("cuda"):
        new = gk.project(T, U, side=side)
        assert torch.equal(new, gk.project(T, U, side=side))
        gk.project_(T, U, side=side)
    assert_no_worse(new, theirs, exact, before)
    assert torch.equal(T, new)


@loaded
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
def test_orthonormal_up_to_condition_1e6(condition):
    Ws = [conditioned(d, k, condition).float().cuda() for d, k in ((300, 24), (8192, 64), (9, 3))]
    with gk.backend("cuda"):
        ranks = gk.orthonormalize_(Ws)
    assert [int(r) for r in ranks] == [24, 64, 3]
    for W in Ws:
        Q = W.double()
        assert (Q.mT @ Q - torch.eye(Q.shape[1], device="cuda")).norm() <= 1e-5


@loaded
def test_in_a_cuda_graph():
    T, U = torch.randn(2048, 1024, device="cuda").bfloat16(), orthonormal(1024, 8).cuda()
    expected = gk.project(T, U)
    graph = torch.cuda.CUDAGraph()
    with gk.backend("cuda"):
        gk.project(T, U)
        with torch.cuda.graph(graph):
            out = gk.project(T, U)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(out, expected)
