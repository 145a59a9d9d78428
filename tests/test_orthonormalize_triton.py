"""The definition, for a list at once: the same ranks, columns, signs and zeros."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import grasp_kernels as gk
from tests.test_orthonormalize import conditioned

pytest.importorskip("triton")
from grasp_kernels import orthonormalize_triton  # noqa: E402 -- where there is no triton, neither is it

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("k", "condition"), [(24, 1.0), (24, 1e3), (24, 1e6), (100, 1e6)])
def test_orthonormal_up_to_condition_1e6(k, condition):
    """Once, or twice; k = 100 takes several panels of its Gram matrix."""
    exact = conditioned(300, k, condition)
    W = exact.float().to(DEVICE)
    with gk.backend("triton"):
        (rank,) = gk.orthonormalize_(W)
    assert rank == k
    Q = W.double().cpu()
    assert (Q.mT @ Q - torch.eye(k)).norm() <= 1e-5
    assert (exact - Q @ (Q.mT @ exact)).norm() <= 1e-5 * exact.norm()


def laid_out(W, layout):
    if layout == "transposed":
        W = W.mT.contiguous().mT
    elif layout == "strided":
        W = torch.stack([W, W], -1)[..., 0]
    return W.to(DEVICE)


def assert_as_defined(Ws, rtol=None):
    expected = [W.clone() for W in Ws]
    with gk.backend("reference"):
        ranks = gk.orthonormalize_(expected, rtol=rtol)
    with gk.backend("triton"):
        found = gk.orthonormalize_(Ws, rtol=rtol)
    assert found == ranks
    for W, E in zip(Ws, expected, strict=True):
        torch.testing.assert_close(W, E, atol=2 * torch.finfo(W.dtype).eps, rtol=0)


def exact(d, k, rank, generator):
    """Factors of small integers: the rank is what it says in any dtype."""
    shapes = (d, min(d, k, rank)), (min(d, k, rank), k)
    factors = [torch.randint(-2, 3, s, generator=generator) for s in shapes]
    return (factors[0] @ factors[1]).float()


@settings(max_examples=12)
@given(st.data())
def test_same_as_the_definition(data):
    """Shapes, ranks, layouts and dtypes differ in a list."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    Ws = []
    for _ in range(data.draw(st.integers(1, 3))):
        d, k = data.draw(st.integers(1, 80)), data.draw(st.integers(0, 20))
        W = exact(d, k, data.draw(st.integers(0, 6)), generator)
        W = W.to(data.draw(st.sampled_from(DTYPES)))
        Ws.append(laid_out(W, data.draw(st.sampled_from(("plain", "transposed", "strided")))))
    assert_as_defined(Ws)


@settings(max_examples=10)
@given(st.data())
def test_nearly_dependent_columns(data):
    """What the earlier columns leave of one is half of `rtol`, or twice."""
    d, k = data.draw(st.integers(20, 90)), data.draw(st.integers(2, 12))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    rtol = data.draw(st.sampled_from((1e-4, 1e-5, 2e-6)))
    U = torch.linalg.qr(torch.randn(d, k, generator=generator).double()).Q
    coefficients = torch.triu(torch.randn(k, k, generator=generator).double())
    W = U @ coefficients
    for j in range(1, k):
        if data.draw(st.booleans()):
            share = data.draw(st.sampled_from((0.5, 2.0))) * rtol
            inside = W[:, j] - U[:, j] * coefficients[j, j]
            W[:, j] = inside / inside.norm() + share * U[:, j]
    assert_as_defined([W.float().to(DEVICE)], rtol)


@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_each_close_to_the_one_before(dtype):
    """So nearly dependent together that no Gram matrix tells: column by column it is."""
    apart = 16 * torch.finfo(dtype).eps
    W = torch.randn(200, 1) + apart * torch.randn(200, 9).cumsum(1)
    assert_as_defined([W.to(dtype).to(DEVICE), torch.randn(200, 9, device=DEVICE)])


def test_what_a_second_pass_leaves_open(monkeypatch):
    """It goes column by column from where the first has left it, each column with its own limit."""
    tilings = orthonormalize_triton.tilings

    def never_sharp(*kind):
        gram, eliminate, apply = tilings(*kind)
        return gram, {**eliminate, "SHARP": 0.0}, apply

    monkeypatch.setattr(orthonormalize_triton, "tilings", never_sharp)
    W = torch.randn(60, 9)
    W[:, 1] = W[:, 0] + 1e-4 * W[:, 1]
    W[:, 2] = W[:, 0] - W[:, 1]
    W[:, 4] = W[:, 0] - 2 * W[:, 1] + 4e-7 * W[:, 4]
    W[:, 7] = W[:, 5] + 2e-6 * W[:, 7]
    assert_as_defined([W.to(DEVICE), exact(50, 12, 5, torch.default_generator).to(DEVICE)])


def test_what_a_first_pass_leaves_open():
    """Two columns so close that what is left of one is all noise."""
    W = torch.randn(60, 5)
    W[:, 3] = W[:, 1] + 2e-7 * W[:, 3]
    assert_as_defined([W.to(DEVICE)], rtol=1e-8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_columns_that_count_as_dependent(value, dtype):
    W = torch.randn(40, 7).to(dtype)
    W[3, 2], W[:, 5] = value, value
    assert_as_defined([W.to(DEVICE)])


def test_extreme_columns():
    W = torch.randn(50, 4)
    W[:, 0] *= 1e-40
    W[:, 1] *= 1e37
    assert_as_defined([W.to(DEVICE)])


def test_panels_with_dependent_columns():
    """Duplicates within a panel of the Gram matrix and across two, and more columns than rows."""
    W = torch.randn(60, 70)
    W[:, 20], W[:, 40], W[:, 69] = W[:, 3], -W[:, 38], W[:, 1] + W[:, 35]
    assert_as_defined([W[:, :50].contiguous().to(DEVICE), W[:40, :].to(DEVICE)])


def test_a_result_depends_on_its_matrix_alone():
    Ws = [torch.randn(d, 12, device=DEVICE) for d in (700, 90, 1200)]
    alone = Ws[0].clone()
    with gk.backend("triton"):
        gk.orthonormalize_(alone)
        gk.orthonormalize_(Ws)
    assert torch.equal(Ws[0], alone)


def test_leading_orthonormal_columns_stay():
    W = torch.randn(90, 12, device=DEVICE)
    with gk.backend("triton"):
        gk.orthonormalize_(W)
        kept = W.clone()
        gk.orthonormalize_(W)
    torch.testing.assert_close(W, kept, atol=2e-7, rtol=0)


def test_refuses_what_it_can_not_do_right():
    with gk.backend("triton"):
        with pytest.raises(RuntimeError, match="fp64"):
            gk.orthonormalize_(torch.randn(4, 2, dtype=torch.float64, device=DEVICE))
        with pytest.raises(RuntimeError, match="k = 257 is above 256"):
            gk.orthonormalize_(torch.randn(90, 257, device=DEVICE))
