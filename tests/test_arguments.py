"""What PyTorch's own functions take, these take: batches, one direction, None, any tensor."""

import gc
import weakref
from importlib import import_module

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import grasp_kernels as gk
from grasp_kernels.project import DTYPES
from grasp_kernels.testing import assert_no_worse, orthonormal, project_fp64, project_torch
from tests.test_project_triton import DEVICE

SIDES = ("right", "left")
BACKENDS = ("reference", "triton")
T, V = torch.randn(4, 8), orthonormal(8, 2)


def batch(side: str, dtype=torch.float32, n=5, d=12, k=3):
    """`b = 4` matrices, each with its own basis and coefficients."""
    T = torch.randn(4, *((d, n) if side == "left" else (n, d)), device=DEVICE).to(dtype)
    bases = torch.stack([orthonormal(d, k, seed=s) for s in range(4)]).to(DEVICE)
    return T, bases, torch.randn(4, *((k, n) if side == "left" else (n, k)), device=DEVICE)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batched_basis_is_one_for_each_leading_index(backend, dtype, side):
    if backend == "triton" and dtype == torch.float64:
        return
    T, bases, C = batch(side, dtype)
    exact = torch.stack([project_fp64(*each, side) for each in zip(T, bases, C, strict=True)])
    theirs = torch.stack([project_torch(*each, side) for each in zip(T, bases, C, strict=True)])
    given = T.clone()
    with gk.backend(backend):
        assert_no_worse(gk.project(T, bases, C, side=side), theirs, exact, given)
        shared = [T, T[0].clone()]
        gk.project_(shared, [bases, bases[1]], [C, C[0]], side=side)
        assert_no_worse(T, theirs, exact, given)
        one = project_fp64(given[0], bases[1], C[0], side)
        assert_no_worse(shared[1], project_torch(given[0], bases[1], C[0], side), one, given[0])


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_projector_counts_a_batch_as_one_tensor(backend, side):
    T, bases, _ = batch(side)
    expected, other = gk.project(T, bases, side=side), torch.randn(3, 12, 12, device=DEVICE)
    inside = bases.mT @ T if side == "left" else T @ bases
    with gk.backend(backend):
        projector = gk.Projector([other, T], [bases[0], bases], side=side, measure=True)
        projector()
    torch.testing.assert_close(T, expected)
    measured = torch.stack([expected.square().sum() + inside.square().sum(), inside.square().sum()])
    torch.testing.assert_close(projector.energies()[1], measured.double().cpu(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_of_batches_and_empty_ones(backend):
    Ts = torch.randn(2, 4, 3, 5, 12, device=DEVICE)
    bases = torch.stack([batch("right")[1], batch("right")[1].flip(0)])  # [2, 4, d, k]
    with gk.backend(backend):
        found = gk.project(Ts, bases)
        torch.testing.assert_close(found[1, 2, 0], gk.project(Ts[1, 2, 0], bases[1, 2]))
        assert gk.project(Ts[:0], bases[:0]).shape == (0, 4, 3, 5, 12)
        assert gk.project(Ts[..., :0, :], bases).shape == (2, 4, 3, 0, 12)
    assert "reference" in gk.explain(Ts.cpu(), bases.cpu()) or DEVICE != "cpu"


def test_sixteen_bits_of_a_large_batch_are_converted_a_part_at_a_time(monkeypatch):
    T = torch.randn(3, 700, 1024).half()
    bases = torch.stack([orthonormal(1024, 2, seed=s) for s in range(3)])
    each = torch.stack([gk.project(t, b) for t, b in zip(T, bases, strict=True)])
    reference, sizes = import_module("grasp_kernels.project"), []
    whole = reference._project_strip
    monkeypatch.setattr(
        reference, "_project_strip", lambda T, *more: sizes.append(T.numel()) or whole(T, *more)
    )
    assert torch.equal(gk.project(T, bases), each)
    assert max(sizes) * 4 <= reference.STRIP < T.numel() * 4


@pytest.mark.parametrize("side", SIDES)
def test_one_direction_is_a_column(side):
    v, T = V[:, 0], torch.randn(8, 8)
    expected = gk.project(T, v[:, None], side=side)
    C = torch.randn(8, 1) if side == "right" else torch.randn(1, 8)
    pinned = gk.project(T, v[:, None], C, side=side)
    found = [gk.project(T, v, side=side), T.clone(), T.clone()]
    gk.project_([found[1]], v, side=side)
    gk.Projector([found[2]], [v], side=side)()
    assert all(torch.equal(X, expected) for X in found)
    assert torch.equal(gk.project(T, v, C, side=side), pinned)
    h = torch.randn(8, 8, requires_grad=True)
    gk.project_gradient(h, v).backward(T)
    torch.testing.assert_close(h.grad, gk.project(T, v))
    gk.explain(T, v)


@pytest.mark.parametrize("dtype", DTYPES)
def test_check_lets_rounded_bases_through(dtype):
    exact = orthonormal(300, 80, torch.float64)
    for basis in (exact.to(dtype), exact[:, 0].to(dtype), exact.T.reshape(1, 80, 300).mT.to(dtype)):
        T = torch.randn(1, 3, 300, dtype=dtype)
        gk.project(T, basis, check=True)
        gk.project_(T, basis, check=True)
    W = torch.randn(300, 80).to(dtype)
    gk.orthonormalize_(W)
    gk.project(T, W, check=True)
    if dtype.itemsize > 2:
        gk.project(T, torch.linalg.qr(torch.randn(300, 80, dtype=dtype)).Q, check=True)


@pytest.mark.parametrize("worse", [1.02, float("nan")])
def test_check_says_by_how_much(worse):
    h, bad = torch.randn(4, 8, requires_grad=True), V * worse
    calls = (
        lambda check: gk.project(T, bad, check=check),
        lambda check: gk.project_(T.clone(), bad, check=check),
        lambda check: gk.project_([T.clone(), T.clone()], [V, bad], check=check),
        lambda check: gk.Projector([T.clone()], bad, check=check),
        lambda check: gk.project_gradient(h, bad, check=check),
        lambda check: gk.project(T, bad[:, 0], check=check),
        lambda check: gk.project(T[None], bad[None], check=check),
        lambda check: torch.compile(lambda T: gk.project(T, bad, check=check), backend="eager")(T),
    )
    size = "nan" if worse != worse else "0.0"
    for call in calls:
        call(False)
        with pytest.raises(ValueError, match=f"not orthonormal: .* is {size}.*orthonormalize_"):
            call(True)
    with pytest.raises(ValueError, match="bases\\[1\\] is not orthonormal"):
        calls[2](True)


def test_none_is_left_out():
    Ts, bases = [T.clone(), None, T.clone()], [V, orthonormal(3, 1), orthonormal(8, 4)]
    Cs = [torch.randn(4, 2), None, torch.randn(4, 4)]
    gk.project_(Ts, bases, Cs)
    assert torch.equal(Ts[0], gk.project(T, V, Cs[0]))
    assert torch.equal(Ts[2], gk.project(T, bases[2], Cs[2]))
    gk.project_([None, None], V)
    gk.project_([None], [None])
    with pytest.raises(TypeError, match="bases\\[2\\] is a NoneType"):
        gk.project_([None, T, T.clone()], [None, V, None])
    with pytest.raises(TypeError, match="Cs\\[0\\] is a NoneType"):
        gk.project_([T], V, [None])
    with pytest.raises(TypeError, match="Ts is a NoneType"):
        gk.project_(None, V)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_projector_leaves_out_what_is_none_this_time(backend):
    weights = [torch.randn(4, 8, device=DEVICE) for _ in range(3)]
    bases = [orthonormal(8, 2, seed=s).to(DEVICE) for s in range(3)]
    Cs = [torch.randn(4, 2, device=DEVICE) for _ in range(3)]
    kept, energies = [w.clone() for w in weights], torch.zeros(3, 2, dtype=torch.float64)
    with gk.backend(backend):
        projector = gk.Projector(weights, bases, Cs, measure=True)
        for n in range(2**3 * 3):  # every pattern, three times
            grads = [torch.randn(4, 8, device=DEVICE) if n >> i & 1 else None for i in range(3)]
            expected = [
                None if G is None else gk.project(G, b, C)
                for G, b, C in zip(grads, bases, Cs, strict=True)
            ]
            for i, G in enumerate(grads):
                if G is not None:
                    energies[i] += torch.stack([G.square().sum(), (G @ bases[i]).square().sum()])
            projector(grads)
            for G, right in zip(grads, expected, strict=True):
                assert (G is None) == (right is None)
                torch.testing.assert_close(G, right)
    torch.testing.assert_close(projector.energies(), energies, rtol=1e-4, atol=0)
    assert not projector.energies().any()
    assert all(torch.equal(w, k) for w, k in zip(weights, kept, strict=True))
    with pytest.raises(ValueError, match="Ts has 2 tensors; this projector takes 3"):
        projector([None, weights[0]])
    with pytest.raises(TypeError, match="Ts\\[1\\] is a str"):
        projector([None, "T", None])
    with pytest.raises(TypeError, match="Ts holds None"):
        gk.Projector([None, weights[0]], V)


def test_patterns_of_none_are_not_kept_for_ever(monkeypatch):
    monkeypatch.setattr("grasp_kernels.projector.KEPT", 2)
    weights = [T.clone() for _ in range(5)]
    projector = gk.Projector(weights, V, measure=True)
    for left_out in range(5):
        projector([None if i == left_out else T.clone() for i in range(5)])
        if not left_out:
            first = weakref.ref(next(iter(projector._parts.values())))
    gc.collect()
    assert first() is None and len(projector._parts) == 2
    whole = 4 * T.double().square().sum()
    torch.testing.assert_close(projector.energies()[:, 0], whole.expand(5), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: T.long(), TypeError, "is torch.int64; convert"),
        (lambda: T > 0, TypeError, "is torch.bool; convert"),
        (lambda: T.to(torch.cfloat), TypeError, "is torch.complex64; convert"),
        (lambda: T.to(torch.float8_e4m3fn), TypeError, "float8_e4m3fn; convert"),
        (lambda: torch.quantize_per_tensor(T, 0.1, 0, torch.qint8), TypeError, "qint8; convert"),
        (lambda: T.to_sparse(), TypeError, "sparse_coo; pass .*to_dense"),
        (lambda: T.to_sparse_csr(), TypeError, "sparse_csr; pass .*to_dense"),
        (lambda: torch.nested.nested_tensor([T, T[:2]]), TypeError, "nested; pass .*unbind"),
        (lambda: T.numpy(), TypeError, "is a ndarray; give a torch.Tensor"),
        (lambda: None, TypeError, "is a NoneType; give a torch.Tensor"),
        (lambda: torch.tensor(1.0), ValueError, "must be"),
    ],
)
def test_what_is_no_matrix_is_refused(make, error, message):
    odd = make()
    for call in (
        lambda: gk.project(odd, V),
        lambda: gk.project(T, odd),
        lambda: gk.project_([T, odd], [V, V] if odd is not None else [odd, V]),
        lambda: gk.project_gradient(odd, V),
        lambda: gk.Projector([odd], [V]),
    ):
        with pytest.raises(
            TypeError if odd is None else error, match="" if odd is None else message
        ):
            call()


def test_shapes_of_batches_are_named():
    bases = V.expand(3, 8, 2)
    for T, message in (
        (torch.randn(2, 4, 8), "T is \\[2, 4, 8\\] and basis \\[3, 8, 2\\].*leading b = 2"),
        (torch.randn(3, 8), "T is \\[3, 8\\]; it must be \\[b, ..., n, d\\]"),
        (torch.randn(3, 4, 7), "7 right: columns for a basis of d = 8"),
    ):
        with pytest.raises(ValueError, match=message):
            gk.project(T, bases)
    with pytest.raises(ValueError, match="C is \\[3, 4\\]; .* give \\[3, 4, 2\\]"):
        gk.project(torch.randn(3, 4, 8), bases, torch.zeros(3, 4))
    with pytest.raises(ValueError, match="k ≤ d"):
        gk.project(T, bases.mT)


def test_a_wrapper_of_other_tensors_is_refused():
    from torch.testing._internal.two_tensor import TwoTensor

    with pytest.raises(TypeError, match="TwoTensor, which wraps other tensors"):
        gk.project_(TwoTensor(T.clone(), T.clone()), V)


def test_a_kind_of_parameter_is_a_tensor_like_others():
    class Flat(torch.nn.Parameter):
        pass

    weights = [Flat(T.clone()), Flat(T.clone())]
    expected = gk.project(T, V)
    gk.project_(weights, V)
    gk.Projector(weights, V)()
    assert all(torch.allclose(w, expected, atol=1e-6) for w in weights)
    with pytest.raises(ValueError, match="the same memory"):
        gk.project_([weights[0], weights[0]], V)


def test_tensors_without_values_keep_their_shapes():
    meta, basis = [T.to("meta"), T.to("meta")], V.to("meta")
    gk.project_(meta, basis)
    assert gk.project(meta[0], basis).is_meta
    with FakeTensorMode():
        for device in ("cpu", "cuda"):  # a fake one needs no GPU
            Ts = [torch.empty(4, 8, device=device) for _ in range(2)]
            basis = torch.empty(8, 2, device=device)
            gk.project_(Ts, basis)
            assert gk.project(Ts[0], basis).shape == (4, 8)


@pytest.mark.parametrize("alias", [lambda T: T, lambda T: T.view(4, 8)])
def test_a_tensor_listed_twice_is_seen_when_compiled(alias):
    compiled = torch.compile(
        lambda a, b: gk.project_([a, b], V), backend="aot_eager", fullgraph=True
    )
    torch._dynamo.reset()
    tied = T.clone()
    with pytest.raises(ValueError, match="the same memory \\(tied weights"):
        compiled(tied, alias(tied))
