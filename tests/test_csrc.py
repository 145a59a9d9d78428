"""The CUDA kernels without a GPU: their own code run on a CPU."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grasp_kernels import project_cuda
from grasp_kernels.dispatch import Hardware
from grasp_kernels.project_cuda import plan
from grasp_kernels.testing import assert_no_worse, orthonormal, project_fp64, project_torch
from tests import emulated

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIDES = ("right", "left")
CASES = int(os.environ.get("GRASP_EMULATED_CASES", "60"))
emulates = pytest.mark.skipif(emulated.COMPILER is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("emulated")


def inputs(n, d, k, side, dtype, generator, inside=0.0, size=1.0):
    """T of which the share `inside` lies in the basis."""
    U = orthonormal(d, k, seed=d)
    X = torch.randn(n, d, dtype=torch.float64, generator=generator)
    lies = X @ U.double() @ U.double().mT
    rest = X - lies
    if inside:
        X = rest + lies * (inside / (1 - inside)) ** 0.5 * rest.norm() / lies.norm().clamp_min(1e-9)
    T = (X * (size / X.abs().max())).to(dtype)
    return (T.mT.contiguous() if side == "left" else T), U


def energy_fp64(T, U, side):
    X, V = T.double(), U.double()
    inside = V.mT @ X if side == "left" else X @ V
    return torch.stack([X.square().sum(), inside.square().sum()])


@st.composite
def large(draw):
    """A matrix and how it is cut: slices that end early or hold nothing, strips cut off."""
    side, dtype = draw(st.sampled_from(SIDES)), draw(st.sampled_from(DTYPES))
    slice = 128 if dtype == torch.float32 else draw(st.sampled_from((128, 256)))
    blocks = draw(st.sampled_from((1, 2, 4, 8)))
    step = slice // 8  # of d that a warp subtracts from at once
    d = step * draw(st.integers(1, slice * blocks // step))
    n = draw(st.integers(1, 6 * emulated.strip(dtype, slice)))
    if side == "left":
        n = -(-n // 8) * 8  # rows of whole 16 bytes
    k = draw(st.integers(1, min(d, 64)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    inside = draw(st.sampled_from((0.0, 0.5, 0.97)))
    size = draw(st.sampled_from((1e-4, 1.0, 1e3)))
    T, U = inputs(n, d, k, side, dtype, generator, inside, size)
    shape = (k, n) if side == "left" else (n, k)
    C = size * torch.randn(shape, generator=generator) if draw(st.booleans()) else None
    if draw(st.booleans()):  # rows of a wider matrix, a basis that is a transpose
        wide = torch.full((T.shape[0], T.shape[1] + 16), torch.nan, dtype=dtype)
        wide[:, :-16] = T
        T, U = wide[:, :-16], U.mT.contiguous().mT
    cut = {
        "slice": slice,
        "blocks": blocks,
        "clusters": draw(st.integers(1, 2)),
        "stages": draw(st.integers(2, 4)),
        "seed": draw(st.integers(0, 2**31)),
    }
    return T, U, C, side, draw(st.booleans()), cut


@emulates
@settings(max_examples=CASES)
@given(large())
def test_clusters_agree_with_fp64(folder, case):
    T, U, C, side, in_place, cut = case
    exact, theirs = project_fp64(T, U, C, side), project_torch(T, U, C, side)
    before = T.clone()
    out = T if in_place else torch.full_like(T, torch.nan)  # what is not written shows
    energies = torch.ones(cut["clusters"], 2)  # added to
    emulated.project(folder, T, U, C, side, out, energies=energies, **cut)
    assert_no_worse(out, theirs, exact, before)
    assert in_place or torch.equal(T, before)
    assert T._base is None or T._base[:, -16:].isnan().all()  # nothing is written between rows
    found = energies.double().sum(0) - cut["clusters"]
    known = energy_fp64(before, U, side)
    torch.testing.assert_close(found, known, rtol=1e-2, atol=1e-5 * float(known[0]) + 1e-6)


@emulates
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("blocks", [1, 4])
def test_reads_once_and_writes_once(folder, side, blocks, dtype):
    T, U = inputs(72, 112, 16, side, dtype, torch.Generator().manual_seed(0))
    emulated.moved(folder)
    emulated.project(folder, T, U, None, side, T, blocks=blocks, clusters=2)
    floor = T.numel() * T.element_size()
    assert emulated.moved(folder) == (floor, floor)


@emulates
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", SIDES)
def test_timing_and_clusters_change_nothing(folder, side, dtype):
    T, U = inputs(96, 256, 40, side, dtype, torch.Generator().manual_seed(0))
    first, *others = (
        emulated.project(
            folder, T, U, None, side, torch.empty_like(T), blocks=4, clusters=c, stages=s, seed=s
        )
        for c, s in ((1, 2), (2, 3), (1, 4))
    )
    assert all(torch.equal(first, other) for other in others)


@emulates
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", SIDES)
def test_what_stays_in_the_basis(folder, side, dtype):
    """Errors of one sign add up there: fp32 cut off in place of rounded leaves three times more."""
    T, U = inputs(64, 1024, 40, side, dtype, torch.Generator().manual_seed(1), inside=0.97)
    exact = project_fp64(T, U, None, side)
    ours = emulated.project(folder, T, U, None, side, torch.empty_like(T), blocks=8)
    left = [
        energy_fp64(X.double() - exact, U, side)[1].sqrt()
        for X in (ours, project_torch(T, U, None, side))
    ]
    assert left[0] <= 2.5 * left[1]


@emulates
@pytest.mark.parametrize("side", SIDES)
def test_coefficients_beyond_fp16(folder, side):
    """c reaches 65504 √d while T and its projection do not."""
    U = torch.full((256, 1), 1 / 16)
    T = 4e4 + 16 * torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    T = (T.mT if side == "left" else T).contiguous().half()
    out = emulated.project(folder, T, U, None, side, torch.empty_like(T), blocks=2)
    exact = project_fp64(T, U, None, side)
    assert float((out.double() - exact).abs().max()) <= 2 * 4e4 * 2**-11


@emulates
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", SIDES)
def test_what_is_not_finite_stays_in_its_position(folder, side, dtype):
    T, U = inputs(64, 240, 8, side, dtype, torch.Generator().manual_seed(0))
    bad = T.clone()
    (bad if side == "right" else bad.mT)[3, 5] = torch.inf
    good, out = (
        emulated.project(folder, X, U, None, side, torch.empty_like(T), blocks=2) for X in (T, bad)
    )
    if side == "left":
        good, out = good.mT, out.mT
    others = torch.arange(len(good)) != 3
    assert torch.equal(out[others], good[others]) and not out[3].isfinite().all()


@emulates
@given(
    st.sampled_from((2, 4)),
    st.integers(1, 40000),
    st.integers(0, 70),
    st.sampled_from((99, 163, 227)),
)
def test_what_fits_is_the_same_in_python(folder, size, d, k, room):
    there, here = emulated.plan(folder, size, d, k, room << 10), plan(size, d, k, room << 10)
    if here is None:
        assert there.slice == 0
    else:
        assert here == tuple(getattr(there, name) for name in here._fields)
        assert here.blocks * here.width >= d and here.bytes <= room << 10


def test_large_models_fit():
    for size, d, k in ((2, 4096, 64), (2, 8192, 64), (2, 16384, 16), (4, 4096, 64), (4, 8192, 16)):
        assert plan(size, d, k, 227 << 10).stages >= 2
    assert plan(2, 14336, 64, 227 << 10) is None  # 1.8 MB of basis, 8 blocks of 227 KB
    assert plan(2, 4096, 32, 99 << 10).strip == 16 and plan(2, 8192, 16, 99 << 10) is None


@pytest.mark.parametrize(
    "shape, dtype, k, message",
    [
        ((4096, 4096), torch.bfloat16, 16, None),
        ((4096, 4096), torch.float32, 64, None),
        ((4096, 4096), torch.bfloat16, 65, "above 64"),
        ((255, 4096), torch.bfloat16, 8, "no matrix of 1048576"),
        ((2, 1024, 4096), torch.bfloat16, 8, "no matrix"),
        ((4096, 4112), torch.bfloat16, 8, "no multiple of 32"),
        ((65536, 16384), torch.float32, 8, "does not fit 227 KB"),
        ((65536, 32768), torch.bfloat16, 8, "does not fit"),
        ((4096, 4096), torch.float64, 8, "takes fp32"),
    ],
)
def test_refuses_what_it_has_no_kernel_for(monkeypatch, shape, dtype, k, message):
    monkeypatch.setattr(project_cuda, "hardware", lambda device: Hardware(None, (9, 0)))
    monkeypatch.setattr(project_cuda, "_room", lambda device: 227 << 10)
    T = torch.empty(shape, dtype=dtype, device="meta")
    reason = project_cuda.refusal(T, torch.empty(shape[-1], k, device="meta"))
    assert reason is None if message is None else message in reason
    if message is None:
        basis = torch.empty(shape[-1], k, device="meta")
        assert "aligned" in project_cuda.refusal(T[:, 1:-31], basis[32:])
        monkeypatch.setattr(project_cuda, "hardware", lambda device: Hardware(None, (8, 6)))
        assert "needs compute capability 9.0, got 8.6" in project_cuda.refusal(T, basis)
