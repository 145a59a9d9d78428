"""The CUDA kernels without a GPU: their own code run on a CPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grasp_kernels.testing import assert_no_worse, orthonormal, project_fp64, project_torch
from tests import emulated

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIDES = ("right", "left")
emulates = pytest.mark.skipif(emulated.COMPILER is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("emulated")


def inputs(n, d, k, side, dtype, with_C, generator):
    shape = (d, n) if side == "left" else (n, d)
    T = torch.randn(shape, generator=generator).to(dtype)
    C = torch.randn(*((k, n) if side == "left" else (n, k)), generator=generator)
    return T, orthonormal(d, k, seed=d), C if with_C else None


def energy_fp64(T, U, side):
    X, V = T.double(), U.double()
    inside = V.mT @ X if side == "left" else X @ V
    return torch.stack([X.square().sum(), inside.square().sum()])


@emulates
@settings(max_examples=25)
@given(st.data())
def test_clusters_agree_with_fp64(folder, data):
    """Any number of blocks to a strip, slices that end early or hold nothing, strips cut off."""
    side = data.draw(st.sampled_from(SIDES))
    dtype = data.draw(st.sampled_from(DTYPES[1:]))
    blocks = data.draw(st.sampled_from((1, 2, 4)))
    n, d = 8 * data.draw(st.integers(1, 9)), 8 * data.draw(st.integers(1, 16))
    if side == "right":
        n -= data.draw(st.integers(0, 7))  # rows need not be a multiple
    k = data.draw(st.integers(1, min(d, 40)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    T, U, C = inputs(n, d, k, side, dtype, data.draw(st.booleans()), generator)
    clusters = data.draw(st.integers(1, 2))
    energies = torch.ones(-(-n // 32), 2)  # added to
    out = emulated.project(folder, T, U, C, side, blocks, clusters, energies)
    assert_no_worse(out, project_torch(T, U, C, side), project_fp64(T, U, C, side), T)
    exact = energy_fp64(T, U, side) + len(energies)
    torch.testing.assert_close(energies.double().sum(0), exact, rtol=1e-2, atol=1e-2)


@emulates
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("blocks", [1, 4])
def test_reads_once_and_writes_once(folder, side, blocks):
    generator = torch.Generator().manual_seed(0)
    T, U, C = inputs(72, 120, 16, side, torch.bfloat16, True, generator)
    emulated.moved(folder)
    emulated.project(folder, T, U, C, side, blocks, 2)
    floor = T.numel() * T.element_size()
    assert emulated.moved(folder) == (floor, floor)


@emulates
def test_the_number_of_blocks_changes_rounding_alone(folder):
    generator = torch.Generator().manual_seed(0)
    T, U, _ = inputs(40, 256, 16, "right", torch.bfloat16, False, generator)
    one, four = (emulated.project(folder, T, U, None, "right", b, 1) for b in (1, 4))
    torch.testing.assert_close(one, four, atol=2e-2, rtol=0)
    assert torch.equal(four, emulated.project(folder, T, U, None, "right", 4, 1))


@emulates
@settings(max_examples=25)
@given(st.data())
def test_a_list_of_unlike_matrices(folder, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    drawn = []
    for _ in range(data.draw(st.integers(1, 4))):
        side, dtype = data.draw(st.sampled_from(SIDES)), data.draw(st.sampled_from(DTYPES))
        n, d = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 90))
        k = data.draw(st.integers(0, min(d, 20)))
        case = inputs(n, d, k, side, dtype, data.draw(st.booleans()), generator)
        drawn.append((*case, side))
    Ts, Us, Cs, sides = map(list, zip(*drawn, strict=True))
    strips = [-(-T.numel() // U.shape[0] // 16) for T, U in zip(Ts, Us, strict=True)]
    energies = torch.ones(sum(strips), 2)
    outs = emulated.project_list(folder, Ts, Us, Cs, sides, energies)
    each = zip(Ts, Us, sides, strips, energies.double().split(strips), strict=True)
    for T, U, side, count, found in each:
        exact = energy_fp64(T, U, side) + count
        torch.testing.assert_close(found.sum(0), exact, rtol=1e-4, atol=1e-4)
    for out, T, U, C, side in zip(outs, Ts, Us, Cs, sides, strict=True):
        assert_no_worse(out, project_torch(T, U, C, side), project_fp64(T, U, C, side), T)
