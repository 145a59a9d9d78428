"""Every Triton kernel: right under the interpreter, and what the compiler makes of it elsewhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import grasp_kernels as gk
from grasp_kernels.testing import assert_no_worse, orthonormal, project_fp64, project_torch

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIDES = ("right", "left")


@st.composite
def lists(draw):
    """Unlike matrices, some with odd strides, some empty, with or without C."""
    side = draw(st.sampled_from(SIDES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    with_C = draw(st.booleans())
    Ts, bases, Cs = [], [], []
    for _ in range(draw(st.integers(1, 3))):
        d, n = draw(st.integers(1, 150)), draw(st.integers(0, 70))
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


@settings(max_examples=40)
@given(lists())
def test_error_is_at_most_twice_pytorchs(case):
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
def test_rank(side, k):
    T, U = torch.randn(130, 130, device=DEVICE), orthonormal(130, k).to(DEVICE)
    exact, theirs = project_fp64(T, U, None, side), project_torch(T, U, None, side)
    with gk.backend("triton"):
        assert_no_worse(gk.project(T, U, side=side), theirs, exact, T)


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
    from grasp_kernels import project_triton

    launches, made = [], []
    real = project_triton.Launch.run
    monkeypatch.setattr(project_triton.Launch, "run", lambda *a: (launches.append(a[0]), real(*a)))
    monkeypatch.setattr(
        project_triton, "to_device", lambda host, device: made.append(host) or host.to(device)
    )
    rows = zip((3, 16, 90), DTYPES, strict=True)
    Ts = [torch.randn(r, 100, device=DEVICE).to(dtype) for r, dtype in rows]
    U = orthonormal(100, k).to(DEVICE)
    with gk.backend("triton"):
        gk.project_(Ts, U)
        assert len(launches) == 1 and len(made) == 3
        gk.project_(Ts, U)
        assert launches == [launches[0]] * 2 and len(made) == 3
        gk.project_([T.clone() for T in Ts], U)  # elsewhere: where they lie is new, nothing else
    assert launches == [launches[0]] * 3 and len(made) == 4


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


SHARED = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB a program may have


def test_compiles_for_every_architecture_without_spilling():
    """Every configuration that can be launched, by the compiler itself: no GPU is needed."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.aot"],
        capture_output=True,
        text=True,
        env=env,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert {r["arch"] for r in results} == set(SHARED)
    for r in results:
        assert r["spilled"] == 0, r
        assert r["shared"] <= SHARED[r["arch"]] * 1024, r
        if r["op"] != "project":
            continue  # in fp64
        assert r["matrix_instructions"] > 0, r
        if r["options"]["KP"] <= 32 and not r["options"]["wide"]:  # others take narrower tiles
            assert r["wide_loads"] and r["wide_stores"], r
