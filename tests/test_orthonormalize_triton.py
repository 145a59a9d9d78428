"""The definition, in one launch: the same ranks, spans and zeros."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import grasp_kernels as gk
from tests.test_orthonormalize import conditioned

pytest.importorskip("triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
def test_orthonormal_up_to_condition_1e6(condition):
    exact = conditioned(300, 24, condition)
    W = exact.float().to(DEVICE)
    with gk.backend("triton"):
        (rank,) = gk.orthonormalize_(W)
    assert rank == 24
    Q = W.double().cpu()
    assert (Q.mT @ Q - torch.eye(24)).norm() <= 1e-5
    assert (exact - Q @ (Q.mT @ exact)).norm() <= 1e-5 * exact.norm()


@settings(max_examples=25)
@given(st.data())
def test_same_as_the_definition(data):
    """Integer factors make exact ranks; shapes, layouts and dtypes differ in a list."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    Ws = []
    for _ in range(data.draw(st.integers(1, 3))):
        d, k = data.draw(st.integers(1, 80)), data.draw(st.integers(0, 20))
        rank = min(d, k, data.draw(st.integers(0, 6)))
        factors = [torch.randint(-2, 3, s, generator=generator) for s in ((d, rank), (rank, k))]
        W = (factors[0] @ factors[1]).float().to(data.draw(st.sampled_from(DTYPES)))
        layout = data.draw(st.sampled_from(("plain", "transposed", "strided")))
        if layout == "transposed":
            W = W.mT.contiguous().mT
        elif layout == "strided":
            W = torch.stack([W, W], -1)[..., 0]
        Ws.append(W.to(DEVICE))
    expected = [W.clone() for W in Ws]
    with gk.backend("reference"):
        ranks = gk.orthonormalize_(expected)
    with gk.backend("triton"):
        found = gk.orthonormalize_(Ws)
    assert found == ranks
    for W, E in zip(Ws, expected, strict=True):
        torch.testing.assert_close(W, E, atol=2 * torch.finfo(W.dtype).eps, rtol=0)


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
        with pytest.raises(RuntimeError, match="k = 65 is above 64"):
            gk.orthonormalize_(torch.randn(90, 65, device=DEVICE))
