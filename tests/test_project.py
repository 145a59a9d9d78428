"""Idempotent, self-adjoint, orthogonal to its basis, and as exact as PyTorch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import grasp_kernels as gk
from grasp_kernels.project import DTYPES
from grasp_kernels.testing import assert_no_worse, orthonormal, project_fp64, project_torch

SIDES = ("right", "left")


@st.composite
def cases(draw):
    d = draw(st.integers(1, 40))
    k = draw(st.integers(0, d))
    n = draw(st.integers(0, 33))
    side = draw(st.sampled_from(SIDES))
    dtype = draw(st.sampled_from(DTYPES))
    layout = draw(st.sampled_from(("plain", "transposed", "strided", "offset")))
    shape = (d, n) if side == "left" else (n, d)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    T = torch.randn(*(shape[::-1] if layout == "transposed" else shape), generator=generator)
    T = T.to(dtype)
    if layout == "transposed":
        T = T.mT
    elif layout == "strided":
        T = torch.stack([T, T], -1)[..., 0]
    elif layout == "offset":
        T = torch.cat([T, T], 0)[shape[0] :]
    C = None
    if draw(st.booleans()):
        C = torch.randn(*((k, n) if side == "left" else (n, k)), generator=generator)
    return T, orthonormal(d, k, seed=d), C, side


@given(cases())
def test_error_is_at_most_twice_pytorchs(case):
    T, basis, C, side = case
    exact = project_fp64(T, basis, C, side)
    theirs = project_torch(T, basis, C, side)
    given = T.clone()
    assert_no_worse(gk.project(T, basis, C, side=side), theirs, exact, given)
    gk.project_(T, basis, C, side=side)
    assert_no_worse(T, theirs, exact, given)


@given(cases())
def test_is_a_projection(case):
    T, basis, _, side = case
    T, basis = T.double(), orthonormal(*basis.shape, torch.float64)
    once = gk.project(T, basis, side=side)
    inside = basis.mT @ once if side == "left" else once @ basis
    assert inside.numel() == 0 or inside.abs().max() <= 1e-12
    torch.testing.assert_close(gk.project(once, basis, side=side), once, atol=1e-12, rtol=0)


def test_is_self_adjoint():
    A, B = torch.randn(2, 9, 12, dtype=torch.float64)
    V = orthonormal(12, 4, torch.float64)
    torch.testing.assert_close((gk.project(A, V) * B).sum(), (A * gk.project(B, V)).sum())


@pytest.mark.parametrize("side", SIDES)
def test_pins_to_coefficients(side):
    T0, T = torch.randn(2, 16, 16, dtype=torch.float64)
    U = orthonormal(16, 5, torch.float64)
    C = U.mT @ T0 if side == "left" else T0 @ U
    out = gk.project(T, U, C, side=side)
    torch.testing.assert_close(U.mT @ out if side == "left" else out @ U, C)


def test_sides_are_each_others_transpose():
    T, U = torch.randn(12, 7), orthonormal(12, 3)
    torch.testing.assert_close(gk.project(T, U, side="left"), gk.project(T.mT, U).mT)


def test_leading_dimensions():
    T, V = torch.randn(2, 3, 5, 8), orthonormal(8, 2)
    torch.testing.assert_close(gk.project(T, V)[1, 2], gk.project(T[1, 2], V))
    torch.testing.assert_close(gk.project(T[0, 0, 0], V), gk.project(T, V)[0, 0, 0])


@pytest.mark.parametrize("side", SIDES)
def test_gradcheck(side):
    T = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    U, C = orthonormal(6, 2, torch.float64), None
    torch.autograd.gradcheck(lambda T: gk.project(T, U, C, side=side), T)
    torch.autograd.gradgradcheck(lambda T: gk.project(T, U, C, side=side), T)


@pytest.mark.parametrize("with_C", [False, True])
def test_opcheck(with_C):
    T, U = torch.randn(5, 8, requires_grad=True), orthonormal(8, 3)
    C = torch.randn(5, 3) if with_C else None
    torch.library.opcheck(torch.ops.grasp.project, (T, U, C, False))
    Ts = [torch.randn(5, 8), torch.randn(2, 8)]
    Cs = [torch.randn(5, 3), torch.randn(2, 3)] if with_C else []
    torch.library.opcheck(torch.ops.grasp.project_, (Ts, [U, U], Cs, False))


def test_compiles_whole():
    U = orthonormal(8, 3)

    def step(T, S):
        gk.project_([T, S], U)
        return gk.project(T * 2, U)

    T, S = torch.randn(4, 8), torch.randn(6, 8)
    copies = T.clone(), S.clone()
    expected = step(*copies)
    actual = torch.compile(step, backend="aot_eager", fullgraph=True)(T, S)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close((T, S), copies)


def test_list_in_place_matches_one_by_one():
    U = [orthonormal(8, 2), orthonormal(6, 0), orthonormal(5, 5)]
    Ts = [torch.randn(8, 3), torch.randn(6, 4).bfloat16(), torch.randn(5, 0)]
    expected = [gk.project(T, B, side="left") for T, B in zip(Ts, U, strict=True)]
    assert gk.project_(Ts, U, side="left") is None
    torch.testing.assert_close(Ts, expected)
    gk.project_([], [])


def test_in_place_bumps_the_version():
    w = torch.randn(4, 8, requires_grad=True)
    loss = (w * w).sum()
    gk.project_(w, orthonormal(8, 2))  # a leaf may be projected between backward passes
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


T, V = orthonormal(8, 4, seed=9).mT.contiguous(), orthonormal(8, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gk.project("T", V), TypeError, "T is a str"),
        (lambda: gk.project(T.int(), V), TypeError, "convert it to fp64"),
        (lambda: gk.project(T.to_sparse(), V), TypeError, "to_dense"),
        (lambda: gk.project(T, V[:1]), ValueError, "k ≤ d"),
        (lambda: gk.project(T, V.mT), ValueError, "k ≤ d"),
        (lambda: gk.project(T, orthonormal(4, 2)), ValueError, "change side"),
        (lambda: gk.project(T, V, side="up"), ValueError, "choose 'right' or 'left'"),
        (lambda: gk.project(T, V, torch.zeros(3, 2)), ValueError, "give \\[4, 2\\]"),
        (lambda: gk.project(T, V, torch.zeros(4, 2).half()), TypeError, "fp32 or T's"),
        (lambda: gk.project(T, V.clone().requires_grad_()), ValueError, "basis requires grad"),
        (lambda: gk.project_([T, T], V), ValueError, "tied weights"),
        (lambda: gk.project_([T], [V, V]), ValueError, "one for each"),
        (lambda: gk.project_(T[:1].expand(4, 8), V), ValueError, "contiguous"),
        (lambda: gk.project_(torch.zeros(11).unfold(0, 8, 1), V), ValueError, "overlaps"),
        (lambda: gk.project_(T.clone().requires_grad_() * 2, V), ValueError, "detach"),
        (lambda: gk.project(T.to("meta"), V), ValueError, "move one"),
    ],
)
def test_refusals_name_the_remedy(call, error, message):
    before = T.clone()
    with pytest.raises(error, match=message):
        call()
    assert torch.equal(T, before)


def test_refuses_dtensor():
    class Sharded(torch.Tensor):
        def to_local(self): ...

    with pytest.raises(TypeError, match="to_local"):
        gk.project(T.as_subclass(Sharded), V)


def test_autocast_changes_nothing():
    """Products of 16-bit copies would let 1e-3 of the component through."""
    T, V, C = torch.randn(64, 96), orthonormal(96, 8), torch.randn(64, 8)
    exact = gk.project(T, V, C)
    W = V + 0.1 * torch.randn(96, 8)
    basis = W.clone()
    gk.orthonormalize_(basis)
    h = torch.randn(4, 96, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = [gk.project(T, V, C), T.clone(), T.clone()]
        gk.project_(found[1], V, C)
        gk.Projector([found[2]], [V], [C])()
        gk.orthonormalize_(W)
        gk.project_gradient(h, V).square().sum().backward()
        assert torch.is_autocast_enabled("cpu")
    assert all(torch.equal(T, exact) for T in found) and torch.equal(W, basis)
    assert float((h.grad @ V).norm()) <= 1e-6 * float(h.grad.norm())
