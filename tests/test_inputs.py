"""Bases hold the asked share of the inputs' energy, no more directions than that needs."""

import pytest
import torch

from grasp import Reference
from grasp import model as architecture
from grasp.bases import inputs as reads
from tests.models import build, with_lora

PROMPTS = torch.randint(3, 64, (12, 5), generator=torch.Generator().manual_seed(1)).tolist()


def found(energy: float = 0.9, family: str = "llama"):
    model = build(family)
    matrices = [m for b in architecture.inspect(model).blocks for m in b.matrices]
    reference = Reference(model, PROMPTS, tokens=3, batch=5)
    return model, matrices, reference, reads.input_bases(model, matrices, reference, energy)


def inputs(model, matrix, reference) -> torch.Tensor:
    """`[d_in, tokens]`, prompt by prompt, without padding."""
    kept = []
    handle = matrix.module.register_forward_pre_hook(lambda m, a: kept.append(a[0][0]))
    with torch.no_grad():
        for ids, mask in zip(reference.ids, reference.mask, strict=True):
            model(input_ids=ids[mask.bool()][None])
    handle.remove()
    return torch.nn.functional.normalize(torch.cat(kept), dim=1).mT.double()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("energy", [0.5, 0.95])
def test_the_fewest_directions_that_hold_the_energy(family, energy):
    model, matrices, reference, bases = found(energy, family)
    for m in matrices:
        V, X = bases[m.name].double(), inputs(model, m, reference)
        torch.testing.assert_close(V.mT @ V, torch.eye(V.shape[1]).double(), atol=1e-6, rtol=0)
        best = torch.linalg.svdvals(X).square()
        share = (V.mT @ X).square().sum() / best.sum()
        assert share >= energy - 1e-5
        # As good as the best basis of its size, and one direction fewer would not do.
        k = V.shape[1]
        assert share == pytest.approx(float(best[:k].sum() / best.sum()), abs=1e-5)
        assert best[: k - 1].sum() / best.sum() < energy + 1e-5


def test_no_more_than_allowed():
    model, matrices, reference, whole = found()
    few = reads.input_bases(model, matrices, reference, 0.9, rank=3)
    for name, V in few.items():
        assert V.shape[1] == min(3, whole[name].shape[1])
        torch.testing.assert_close(V, whole[name][:, : V.shape[1]])


@pytest.mark.parametrize("tokens", [10, reads.TOKENS])
def test_bottom_directions_hold_the_least_energy_there_is(monkeypatch, tokens):
    monkeypatch.setattr(reads, "TOKENS", tokens)
    model, matrices, reference, whole = found()
    last = reads.input_bases(model, matrices, reference, 0.9, bottom=True)
    for m in matrices:
        V = last[m.name].double()
        assert V.shape == whole[m.name].shape
        torch.testing.assert_close(V.mT @ V, torch.eye(V.shape[1]).double(), atol=1e-6, rtol=0)
        if tokens > 10:  # those that `inputs` gives
            X = inputs(model, m, reference)
            energies = torch.linalg.eigvalsh(X @ X.mT)  # the least first
            least = float(energies[: V.shape[1]].sum())
            assert float((V.mT @ X).square().sum()) == pytest.approx(least, abs=1e-3)


def test_maps_with_one_input_share_a_basis():
    _, matrices, _, bases = found()
    of = {m.name.rsplit(".", 2)[0] + m.name.rsplit(".", 1)[-1]: bases[m.name] for m in matrices}
    block = "model.layers.1"
    assert of[block + "q_proj"] is of[block + "k_proj"] is of[block + "v_proj"]
    assert of[block + "gate_proj"] is of[block + "up_proj"]
    assert of[block + "q_proj"] is not of[block + "gate_proj"]


def test_memory_is_bounded_and_changes_nothing(monkeypatch):
    _, _, _, whole = found()
    monkeypatch.setattr(reads, "BUDGET", 1)  # one input at a time
    _, _, _, parts = found()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_large_bases_are_told_before_all_are_made(monkeypatch):
    model, matrices, reference, whole = found()
    size = sum({id(V): V.nbytes for V in whole.values()}.values())
    monkeypatch.setattr(reads, "LARGE", size // 2)
    with pytest.warns(UserWarning, match=r"of \d+ distinct inputs already.*give read_rank") as told:
        found()
    assert len(told) == 1
    reads.input_bases(model, matrices, reference, 0.9, rank=1)  # small enough: nothing to say


def test_fewer_tokens_than_inputs(monkeypatch):
    monkeypatch.setattr(reads, "TOKENS", 10)
    _, _, _, bases = found(0.999)
    for V in bases.values():
        assert V.shape[1] <= 10
        torch.testing.assert_close(V.mT @ V, torch.eye(V.shape[1]), atol=1e-6, rtol=0)


def test_an_update_off_the_basis_leaves_those_inputs_alone():
    model, matrices, reference, bases = found(0.99)
    for m in matrices:
        V, X = bases[m.name].double(), inputs(model, m, reference)
        step = torch.randn(8, V.shape[0]).double()
        off = step - step @ V @ V.mT
        # Energy left in the inputs is a hundredth, so a step off the basis moves a tenth as much.
        per_size = (off @ X).norm() / off.norm() / ((step @ X).norm() / step.norm())
        assert per_size < 0.35


def test_hooks_are_gone_and_adapters_make_no_difference():
    model = with_lora(build())
    matrices = [m for b in architecture.inspect(model).blocks for m in b.matrices]
    reference = Reference(model, PROMPTS, tokens=3, batch=5)
    bases = reads.input_bases(model, matrices, reference, 0.9)
    assert not any(m._forward_pre_hooks for m in model.modules())
    _, plain, _, expected = found()
    for m, p in zip(matrices, plain, strict=True):
        torch.testing.assert_close(bases[m.name], expected[p.name])
