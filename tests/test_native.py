"""The compiled library: built where a compiler is, bound to the stable ABI alone."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import grasp_kernels as gk
from grasp_kernels import native, project_cuda
from grasp_kernels.testing import assert_no_worse, orthonormal, project_fp64, project_torch
from tests import elf

ROOT = Path(__file__).parent.parent
COMPILER = shutil.which("c++") or shutil.which("g++")
WITH_CUDA = torch.version.cuda is not None
GIVEN = os.environ.get("GRASP_LIBRARY")  # one that is built, as it is shipped
compiles = pytest.mark.skipif(not (GIVEN or shutil.which("nvcc")), reason="no nvcc")


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    if GIVEN:
        return Path(GIVEN)
    folder = tmp_path_factory.mktemp("built")
    command = [sys.executable, "setup.py", "build_ext"]
    command += ["--build-lib", folder, "--build-temp", folder / "temp"]
    env = {**os.environ, "GRASP_CUDA": "1", "GRASP_CUDA_ARCHS": "90a"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "grasp_kernels" / "_native.so"


@compiles
def test_undefined_symbols_are_of_the_stable_abi(library):
    names = elf.read(library).undefined
    torchs = [n for n in names if "torch" in n or "c10" in n or re.match(r"_ZN?K?2at", n)]
    assert torchs and all(re.match(r"(aoti_)?torch_\w+$", n) for n in torchs), torchs
    assert not any(n.startswith("Py") for n in names)  # any Python


@compiles
def test_needs_libtorch_wherever_it_is(library):
    """What Python loads it loads privately: who does not name libtorch finds nothing in it."""
    found = elf.read(library)
    assert "libtorch.so" in found.needed and not found.paths
    stems = {name.split(".so")[0] for name in found.needed}
    system = {"c", "m", "rt", "dl", "pthread", "gcc_s", "stdc++"}
    assert stems <= {"libtorch", *(f"lib{name}" for name in system), "ld-linux-x86-64"}


LOADS = """
import ctypes, json, sys
import torch
from pathlib import Path
from grasp_kernels import native, project_cuda

library, stub = sys.argv[1:]
native.LIBRARY = Path(library)
torch.version.cuda = torch.version.cuda or "13.0"
found = {"before": native.missing()}
if stub:
    ctypes.CDLL(stub, ctypes.RTLD_GLOBAL)
    native.missing.cache_clear()
    found["missing"] = native.missing()
has = torch._C._dispatch_has_kernel_for_dispatch_key
found["kernels"] = {
    name: {key: has(f"grasp_native::{name}", key) for key in ("CPU", "CUDA")}
    for name in native.OPERATORS
}
found["versions"] = native.cuda_versions()
try:
    torch.ops.grasp_native.project_all(torch.zeros(2, 3, dtype=torch.int64), 0, 0)
except RuntimeError as error:
    found["refused"] = str(error)
print(json.dumps(found))
"""


@compiles
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_loads_and_registers_its_operators(library, tmp_path):
    stub = tmp_path / "stub.so"
    source = tmp_path / "stub.cpp"
    source.write_text(
        'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }'
    )
    subprocess.run([COMPILER, "-shared", "-fPIC", source, "-o", stub], check=True)
    out = subprocess.run(
        [sys.executable, "-c", LOADS, library, "" if WITH_CUDA else stub],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    found = json.loads(out.stdout)
    for name, (_, key) in native.OPERATORS.items():
        assert found["kernels"][name] == {"CPU": key == "CPU", "CUDA": key == "CUDA"}, name
    assert re.search(r"grasp: rows of \d+ numbers are needed", found["refused"])
    assert str(ROOT) not in found["refused"]  # it says where, and not on whose machine
    built_with, driver = found["versions"]
    assert built_with >= 12000
    if not WITH_CUDA:
        assert "undefined symbol: aoti_torch_get_current_cuda_stream" in found["before"]
        assert "\n" not in found["before"]
        assert (driver == 0) == (found["missing"] == "there is no NVIDIA driver on this machine")


def asked(monkeypatch, hip=None, cuda=None, library=Path("/nowhere/_native.so")) -> str | None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(native, "LIBRARY", library)
    return native.missing.__wrapped__()


def test_says_why_it_is_missing(monkeypatch, tmp_path):
    broken = tmp_path / "_native.so"
    broken.write_bytes(b"not a library")
    assert "built for ROCm 6.4" in asked(monkeypatch, hip="6.4", library=broken)
    assert "torch is built without CUDA" in asked(monkeypatch, library=broken)
    assert native.built()
    assert "not built: GRASP_CUDA=1 pip install" in asked(monkeypatch, cuda="13.0")
    assert not native.built()
    reason = asked(monkeypatch, cuda="13.0", library=broken)
    assert re.search(r"_native.so does not load: .*(too short|invalid ELF).*; build it", reason)


@pytest.mark.parametrize(
    "built_with, driver, reason",
    [
        (13000, 13000, None),
        (13020, 13000, None),  # one of the same major version runs it
        (12090, 13010, None),
        (13000, 12080, r"it runs CUDA up to 12.8, and the library is built with 13.0; update"),
        (13000, 0, "no NVIDIA driver"),
    ],
)
def test_a_driver_that_is_too_old(built_with, driver, reason):
    found = native.driver_refusal(built_with, driver)
    assert found is None if reason is None else re.search(reason, found)


@pytest.mark.skipif(WITH_CUDA, reason="this torch may have it")
def test_asked_for_by_name_where_it_is_missing():
    with gk.backend("cuda"), pytest.raises(RuntimeError, match="'cuda' can't run project"):
        gk.project(torch.randn(2, 3), torch.eye(3)[:, :1])


loaded = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))


@loaded
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4096, 1536), (1056, 4096), (4096, 14336), (14336, 512)])
@pytest.mark.parametrize("k", [8, 32, 64])
@pytest.mark.parametrize("inside", [0.0, 0.97])
def test_error_is_at_most_twice_pytorchs(side, dtype, shape, k, inside):
    T = torch.randn(shape, device="cuda", dtype=torch.float64)
    d = shape[0] if side == "left" else shape[1]
    U = orthonormal(d, k).cuda()
    if inside:
        off = project_fp64(T, U, None, side)
        lies = T - off
        T = off + lies * (inside / (1 - inside)) ** 0.5 * off.norm() / lies.norm()
    T = T.to(dtype)
    C = torch.randn((k, T.shape[1]) if side == "left" else (T.shape[0], k), device="cuda")
    if reason := project_cuda.refusal(T, U):
        pytest.skip(reason)
    for pinned in (None, C):
        X = T.clone()
        exact, theirs = project_fp64(T, U, pinned, side), project_torch(T, U, pinned, side)
        with gk.backend("cuda"):
            new = gk.project(T, U, pinned, side=side)
            assert torch.equal(new, gk.project(T, U, pinned, side=side))
            projector = gk.Projector(
                [X], U, None if pinned is None else [C], side=side, measure=True
            )
            projector()
        assert_no_worse(new, theirs, exact, T)
        assert torch.equal(X, new)
        away = T.double() - project_fp64(T, U, None, side)
        known = torch.stack([T.double().square().sum(), away.square().sum()]).cpu()
        torch.testing.assert_close(projector.energies()[0], known, rtol=1e-2, atol=1e-2)


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
