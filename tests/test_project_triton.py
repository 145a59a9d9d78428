"""Projection in Triton, right under the interpreter where there is no GPU."""

import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import grasp_kernels as gk
from grasp_kernels.testing import assert_no_worse, orthonormal, project_fp64, project_torch

pytest.importorskip("triton")
from grasp_kernels.project_triton import FEW  # noqa: E402 -- where there is no triton, neither is it

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIDES = ("right", "left")
CASES = int(os.environ.get("GRASP_INTERPRETED_CASES", "40"))


@pytest.fixture(autouse=True)
def as_hardware_multiplies(monkeypatch):
    """The interpreter multiplies fp32; a matrix instruction drops 13 bits of each number."""
    if DEVICE == "cuda":
        return
    from triton.runtime import interpreter

    def tf32(x):
        return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)

    def dot(self, a, b, d, precision, most):
        return interpreter.TensorHandle(tf32(a.data) @ tf32(b.data) + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


@pytest.fixture(params=["cut along d", "in strips"])
def way(request, monkeypatch):
    """Each of the two kernels, for matrices of any shape."""
    if request.param == "in strips":
        monkeypatch.setattr("grasp_kernels.project_triton.FEW", 0)


@st.composite
def lists(draw, rows=(0, 70)):
    """Unlike matrices, some with odd strides, some empty, with or without C."""
    side = draw(st.sampled_from(SIDES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    with_C = draw(st.booleans())
    Ts, bases, Cs = [], [], []
    for _ in range(draw(st.integers(1, 3))):
        d, n = draw(st.integers(1, 150)), draw(st.integers(*rows))
        k = draw(st.integers(0, min(d, 20)))
        shape = (d, n) if side == "left" else (n, d)
        layout = draw(st.sampled_from(("plain", "transposed", "strided", "rows", "offset")))
        big = torch.randn(2 * shape[0] + 1, 2 * shape[1] + 1, generator=generator)
        big = big.to(draw(st.sampled_from(DTYPES))).to(DEVICE)
        T = {
            "plain": lambda b, s: b[: s[0], : s[1]].clone(),
            "transposed": lambda b, s: b[: s[0], : s[1]].mT.contiguous().mT,
            "strided": lambda b, s: b[: 2 * s[0] : 2, : 2 * s[1] : 2],
            "rows": lambda b, s: b[: s[0], : s[1]],
            "offset": lambda b, s: b[1 : 1 + s[0], 1 : 1 + s[1]],
        }[layout](big, shape)
        Ts.append(T)
        bases.append(orthonormal(d, k, seed=d).to(DEVICE))
        C = torch.randn(*((k, n) if side == "left" else (n, k)), generator=generator).to(DEVICE)
        Cs.append(C)
    return Ts, bases, Cs if with_C else None, side


def assert_error_is_at_most_twice_pytorchs(case):
    Ts, bases, Cs, side = case
    given_ = [T.clone() for T in Ts]
    each = Cs or [None] * len(Ts)
    exact = [project_fp64(T, U, C, side) for T, U, C in zip(Ts, bases, each, strict=True)]
    theirs = [project_torch(T, U, C, side) for T, U, C in zip(Ts, bases, each, strict=True)]
    with gk.backend("triton"):
        new = [gk.project(T, U, C, side=side) for T, U, C in zip(Ts, bases, each, strict=True)]
        gk.project_(Ts, bases, Cs, side=side)
    for i, T in enumerate(Ts):
        assert_no_worse(T, theirs[i], exact[i], given_[i])
        assert_no_worse(new[i], theirs[i], exact[i], given_[i])


@settings(max_examples=CASES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lists())
def test_few_rows(case):
    assert_error_is_at_most_twice_pytorchs(case)


@settings(max_examples=CASES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lists(rows=(FEW + 1, FEW + 80)))
def test_many_rows(case):
    assert_error_is_at_most_twice_pytorchs(case)


def test_writes_nothing_outside_the_matrix():
    big = torch.randn(40, 40, device=DEVICE)
    before = big.clone()
    T = big[3:30, 5:26]
    with gk.backend("triton"):
        gk.project_(T, orthonormal(21, 4).to(DEVICE))
    before[3:30, 5:26] = T
    assert torch.equal(big, before)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("k", [1, 16, 33, 64])
def test_rank(way, side, k):
    T, U = torch.randn(130, 130, device=DEVICE), orthonormal(130, k).to(DEVICE)
    exact, theirs = project_fp64(T, U, None, side), project_torch(T, U, None, side)
    with gk.backend("triton"):
        assert_no_worse(gk.project(T, U, side=side), theirs, exact, T)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.5, 0.97, 1.0])
def test_most_of_it_in_the_basis(way, side, dtype, share):
    """What is left is small, so that an error of c or of the basis shows."""
    d, n, k = 640, 24, 8
    U, free = orthonormal(d, k).double(), torch.randn(d, n, dtype=torch.float64)
    inside, outside = U @ torch.randn(k, n, dtype=torch.float64), free - U @ (U.mT @ free)
    inside, outside = inside / inside.norm(), outside / outside.norm()
    T = 50 * (share**0.5 * inside + (1 - share) ** 0.5 * outside)
    T = (T if side == "left" else T.mT.contiguous()).to(dtype).to(DEVICE)
    basis = U.float().to(DEVICE)
    exact, theirs = project_fp64(T, basis, None, side), project_torch(T, basis, None, side)
    with gk.backend("triton"):
        ours = gk.project(T, basis, side=side)
    assert_no_worse(ours, theirs, exact, T)
    if dtype == torch.float32 and share < 1:
        left = basis.double().mT @ (ours if side == "left" else ours.mT).double()
        assert left.norm() / ours.double().norm() <= 1e-6


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, None])
def test_wide_bases(side, dtype):
    """What a matrix takes in needs hundreds of directions; T is rounded once all the same."""
    sizes = ((200, 150), (40, 3), (90, 65), (150, 129))
    Ts = [torch.randn(*((d, 18) if side == "left" else (18, d)), device=DEVICE) for d, _ in sizes]
    mixed = (torch.float32, torch.bfloat16, torch.float16, torch.float32)
    Ts = [T.to(dtype or other) for T, other in zip(Ts, mixed, strict=True)]
    bases = [orthonormal(d, k).to(DEVICE) for d, k in sizes]
    Cs = [torch.randn(*((k, 18) if side == "left" else (18, k)), device=DEVICE) for _, k in sizes]
    given_ = [T.clone() for T in Ts]
    with gk.backend("triton"):
        new = gk.project(Ts[0], bases[0], Cs[0], side=side)
        gk.project_(Ts, bases, Cs, side=side)
    for i, (U, C) in enumerate(zip(bases, Cs, strict=True)):
        exact, theirs = (f(given_[i], U, C, side) for f in (project_fp64, project_torch))
        assert_no_worse(Ts[i], theirs, exact, given_[i])
    assert torch.equal(new, Ts[0])


@pytest.mark.parametrize("side", SIDES)
def test_leading_dimensions_and_vectors(side):
    T, U = torch.randn(2, 3, 20, 20, device=DEVICE), orthonormal(20, 3).to(DEVICE)
    C = torch.randn(2, 3, *((3, 20) if side == "left" else (20, 3)), device=DEVICE)
    with gk.backend("triton"):
        torch.testing.assert_close(
            gk.project(T, U, C, side=side).double(), project_fp64(T, U, C, side), atol=1e-5, rtol=0
        )
        torch.testing.assert_close(
            gk.project(T[0, 0, 0], U).double(),
            project_fp64(T[0, 0, 0], U, None, "right"),
            atol=1e-5,
            rtol=0,
        )


@pytest.mark.parametrize("side", SIDES)
def test_rows_far_apart(side, monkeypatch):
    """As if a tile's offsets ran out of 32 bits at a few thousand elements."""
    monkeypatch.setattr("grasp_kernels.matrices.FAR", 100)
    T = torch.randn(20, 200, device=DEVICE)[:, :20]
    U, exact = orthonormal(20, 3).to(DEVICE), T.clone()
    exact = project_fp64(exact, U, None, side)
    with gk.backend("triton"):
        gk.project_(T, U, side=side)
    torch.testing.assert_close(T.double(), exact, atol=1e-5, rtol=0)


@pytest.mark.parametrize("k", [4, 90])
def test_one_launch_for_a_list_and_tables_are_kept(monkeypatch, k):
    from grasp_kernels import factors_triton

    launches, made = [], []
    run, table = factors_triton.Launch.run, factors_triton.Table
    monkeypatch.setattr(factors_triton.Launch, "run", lambda *a: (launches.append(a[0]), run(*a)))
    monkeypatch.setattr(factors_triton, "Table", lambda *a: made.append(a) or table(*a))
    heights = (3, 16, 90) if k == 4 else (3, 16, 9)
    Ts = [torch.randn(rows, 100, device=DEVICE) for rows in heights]
    U = orthonormal(100, k).to(DEVICE)
    with gk.backend("triton"):
        gk.project_(Ts, U)
        assert len(launches) == 1 and len(made) == 4
        gk.project_(Ts, U)
        assert launches == [launches[0]] * 2 and len(made) == 4
        gk.project_([T.clone() for T in Ts], U)  # elsewhere: where they lie is new, nothing else
    assert launches == [launches[0]] * 3 and len(made) == 5


def test_what_shares_a_basis_reads_it_once():
    """Stacked: the blocks of columns and parts of d are drawn once for all rows of a basis."""
    from grasp_kernels.factors_layout import Layout, by_tiling
    from grasp_kernels.matrices import row

    one, other = (orthonormal(200, 100, seed=i).to(DEVICE) for i in range(2))
    Ts = [torch.randn(n, 200, device=DEVICE) for n in (9, 3, 8, 4)]
    rows = [row(T, T, one if i < 3 else other, None, False) for i, T in enumerate(Ts)]
    ((options, these),) = by_tiling(rows[:3])
    assert these == [0, 1, 2]
    laid = Layout(rows[:3], options, 0)
    assert [(g.n, g.first) for g in laid.groups] == [(20, 0)]
    assert sum(block >= 0 for _, block, _ in laid.pieces) == 2  # 64 columns each
    laid = Layout(rows, options, 0)
    assert [(g.n, g.first, g.basis) for g in laid.groups] == [
        (20, 0, one.data_ptr()),
        (4, 20, other.data_ptr()),
    ]


@given(st.data())
def test_a_piece_waits_for_earlier_ones_alone(data):
    """Else programs that hold later pieces could wait for ever for one that nobody holds."""
    from grasp_kernels.factors_layout import Layout, by_tiling
    from grasp_kernels.matrices import row

    bases = [orthonormal(d, k).to(DEVICE) for d, k in ((1500, 7), (1500, 70), (130, 130))]
    drawn = data.draw(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 80)), min_size=1))
    rows = []
    for which, n in drawn:
        T = torch.empty(n, bases[which].shape[0], device=DEVICE)
        rows.append(row(T, T, bases[which], None, False))
    for options, these in by_tiling(rows):
        laid = Layout([rows[i] for i in these], options, data.draw(st.integers(0, 100)))
        assert sorted(laid.owners) == [i for i, r in enumerate(these) for _ in range(rows[r].n)]
        stretch = options["LENGTH"] if options["WHOLE"] else options["BD"]
        for g, group in enumerate(laid.groups):
            sums, parts = -(-group.k // options["KB"]), -(-group.d // group.length)
            at = [i for i, (which, _, _) in enumerate(laid.pieces) if which == g]
            of = [laid.pieces[i][1:] for i in at]
            assert sorted(of[: sums * parts]) == [(b, p) for b in range(sums) for p in range(parts)]
            assert of[sums * parts :] == [(-1, e) for e in range(-(-group.d // stretch))]


def test_what_a_graph_records_is_not_kept_for_others(monkeypatch):
    """While one is recorded nothing is copied: the tables are there after a replay alone."""
    from grasp_kernels import factors_triton, project_triton, tables

    T, U = torch.randn(4, 40, device=DEVICE), orthonormal(40, 2).to(DEVICE)
    made = []
    table = factors_triton.Table
    monkeypatch.setattr(factors_triton, "Table", lambda *a: made.append(a) or table(*a))
    with gk.backend("triton"):
        projector = gk.Projector([T], U)
        for module in (tables, project_triton):
            monkeypatch.setattr(module, "capturing", lambda: True)
        monkeypatch.setattr("grasp_kernels.projector.capturing", lambda: True)
        for _ in range(2):
            made.clear()
            gk.project_([T], U)
            assert len(made) == 4
        elsewhere = T.clone()
        for _ in range(2):
            made.clear()
            projector([elsewhere])
            assert len(made) == 1
        with pytest.raises(RuntimeError, match="call it once"):
            projector([torch.randn(40, 4, device=DEVICE).mT])


def test_a_basis_whose_rows_lie_far_apart(monkeypatch):
    monkeypatch.setattr("grasp_kernels.matrices.FAR", 100)
    T, U = torch.randn(20, 30, device=DEVICE), torch.zeros(30, 128, device=DEVICE)[:, :3]
    U.copy_(orthonormal(30, 3))
    exact = project_fp64(T, U, None, "right")
    with gk.backend("triton"):
        gk.project_(T, U)
    torch.testing.assert_close(T.double(), exact, atol=1e-5, rtol=0)


@pytest.mark.parametrize("k", [7, 70])
def test_a_basis_is_read_in_vectors(k):
    """What lies in memory beyond its last column counts for nothing."""
    from grasp_kernels.matrices import in_vectors, row

    padded = torch.full((90, 72), float("nan"), device=DEVICE)
    padded[:, :k] = orthonormal(90, k)
    U, T = padded[:, :k], torch.randn(20, 90, device=DEVICE)
    assert row(T, T, U, None, False).vector and not row(T, T, U[1:, 1:], None, False).vector
    assert not row(T, T, orthonormal(90, k).to(DEVICE), None, False).vector
    exact = project_fp64(T, U, None, "right")
    with gk.backend("triton"):
        ours = gk.project(T, U)
    torch.testing.assert_close(ours.double(), exact, atol=1e-5, rtol=0)
    assert in_vectors(torch.empty(90, k, device="meta")).stride() == (-(-k // 4) * 4, 1)


def test_nothing_to_take_off():
    T, none = torch.full((3, 20), float("inf"), device=DEVICE), torch.empty(20, 0, device=DEVICE)
    with gk.backend("triton"):
        assert torch.equal(gk.project(T, none), T)


def test_a_large_product_is_left_to_pytorch():
    with gk.backend("triton"), pytest.raises(RuntimeError, match="k = 65 of 300 rows"):
        gk.project(torch.randn(300, 80, device=DEVICE), orthonormal(80, 65).to(DEVICE))


def test_is_deterministic():
    T, U = torch.randn(70, 300, device=DEVICE), orthonormal(300, 12).to(DEVICE)
    with gk.backend("triton"):
        first = gk.project(T, U)
        assert all(torch.equal(first, gk.project(T, U)) for _ in range(3))


def test_bumps_the_version():
    w = torch.randn(4, 20, device=DEVICE, requires_grad=True)
    loss = (w * w).sum()
    with gk.backend("triton"):
        gk.project_(w, orthonormal(20, 2).to(DEVICE))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_refuses_what_it_can_not_do_right():
    T = torch.randn(3, 200, device=DEVICE, dtype=torch.float64)
    with gk.backend("triton"), pytest.raises(RuntimeError, match="fp64"):
        gk.project(T, orthonormal(200, 3).to(DEVICE))
