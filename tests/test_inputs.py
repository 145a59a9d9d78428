"""Bases hold the asked share of inputs on held-out prompts, no more directions than that needs."""

import warnings

import pytest
import torch

from grasp import Reference
from grasp.bases import inputs as reads
from grasp.bases import spectrum
from grasp.bases.stream import Batch, Stream
from grasp.model import inspect
from tests.models import FAMILIES, PROMPTS, build, with_lora


def bases(model, reference, energy=0.9, **options):
    architecture = inspect(model)
    matrices = [m for b in architecture.blocks for m in b.matrices]
    found = reads.input_bases(architecture, matrices, list(reference.rows()), energy, **options)
    return {name: basis for names, basis in found for name in names}


def setting(family: str = "llama"):
    model = build(family)
    return model, Reference(model, PROMPTS, tokens=3, batch=5)


def matrices_of(model):
    return [m for b in inspect(model).blocks for m in b.matrices]


def inputs(model, matrix, reference) -> tuple[torch.Tensor, torch.Tensor]:
    """`[d_in, tokens]` of prompts that are looked at and of those held out, one by one."""
    kept = []
    handle = matrix.module.register_forward_pre_hook(lambda m, a: kept.append(a[0][0]))
    with torch.no_grad():
        for ids, mask in zip(reference.ids, reference.mask, strict=True):
            model(input_ids=ids[mask.bool()][None])
    handle.remove()
    unit = [torch.nn.functional.normalize(x, dim=1).mT.double() for x in kept]
    held = unit[reads.HELD_OUT - 1 :: reads.HELD_OUT]
    seen = [x for i, x in enumerate(unit) if i % reads.HELD_OUT != reads.HELD_OUT - 1]
    return torch.cat(seen, 1), torch.cat(held, 1)


def share(V: torch.Tensor, X: torch.Tensor) -> float:
    return float((V.double().mT @ X).square().sum() / X.square().sum())


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("energy", [0.5, 0.95])
def test_the_fewest_leading_directions_that_hold_the_energy(family, energy):
    model, reference = setting(family)
    found = bases(model, reference, energy)
    for m in matrices_of(model):
        basis, (X, held) = found[m.name], inputs(model, m, reference)
        V, k = basis.V, basis.rank
        torch.testing.assert_close(V.mT @ V, torch.eye(k), atol=1e-6, rtol=0)
        assert basis.share == pytest.approx(share(V, held), abs=1e-5)
        assert basis.sample == pytest.approx(share(V, X), abs=1e-5) and basis.tokens == X.shape[1]
        vectors = torch.linalg.svd(X, full_matrices=False).U  # of what is looked at, by fp64
        assert share(V, X) == pytest.approx(share(vectors[:, :k], X), abs=1e-5)
        assert basis.share >= energy - 1e-5 or k == len(V) - -(-len(V) // spectrum.ROOM)
        assert share(vectors[:, : k - 1], held) < energy + 1e-4


def test_a_few_prompts_are_all_looked_at():
    model = build()
    few = Reference(model, PROMPTS[:4], tokens=3)
    for basis in bases(model, few).values():
        assert basis.share == basis.sample >= 0.9 - 1e-5


def test_a_prompt_that_is_continued_twice_is_held_out_whole():
    model = build()
    twice = Reference(model, PROMPTS, tokens=3, drifted=reads.draw(build(seed=1), PROMPTS))
    tokens = reads.Tokens(model, list(twice.rows()), 0)
    kept = {b: {tuple(r[:5]) for t in tokens.batches if t.held is b for r in t.ids.tolist()}
            for b in (False, True)}  # fmt: skip
    assert not kept[False] & kept[True]
    assert kept[True] == {tuple(p) for p in PROMPTS[4::5]}
    assert sum(len(t.ids) for t in tokens.batches) == 2 * len(PROMPTS)


def test_no_more_than_allowed():
    model, reference = setting()
    whole, few = bases(model, reference), bases(model, reference, rank=3)
    for name, basis in few.items():
        assert basis.rank == min(3, whole[name].rank)
        both = torch.cat([basis.V, whole[name].V], 1)
        assert torch.linalg.matrix_rank(both, tol=1e-3) == whole[name].rank


def test_bottom_directions_hold_the_least_energy_there_is():
    model, reference = setting()
    whole, last = bases(model, reference), bases(model, reference, bottom=True)
    for m in matrices_of(model):
        V, (X, _) = last[m.name].V.double(), inputs(model, m, reference)
        assert V.shape == whole[m.name].V.shape
        torch.testing.assert_close(V.mT @ V, torch.eye(V.shape[1]).double(), atol=1e-6, rtol=0)
        least = float(torch.linalg.eigvalsh(X @ X.mT)[: V.shape[1]].sum())  # the least first
        assert float((V.mT @ X).square().sum()) == pytest.approx(least, abs=1e-3)


def test_maps_with_one_input_share_a_basis():
    of = {
        m.split("layers.1.")[1].split(".")[1]: basis.V
        for m, basis in bases(*setting()).items()
        if "layers.1." in m
    }
    assert of["q_proj"] is of["k_proj"] is of["v_proj"]
    assert of["gate_proj"] is of["up_proj"]
    assert of["q_proj"] is not of["gate_proj"]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_blocks_one_by_one_see_what_the_whole_model_does(monkeypatch, family):
    model, reference = setting(family)
    one_by_one = bases(model, reference)
    looked = []

    def refused(self, rows):
        looked.append(self)

    monkeypatch.setattr(Stream, "look", refused)
    monkeypatch.setattr(reads, "BUDGET", 1)  # an input at a time
    whole = bases(model, reference)
    assert looked and not looked[0].one_by_one
    for name, basis in whole.items():
        assert basis.rank == one_by_one[name].rank
        inside = one_by_one[name].V.mT @ basis.V
        assert float(inside.norm()) ** 2 == pytest.approx(basis.rank, abs=1e-3)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_known_families_run_one_by_one_and_are_left_as_they_were(family):
    model = build(family)
    forwards = [vars(m).get("forward") for m in model.modules()]
    stream = Stream(model, inspect(model).blocks)
    stream.look([torch.tensor([PROMPTS[0]]), torch.tensor(PROMPTS[1:3])[:, :4]])
    assert stream.one_by_one
    assert [vars(m).get("forward") for m in model.modules()] == forwards
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_decoder_whose_blocks_share_states_is_run_whole(monkeypatch):
    model, reference = setting()
    expected = bases(model, reference)
    layers, first = model.model.layers, {}
    # The second block adds what the first took in, which it is not given.
    layers[0].register_forward_pre_hook(lambda m, args: first.update(x=args[0]))
    layers[1].register_forward_pre_hook(lambda m, args: (args[0] + 0.1 * first["x"], *args[1:]))
    stream = Stream(model, inspect(model).blocks)
    stream.look([torch.tensor([PROMPTS[0]]), torch.tensor(PROMPTS[1:3])[:, :4]])
    assert not stream.one_by_one
    found = bases(model, reference)
    name = "model.layers.1.mlp.gate_proj"
    assert (
        found["model.layers.0.mlp.gate_proj"].rank == expected["model.layers.0.mlp.gate_proj"].rank
    )
    X, held = inputs(model, next(m for m in matrices_of(model) if m.name == name), reference)
    assert found[name].share == pytest.approx(share(found[name].V, held), abs=1e-5)


def test_more_is_drawn_while_held_out_prompts_are_held_less(monkeypatch):
    model, reference = setting()
    monkeypatch.setattr(reads, "STABLE", -1.0)  # never stable: all that is allowed is drawn
    quick = bases(model, reference)
    full = bases(model, reference, quick=False)
    widest = max(m.in_features for m in matrices_of(model))
    for name, basis in full.items():
        assert quick[name].tokens < 8 * widest <= basis.tokens < 8 * widest + 8 * len(PROMPTS)
    monkeypatch.setattr(reads, "STABLE", 1.0)
    for name, basis in bases(model, reference, quick=False).items():
        assert basis.tokens == quick[name].tokens


def test_too_few_prompts_are_told():
    model = build()
    with pytest.warns(UserWarning, match=r"of \d+ inputs hold less than read=0.99.*more prompts"):
        bases(model, Reference(model, [p[:2] for p in PROMPTS[:5]], tokens=1), 0.99)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bases(*setting(), 0.5)


def test_an_update_off_the_basis_leaves_those_inputs_alone():
    model, reference = setting()
    found = bases(model, reference, 0.95)
    for m in matrices_of(model):
        V, (_, held) = found[m.name].V.double(), inputs(model, m, reference)
        step = torch.randn(8, V.shape[0]).double()
        off = step - step @ V @ V.mT
        # (off) X = off (I − V Vᵀ) X, and what is in the brackets has 1 − share of X's energy.
        room = (1 - share(V, held)) ** 0.5 * held.norm()
        assert (off @ held).norm() <= (1 + 1e-5) * room * torch.linalg.matrix_norm(off, 2)
        assert (step @ held).norm() > room * torch.linalg.matrix_norm(step, 2)


def test_hooks_are_gone_and_adapters_make_no_difference():
    model = with_lora(build())
    reference = Reference(model, PROMPTS, tokens=3, batch=5)
    found = bases(model, reference)
    assert not any(m._forward_pre_hooks for m in model.modules())
    plain = bases(*setting())
    for m, p in zip(matrices_of(model), plain.values(), strict=False):
        torch.testing.assert_close(
            found[m.name].V, plain[m.name.removeprefix("base_model.model.")].V
        )
        assert p.rank


@pytest.mark.parametrize("seen", [600, 60])
@pytest.mark.parametrize("asked", [0.9, 0.95, 0.98])
def test_what_is_left_alone_where_inputs_are_wide(monkeypatch, seen, asked):
    d, generator = 96, torch.Generator().manual_seed(0)
    scale = torch.logspace(0, -0.7, d)
    Q = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
    moments = spectrum.Moments(d)
    X, held = (torch.randn(n, d, generator=generator) * scale @ Q.mT for n in (seen, 200))
    moments.add(X, False)
    moments.add(held, True)
    by_all = spectrum.choose(moments, asked)
    monkeypatch.setattr(spectrum, "WIDEST", 1)
    by_last = spectrum.choose(moments, asked)
    assert by_last.complement == (2 * by_last.rank > d)
    for rows, said in ((held, by_last.share), (X, by_last.sample)):
        unit = torch.nn.functional.normalize(rows, dim=1).mT.double()
        assert said == pytest.approx(share(by_last.V, unit), abs=1e-5)
    assert by_last.share >= min(asked, by_all.share) - 1e-5
    m = d - by_last.rank
    if seen == 600:  # the fewer say nothing of the last
        # One more of W's directions, if it may have more, would hold too much.
        assert m == d // 4 or by_last.share - asked < 2 * (1 - by_last.share) / m
        assert (1 - by_last.share) / m < 0.6 / d  # a random direction holds 1 / d
    torch.testing.assert_close(by_last.V.mT @ by_last.V, torch.eye(by_last.rank), atol=1e-5, rtol=0)
    T = torch.randn(4, d, generator=generator).double()
    V = by_last.V.double()
    torch.testing.assert_close(by_last.inside(T), T @ V @ V.mT, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seen", [600, 60])
def test_few_are_left_free_where_inputs_are_not_narrow(monkeypatch, seen):
    """V holds what was asked for, and W is drawn from what the eigenvectors would leave."""
    d, free, asked, generator = 96, 12, 0.95, torch.Generator().manual_seed(0)
    scale = torch.logspace(0, -1.2, d)
    Q = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
    moments = spectrum.Moments(d)
    X, held = (torch.randn(n, d, generator=generator) * scale @ Q.mT for n in (seen, 200))
    moments.add(X, False)
    moments.add(held, True)
    eigh = torch.linalg.eigh
    by_all = spectrum.choose(moments, asked, free=free)
    monkeypatch.setattr(spectrum, "NARROW", 1)
    monkeypatch.setattr(torch.linalg, "eigh", None)
    found = spectrum.choose(moments, asked, free=free)
    W = found.directions.double()
    assert found.complement and W.shape == (d, free) and found.rank == d - free
    torch.testing.assert_close(W.mT @ W, torch.eye(free).double(), atol=1e-5, rtol=0)
    for rows, said in ((held, found.share), (X, found.sample)):
        unit = torch.nn.functional.normalize(rows, dim=1).mT.double()
        assert said == pytest.approx(1 - share(W, unit), abs=1e-5)
    assert found.share >= asked
    assert (1 - found.share) == pytest.approx(1 - by_all.share, rel=0.5)
    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    wide = spectrum.choose(moments, asked, free=90)  # more than may be left: none are drawn
    assert wide.share == pytest.approx(spectrum.choose(moments, asked).share)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_are_second_moments(monkeypatch, dtype):
    monkeypatch.setattr(spectrum, "TOGETHER", 5)
    generator = torch.Generator().manual_seed(0)
    moments, rows = spectrum.Moments(13), []
    for n in (3, 0, 7, 2):
        rows.append(torch.randn(n, 13, generator=generator).to(dtype))
        moments.add(rows[-1], False)
    X = torch.nn.functional.normalize(torch.cat(rows).float(), dim=1).to(dtype).double()
    lower = moments.C.double().tril()
    torch.testing.assert_close(lower, (X.mT @ X).tril(), atol=1e-6, rtol=0)
    assert moments.count == 12 and moments.total is None


def test_a_factor_lies_where_second_moments_are_of_no_meaning():
    generator = torch.Generator().manual_seed(0)
    for d in (1, 5, 37):
        X = torch.randn(3 * d, d, generator=generator)
        C = X.mT @ X / len(X)
        B = torch.randn(d, 3, generator=generator)
        expected = torch.linalg.solve(C.double() + 0.1 * torch.eye(d).double(), B.double()).float()
        own = C.tril()
        torch.testing.assert_close(spectrum._factored(own, 0.1)(B), expected)
        assert torch.equal(own.tril(), C.tril())
        torch.testing.assert_close(spectrum._factored(own, 0.1)(B), expected)  # once more
        assert spectrum._factored(-C.tril(), 0.0) is None


def test_rows_of_a_batch_are_of_one_length_and_none_is_lost():
    model = build()
    mixed = [p[: 2 + i % 4] for i, p in enumerate(PROMPTS)]
    reference = Reference(model, mixed, tokens=4)
    tokens = reads.Tokens(model, list(reference.rows()), 0)
    rows = sorted(tuple(r) for b in tokens.batches for r in b.ids.tolist())
    assert rows == sorted(tuple(whole) for _, whole in reference.rows())
    assert all(isinstance(b, Batch) and b.ids.shape[0] <= reads.ROWS for b in tokens.batches)


def test_long_rows_are_of_few_lengths():
    rows = [list(range(n)) for n in range(1, 200)]
    batches = list(reads._batches(rows, held=False))
    found = sorted(row for batch in batches for row in batch.ids.tolist())
    assert len(found) == len(rows) and len({batch.ids.shape for batch in batches}) < 100
    for row, whole in zip(sorted(found, key=len), rows, strict=True):
        assert row == whole[: len(row)] and len(whole) - len(row) < reads.ALIKE
        assert len(row) == len(whole) or len(whole) > reads.LONG
