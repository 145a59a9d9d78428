"""Forward is bit for bit the same; the gradient going back has nothing along the basis."""

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


def test_refusals_name_the_remedy():
    with pytest.raises(ValueError, match="give \\[..., d\\]"):
        gk.project_gradient(torch.randn(4, 7), orthonormal(8, 3))
