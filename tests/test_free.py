"""A kept among a few free directions of inputs: all others are blocked, and none of them is kept.

What is blocked is taken here from bases that a guard without the limit keeps, and from complements
in fp64.
"""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch

import grasp
import grasp_kernels as gk
from grasp import Guard, Reference
from grasp.bases import spectrum
from grasp.guard import frozen
from grasp.guard.inside import Inside
from tests.models import FAMILIES, PROMPTS, batch, build, train, trainable, with_lora
from tests.test_experts import deltas, routed
from tests.test_frozen import factors
from tests.test_guarantee import trained_before
from tests.test_inputs import inputs, matrices_of, share

FREE = 5
OPTIONS = {"reference": PROMPTS, "tokens": 3, "rank": 2, "refresh": 2, "read": 0.5}
FEW = OPTIONS | {"free_rank": FREE}


def orthonormal(d: int, p: int, seed: int = 0) -> torch.Tensor:
    drawn = torch.randn(d, p, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(drawn).Q


def projector(Ts: list[torch.Tensor], Ws: list[torch.Tensor], side: str) -> Inside:
    whole = SimpleNamespace(moves=True, of=lambda T: T)
    return Inside(gk.Projector(Ts, Ws, side=side, measure=True), [whole] * len(Ts), Ts)


def off(W: torch.Tensor, T: torch.Tensor) -> float:
    """‖T (I − W Wᵀ)‖ / ‖T‖ in fp64."""
    T, W = T.double(), W.double()
    return float((T - T @ W @ W.mT).norm() / T.norm())


@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_onto_what_is_left(side, precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        W = orthonormal(40, 6)
        Ts = [torch.randn(*((40, n) if side == "left" else (n, 40))) for n in (3, 7)]
        T0 = [T.clone() for T in Ts]
        project = projector(Ts, [W, W], side)
        project()
    finally:
        torch.set_float32_matmul_precision(before)
    energies = project.energies()
    for T, start, (total, blocked) in zip(Ts, T0, energies.tolist(), strict=True):
        right, begun = (T.mT, start.mT) if side == "left" else (T, start)
        P = W.double() @ W.double().mT
        torch.testing.assert_close(right.double(), begun.double() @ P, atol=1e-6, rtol=1e-5)
        assert off(W, right) <= 3e-7
        assert total == pytest.approx(float(begun.double().square().sum()), rel=1e-5)
        gone = begun.double() - begun.double() @ P
        assert blocked == pytest.approx(float(gone.square().sum()), rel=1e-4)
    assert float(project.energies().abs().sum()) == 0  # counted once
    other = [torch.randn_like(T).bfloat16() for T in Ts]
    project(other)
    assert all(T.dtype == torch.bfloat16 for T in other)
    assert max(off(W, T.mT if side == "left" else T) for T in other) < 0.01


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_no_update_acts_on_what_is_not_free(family):
    conv = {"fan_in_fan_out": True} if family == "gpt2" else {}
    model = with_lora(build(family), **conv)
    with Guard(with_lora(build(family), **conv), **OPTIONS) as guard:
        ordinary = {n: V.double() for n, V in guard.bases.items() if "lora_A" in n}
    started = factors(model)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.1)
    with Guard(model, optimizer=optimizer, **FEW) as guard:
        train(model, optimizer, 6)
        found = guard.certificate()
    kept = {g.name: g for g in guard.guarded if "lora_A" in g.name}
    assert found["holds"] and kept.keys() == ordinary.keys()
    for name, (B, A) in factors(model).items():
        g, d = kept[name], A.shape[1]
        assert g.inside and g.basis.shape == (d, FREE)
        V = torch.linalg.qr(g.basis.double(), mode="complete").Q[:, FREE:]
        torch.testing.assert_close(
            guard.bases[name].double() @ guard.bases[name].double().mT, V @ V.mT, atol=1e-5, rtol=0
        )
        assert found["modules"][name]["rank"] == d - FREE
        D = B @ A
        share = float((D @ V).norm() / D.norm())
        assert share <= 1e-6 and float((D @ ordinary[name]).norm() / D.norm()) <= 1e-6
        assert found["modules"][name]["through"] == pytest.approx(share, rel=0.05, abs=1e-8)
        began = started[name][1]
        assert float((A - (began - began @ V @ V.mT)).norm() / A.norm()) > 0.01  # A trains
    if family == "llama":  # queries, keys and values take in one thing, gates and ups another
        assert len({g.basis.data_ptr() for g in kept.values()}) * 7 == 4 * len(kept)


def test_free_directions_are_among_those_that_are_not_blocked_and_the_share_is_told():
    model = build()
    reference = Reference(model, PROMPTS, tokens=3, batch=5)
    rows, energy = list(reference.rows()), 0.5
    found = grasp.model.inspect(model)
    every = [dict(_named(found, rows, energy, free)) for free in (None, FREE)]
    for m in matrices_of(model):
        ordinary, few = (bases[m.name] for bases in every)
        W = few.directions
        assert few.complement and W.shape[1] == FREE
        assert float((ordinary.V.mT @ W).norm()) <= 1e-5
        seen, held = inputs(model, m, reference)
        assert few.share == pytest.approx(1 - share(W, held), abs=1e-5)
        assert few.sample == pytest.approx(1 - share(W, seen), abs=1e-5)


def _named(found, rows, energy, free):
    matrices = [m for block in found.blocks for m in block.matrices]
    bases = grasp.bases.inputs.input_bases(found, matrices, rows, energy, quick=True, free=free)
    return [(name, basis) for names, basis in bases for name in names]


def test_a_limit_above_what_is_left_changes_nothing():
    model = with_lora(build())
    with Guard(model, **OPTIONS | {"free_rank": 1000}) as guard:
        limited = guard.bases
    with Guard(with_lora(build()), **OPTIONS) as guard:
        assert all(torch.equal(V, limited[n]) for n, V in guard.bases.items())


def test_the_gradient_of_a_step_and_what_of_it_was_blocked():
    model = with_lora(build())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.02)
    plain = copy.deepcopy(model)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.zero_()
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    with Guard(model, optimizer=optimizer, **FEW | {"rank": 0}) as guard:
        with torch.no_grad():  # a B that hands gradients on, as after a step
            for (n, p), (_, q) in zip(
                model.named_parameters(), plain.named_parameters(), strict=True
            ):
                if "lora_B" in n:
                    p.copy_(q)
                elif "lora_A" in n:
                    q.copy_(p)
        model(**batch()).loss.backward()
        plain(**batch()).loss.backward()
        leak = guard.leak()
        expected = {n: p.grad.double() for n, p in plain.named_parameters() if "lora_A" in n}
        for g in guard.guarded:
            G, W = expected[f"{g.name}.weight"], g.basis.double()
            kept = G @ W @ W.mT
            torch.testing.assert_close(g.parameter.grad.double(), kept, atol=1e-6, rtol=1e-4)
            gone = 1 - float(kept.square().sum() / G.square().sum())
            assert leak[g.name]["blocked"] == pytest.approx(gone, rel=1e-3)


@pytest.mark.parametrize("file", ["there", "lost"])
def test_a_run_goes_on_bit_for_bit(tmp_path, file):
    def start():
        torch.manual_seed(0)
        model = with_lora(build())
        return model, torch.optim.AdamW(trainable(model), lr=1e-2)

    model, optimizer = start()
    with Guard(model, optimizer=optimizer, **FEW) as guard:
        train(model, optimizer, 3)
        guard.save(tmp_path / "guard.safetensors")
        kept, moments = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        train(model, optimizer, 3)
        certificate = guard.certificate()
    if file == "lost":
        (tmp_path / "guard_inputs.safetensors").unlink()
    again, resumed = start()
    again.load_state_dict(kept)
    resumed.load_state_dict(moments)
    with Guard(again, optimizer=resumed, **FEW) as second:
        pass
    second.attach(tmp_path / "guard.safetensors")
    assert all(g.inside for g in second.guarded if "lora_A" in g.name)
    again.load_state_dict(kept)
    train(again, resumed, 3)
    for name, p in model.state_dict().items():
        if file == "there":
            assert torch.equal(p, again.state_dict()[name]), name
        else:  # found anew, to rounding
            torch.testing.assert_close(p, again.state_dict()[name], atol=1e-4, rtol=1e-3)
    assert second.certificate()["holds"] and certificate["holds"]
    second.detach()


def test_few_where_bases_would_be_large_and_says_so(monkeypatch):
    monkeypatch.setattr(frozen, "LARGE", 4000)
    monkeypatch.setattr(frozen, "FREE", 3)
    with pytest.warns(UserWarning, match=r"would take about .* GiB: of what is not blocked, 3 "):
        guard = Guard(with_lora(build()), **OPTIONS).attach()
    reading = [g for g in guard.guarded if "lora_A" in g.name]
    assert not guard.frozen and all(g.basis.shape[1] == 3 and g.inside for g in reading)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for options in ({"freeze_inputs": False}, {"read_rank": 1}, {"free_rank": 4}):
            guard = Guard(with_lora(build()), **OPTIONS | options).attach()
            few = any(g.inside for g in guard.guarded)
            assert few == ("free_rank" in options) and not guard.frozen


def test_inputs_so_wide_that_less_is_left_than_blocked_are_kept_by_what_is_left(monkeypatch):
    monkeypatch.setattr(spectrum, "WIDEST", 1)
    model = with_lora(build())
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    with Guard(model, optimizer=optimizer, **OPTIONS) as guard:
        train(model, optimizer, 4)
    inside = [g for g in guard.guarded if g.inside]
    assert inside and guard.certificate()["holds"]
    for g in inside:
        assert 2 * g.basis.shape[1] < g.basis.shape[0]
    assert max(m["through"] for m in guard.leak().values()) <= 1e-6


def test_an_adapter_that_goes_on_is_held_from_where_it_began():
    """Its start is pinned along what is blocked, which is kept then."""
    model = trained_before()
    before = factors(model)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with Guard(model, optimizer=optimizer, **FEW) as guard:
            train(model, optimizer, 6)
    assert guard.certificate()["holds"] and not any(g.inside for g in guard.guarded)
    for name, (B, A) in factors(model).items():
        D = B @ A - before[name][0] @ before[name][1]
        V = guard.bases[name].double()
        assert V.shape[1] == len(V) - FREE
        assert float((D @ V).norm()) <= guard.certificate()["modules"][name]["bound"] * D.norm()


def test_of_experts_each():
    model = routed("mixtral")
    before = deltas(model)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    with Guard(model, optimizer=optimizer, **FEW) as guard:
        train(model, optimizer, 4)
    assert guard.certificate()["holds"] and all(
        g.inside for g in guard.guarded if "lora_A" in g.name
    )
    bases, moved = guard.bases, 0
    for name, after in deltas(model).items():
        D, V = after - before[name], bases[f"{name}.lora_A.default"].double()
        moved += bool(D.any())
        assert float((D @ V).norm()) <= 1e-6 * float(D.norm())
    assert moved


def test_one_input_may_be_held_by_both_kinds_and_is_taken_up_so(monkeypatch, tmp_path):
    """A LoRA that goes on keeps V, a fresh one beside it W; what is kept on disk tells which."""
    monkeypatch.setenv("GRASP_CACHE", str(tmp_path))
    found = []
    for _ in range(2):
        model = with_lora(build())
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name and ("v_proj" in name or "up_proj" in name):
                    p.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            guard = Guard(model, **FEW).attach()
        found.append({g.name: (g.inside, g.basis) for g in guard.guarded if "lora_A" in g.name})
        guard.detach()
    first, second = found
    assert {inside for inside, _ in first.values()} == {True, False}
    for name, (inside, basis) in first.items():
        assert second[name][0] == inside and torch.equal(second[name][1], basis)
        assert basis.shape[1] == (FREE if inside else len(basis) - FREE)


def test_a_gradient_that_overflowed_counts_for_nothing():
    W, T = orthonormal(12, 3), torch.ones(2, 12)
    project = projector([T], [W], "right")
    project([torch.full((2, 12), float("inf"))])
    project([torch.ones(2, 12)])
    assert float(project.energies()[0, 0]) == pytest.approx(24)


def test_what_a_guard_chose_for_large_bases_is_not_what_its_user_asked_for(monkeypatch, tmp_path):
    """Attached again once B has learned, or resumed, it asks anew, or goes by the run's own."""
    monkeypatch.setattr(frozen, "LARGE", 4000)
    monkeypatch.setattr(frozen, "FREE", 3)
    model = with_lora(build())
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        guard = Guard(model, optimizer=optimizer, **OPTIONS)
        with guard:
            assert guard.growth.free_rank == 3
            train(model, optimizer, 3)
            guard.save(tmp_path / "guard.safetensors")
        with guard:
            assert guard.growth.free_rank is None
        (tmp_path / "guard_inputs.safetensors").unlink()
        resumed = Guard(model, optimizer=optimizer, **OPTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        resumed.attach(tmp_path / "guard.safetensors")
    assert all(g.basis.shape[1] == 3 for g in resumed.guarded if "lora_A" in g.name)
    assert resumed.growth.free_rank == 3
    resumed.detach()


def test_what_an_optimizer_averages_is_held_as_well():
    model = with_lora(build())
    optimizer = torch.optim.ASGD(trainable(model), lr=0.3, t0=0)
    with Guard(model, optimizer=optimizer, **FEW) as guard:
        train(model, optimizer, 5)
    for g in guard.guarded:
        if g.inside:
            assert off(g.basis, optimizer.state[g.parameter]["ax"]) <= 1e-6


def test_a_limit_that_is_none():
    with pytest.raises(ValueError, match="free_rank is 0; give 1 or more"):
        Guard(with_lora(build()), **OPTIONS | {"free_rank": 0})
