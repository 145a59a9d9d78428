"""What is laid out once does at every call what `project_` does, and counts what it takes out."""

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings

import grasp_kernels as gk
from grasp_kernels import native
from grasp_kernels.testing import assert_no_worse, orthonormal, project_fp64, project_torch
from tests.test_project_triton import DEVICE, SIDES, lists

BACKENDS = ["reference", "triton"]
if torch.cuda.is_available() and native.missing() is None:
    BACKENDS.append("cuda")


def energies_fp64(Ts, bases, side):
    parts = [
        (T.double(), B.double().mT @ T.double() if side == "left" else T.double() @ B.double())
        for T, B in zip(Ts, bases, strict=True)
    ]
    return torch.tensor([[float(x.square().sum()) for x in pair] for pair in parts]).double()


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=30)
@given(lists())
def test_does_what_project_does(name, case):
    Ts, bases, Cs, side = case
    others = [T * 2 for T in Ts]  # some of other strides
    before = [T.clone() for T in Ts], [T.clone() for T in others]
    with gk.backend(name):
        projector = gk.Projector(Ts, bases, Cs, side=side, measure=True)
        assert all(torch.equal(T, B) for T, B in zip(Ts, before[0], strict=True))  # not yet
        projector()
        projector(others)
    for Xs, Bs in zip((Ts, others), before, strict=True):
        for X, B, U, C in zip(Xs, Bs, bases, Cs or [None] * len(Xs), strict=True):
            assert_no_worse(X, project_torch(B, U, C, side), project_fp64(B, U, C, side), B)
    exact = sum(energies_fp64(Bs, bases, side) for Bs in before)
    torch.testing.assert_close(projector.energies(), exact, rtol=1e-4, atol=1e-4)
    assert not projector.energies().any()  # counted from nothing again


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("side", SIDES)
def test_wide_bases_are_counted_once(name, side):
    T, U = torch.randn(150, 150, device=DEVICE), orthonormal(150, 140).to(DEVICE)
    exact = energies_fp64([T], [U], side)
    with gk.backend(name):
        projector = gk.Projector([T], [U], side=side, measure=True)
        projector()
    torch.testing.assert_close(projector.energies(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BACKENDS)
def test_memory_that_moves_is_followed(name):
    w, U = torch.nn.Parameter(torch.randn(6, 20, device=DEVICE)), orthonormal(20, 3).to(DEVICE)
    with gk.backend(name):
        projector = gk.Projector([w], U)
        projector()
        w.data = torch.randn(6, 20, device=DEVICE)
        projector()
        assert float((w @ U).abs().max()) < 1e-5
        w.data = w.data.bfloat16()
        with pytest.raises(ValueError, match="changed its shape, dtype or device; make a new one"):
            projector()


@pytest.mark.parametrize("name", BACKENDS)
def test_holds_no_gradient_and_bumps_versions(name):
    w = torch.nn.Parameter(torch.randn(6, 20, device=DEVICE))
    with gk.backend(name):
        projector = gk.Projector([w], orthonormal(20, 3).to(DEVICE))
        gradient = torch.randn(6, 20, device=DEVICE)
        projector([gradient])
        gone = weakref.ref(gradient)
        del gradient
        gc.collect()
        assert gone() is None
        loss = (w * w).sum()
        projector()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", BACKENDS)
def test_an_overflow_is_not_counted(name):
    T, U = torch.randn(4, 20, device=DEVICE), orthonormal(20, 3).to(DEVICE)
    exact = energies_fp64([T], [U], "right")
    with gk.backend(name):
        projector = gk.Projector([T], U, measure=True)
        projector([torch.full_like(T, float("inf"))])
        projector()
    torch.testing.assert_close(projector.energies(), exact, rtol=1e-4, atol=1e-4)


def test_runs_as_it_is_inside_a_compiled_step():
    w, U = torch.randn(6, 20), orthonormal(20, 3)
    projector = gk.Projector([w], U)

    def step(x):
        projector()
        return x * 2

    assert float(torch.compile(step, backend="aot_eager")(torch.ones(()))) == 2
    assert float((w @ U).abs().max()) < 1e-5


def test_refusals():
    T, U = torch.randn(6, 20), orthonormal(20, 3)
    projector = gk.Projector([T], U)
    with pytest.raises(ValueError, match="measure=True"):
        projector.energies()
    with pytest.raises(ValueError, match="Ts has 2 tensors; this projector takes 1"):
        projector([T, T])
    with pytest.raises(ValueError, match="change side"):
        projector([torch.randn(20, 6)])
    with pytest.raises(ValueError, match="autograd graph"):
        projector([torch.randn(6, 20, requires_grad=True) * 2])
    two = gk.Projector([T, T.clone()], U)
    with pytest.raises(ValueError, match="the same memory"):
        two([T, T])
    with gk.backend("cuda"), pytest.raises(RuntimeError, match="'cuda' can't run project_"):
        projector()
    gk.Projector([], [])()
