"""Orthonormal to rounding, the same span, dependent columns 0 at the end."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import grasp_kernels as gk
from grasp_kernels.testing import orthonormal


def conditioned(d: int, k: int, condition: float) -> torch.Tensor:
    spectrum = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), k).double()
    U, V = orthonormal(d, k, torch.float64), orthonormal(k, k, torch.float64, seed=1)
    return (U * spectrum) @ V.mT


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
def test_orthonormal_up_to_condition_1e6(condition):
    exact = conditioned(300, 24, condition)
    W = exact.float()
    (rank,) = gk.orthonormalize_(W)
    assert rank == 24
    Q = W.double()
    assert (Q.mT @ Q - torch.eye(24)).norm() <= 1e-5
    # The span is that of the fp32 matrix; its distance to W is rounding at W's condition.
    outside = exact - Q @ (Q.mT @ exact)
    assert outside.norm() <= 1e-5 * exact.norm()


@given(st.integers(1, 30), st.integers(0, 12), st.integers(0, 2**31))
def test_dependent_columns_go_to_the_end_as_zeros(d, k, seed):
    generator = torch.Generator().manual_seed(seed)
    rank = min(d, k, int(torch.randint(0, 6, (), generator=generator)))
    # A product of integers of small size is exact in fp32, so the rank is what it says.
    factors = [
        torch.randint(-3, 4, s, generator=generator).double() for s in ((d, rank), (rank, k))
    ]
    W = factors[0] @ factors[1]
    expected = int(torch.linalg.matrix_rank(W)) if W.numel() else 0
    Q = W.clone()
    (found,) = gk.orthonormalize_(Q)
    assert found.shape == () and found.dtype == torch.int64
    assert int(found) == expected
    assert torch.count_nonzero(Q[:, expected:]) == 0
    kept = Q[:, :expected]
    torch.testing.assert_close(kept.mT @ kept, torch.eye(expected).double(), atol=1e-10, rtol=0)
    torch.testing.assert_close(kept @ (kept.mT @ W), W, atol=1e-8, rtol=0)


def test_leading_orthonormal_columns_stay():
    U = orthonormal(20, 4)
    W = torch.cat([U, torch.randn(20, 3)], 1)
    gk.orthonormalize_(W)
    torch.testing.assert_close(W[:, :4], U, atol=2e-7, rtol=0)


def test_scale_of_a_column_does_not_matter():
    W = torch.randn(12, 3, dtype=torch.float64)
    scaled = W * torch.tensor([1e-20, 1.0, 1e20])
    gk.orthonormalize_([W, scaled])
    torch.testing.assert_close(W, scaled)


def test_list_of_unlike_matrices():
    Ws = [torch.randn(9, 2), torch.randn(9, 2), torch.randn(5, 3).bfloat16(), torch.zeros(4, 2)]
    ranks = [int(r) for r in gk.orthonormalize_(Ws)]
    assert ranks == [2, 2, 3, 0]
    assert not Ws[3].any()
    assert gk.orthonormalize_([]) == []


def test_opcheck_and_compile():
    ranks = [torch.zeros((), dtype=torch.int64)]
    torch.library.opcheck(torch.ops.grasp.orthonormalize_, ([torch.randn(7, 3)], ranks, None))
    compiled = torch.compile(
        lambda W: gk.orthonormalize_(W)[0], backend="aot_eager", fullgraph=True
    )
    W = torch.randn(7, 3)
    copy = W.clone()
    assert compiled(W) == 3
    gk.orthonormalize_(copy)
    torch.testing.assert_close(W, copy)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gk.orthonormalize_(torch.zeros(3)), ValueError, "\\[d, k\\]"),
        (lambda: gk.orthonormalize_(torch.zeros(3, 2).int()), TypeError, "convert it"),
        (lambda: gk.orthonormalize_(torch.zeros(3, 2), rtol=2.0), ValueError, "rtol"),
    ],
)
def test_refusals_name_the_remedy(call, error, message):
    with pytest.raises(error, match=message):
        call()
