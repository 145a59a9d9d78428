"""Forward is bit for bit the same; the gradient going back has nothing along the basis."""

from importlib import import_module

import pytest
import torch

import grasp_kernels as gk
from grasp_kernels.testing import orthonormal


def test_forward_is_identical_and_backward_projected():
    h = torch.randn(2, 5, 8, requires_grad=True)
    V, G = orthonormal(8, 3), torch.randn(2, 5, 8)
    out = gk.project_gradient(h, V)
    assert torch.equal(out, h)
    out.backward(G)
    torch.testing.assert_close(h.grad, gk.project(G, V))
    assert (h.grad @ V).norm() <= 1e-6 * h.grad.norm()


def test_is_a_projection_going_back():
    h, V = torch.randn(4, 8, requires_grad=True), orthonormal(8, 3)
    G = torch.randn(4, 8)
    (once,) = torch.autograd.grad(gk.project_gradient(h, V), h, G)
    twice = gk.project_gradient(gk.project_gradient(h, V), V)
    torch.testing.assert_close(torch.autograd.grad(twice, h, G)[0], once)


def test_compiles_whole():
    h, V = torch.randn(4, 8, requires_grad=True), orthonormal(8, 3)

    def loss(h):
        return gk.project_gradient(h * 2, V).square().sum()

    (expected,) = torch.autograd.grad(loss(h), h)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(h), h)[0], expected)


def test_derivatives_of_functions():
    """`torch.func` goes through in reverse, any number of times, over batches too."""
    V, H = orthonormal(8, 3), torch.randn(3, 4, 8)
    bases = torch.stack([orthonormal(8, 3, seed=s) for s in range(3)])

    def loss(h, V=V):
        return (gk.project_gradient(h, V) ** 3).sum()

    def cubed(h, V=V):
        return gk.project(h**2, V, torch.ones(4, 3)).square().sum()

    each = [torch.func.grad(loss)(h) for h in H]
    torch.testing.assert_close(each[0], gk.project(3 * H[0] ** 2, V))
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(H), torch.stack(each))
    both = torch.vmap(torch.func.grad(loss))(H, bases)
    torch.testing.assert_close(both, gk.project(3 * H**2, bases))
    torch.testing.assert_close(
        torch.func.jacrev(lambda h: gk.project_gradient(h, V))(H[0, 0]),
        torch.eye(8) - V @ V.mT,
    )
    for f in (loss, cubed):
        second = torch.func.jacrev(torch.func.jacrev(f))(H[0])
        torch.testing.assert_close(second, torch.autograd.functional.hessian(f, H[0]))
        compiled = torch.compile(torch.func.grad(f), backend="aot_eager")
        torch.testing.assert_close(compiled(H[0]), torch.func.grad(f)(H[0]))
    torch._dynamo.reset()
    torch.compile(torch.func.grad(cubed), backend="aot_eager", fullgraph=True)(H[0])
    with pytest.raises(Exception, match="maybe_current_level"):  # not a wrong gradient
        torch.compile(torch.func.grad(loss), backend="aot_eager", fullgraph=True)(H[0])


@pytest.mark.parametrize("shape", [(4, 8), (3, 4, 8), (8,)])
def test_second_derivative(shape):
    h = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    V = orthonormal(8, 3, torch.float64)
    V = V.expand(3, 8, 3) if len(shape) == 3 else V
    torch.autograd.gradgradcheck(lambda h: gk.project_gradient(h * h, V), h)


@pytest.mark.parametrize("side", ["right", "left"])
def test_vmap_of_project(side, monkeypatch):
    Ts, Cs = torch.randn(3, 8, 8), torch.randn(3, 8, 2)
    Cs = Cs.mT if side == "left" else Cs
    bases = torch.stack([orthonormal(8, 2, seed=s) for s in range(3)])

    def one(T, V, C):
        return gk.project(T, V, C, side=side)

    for dims in ((0, 0, 0), (0, None, None), (None, 0, None), (None, None, 0), (0, None, 0)):
        args = [x if dim == 0 else x[1] for x, dim in zip((Ts, bases, Cs), dims, strict=True)]
        expected = torch.stack(
            [
                one(*(x[i] if dim == 0 else x for x, dim in zip(args, dims, strict=True)))
                for i in range(3)
            ]
        )
        torch.testing.assert_close(torch.vmap(one, dims)(*args), expected)
    calls = []
    module = import_module("grasp_kernels.project")  # the package has a function of that name
    body = module._project_body
    monkeypatch.setattr(module, "_project_body", lambda *a: calls.append(a) or body(*a))
    torch.vmap(one)(Ts, bases, Cs)
    assert len(calls) == 1  # a batch, and not one after the other
    inner = torch.vmap(one, (1, None, None), 1)  # a column at a time is a matrix of its own
    stacked = Ts[:, :, None].expand(3, 8, 5, 8).contiguous()
    found = torch.vmap(inner)(stacked, bases, Cs)
    torch.testing.assert_close(found[2, :, 4], one(Ts[2], bases[2], Cs[2]))


def test_vmap_of_vectors_with_a_basis_each():
    h, bases = torch.randn(3, 8), torch.stack([orthonormal(8, 2, seed=s) for s in range(3)])
    expected = torch.stack([gk.project(x, V) for x, V in zip(h, bases, strict=True)])
    torch.testing.assert_close(torch.vmap(gk.project)(h, bases), expected)
    torch.testing.assert_close(torch.vmap(gk.project)(h, bases[..., 0]).shape, h.shape)


def test_in_place_under_vmap_is_refused():
    V = orthonormal(8, 2)

    def body(T):
        gk.project_(T, V)
        return T

    with pytest.raises(TypeError, match="inside vmap.*use project"):
        torch.vmap(body)(torch.randn(3, 4, 8))


def test_refusals_name_the_remedy():
    with pytest.raises(
        ValueError, match="h is \\[4, 7\\] with 7 right: columns for a basis of d = 8"
    ):
        gk.project_gradient(torch.randn(4, 7), orthonormal(8, 3))
