"""The divergence is KL, 0 at the start, and its gradient is what finite differences say."""

import pytest
import torch
from transformers.cache_utils import DynamicLayer

import grasp
from grasp import Reference
from grasp.data.room import Room, give_room
from tests.models import FAMILIES, build, trainable, with_lora

PROMPTS = [
    *torch.randint(3, 64, (6, 4), generator=torch.Generator().manual_seed(0)).tolist(),
    [5, 6],
]


def test_zero_at_the_start_and_positive_after():
    model = with_lora(build())
    reference = Reference(model, PROMPTS, tokens=3, batch=4)
    assert reference.measure(model) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for p in trainable(model):
            p.add_(0.1 * torch.randn_like(p))
    assert reference.measure(model) > 1e-3


def test_a_fine_tunes_continuations_are_compared_with_the_base():
    model, tuned = build(), build(seed=1)
    drifted = grasp.draw(tuned, PROMPTS, tokens=3)
    for (ids, labels), row in zip(drifted, PROMPTS, strict=True):
        assert ids[: len(row)] == row and labels[len(row) :] == ids[len(row) :]
    alone = Reference(model, PROMPTS, tokens=3, batch=4)
    both = Reference(model, PROMPTS, tokens=3, batch=4, drifted=drifted)
    assert both.measure(model) == pytest.approx(0, abs=1e-6)
    assert len(both.top) == 2 * len(alone.top)
    whole, half = both.measure(tuned), alone.measure(tuned)
    positions = [sum(len(t) for t in kept) for kept in (both.top, alone.top)]
    ids, _ = drifted[0]
    assert both.ids[len(PROMPTS), : len(ids)].tolist() == ids
    assert whole != pytest.approx(half) and positions[0] > positions[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_tokens_are_drawn_by_is_what_the_model_says_there(family):
    """Read off while drawing, with a cache and prompts of any lengths side by side."""
    model = build(family)
    reference = Reference(model, PROMPTS, tokens=4, batch=4)
    with torch.no_grad():
        for i, (top, base) in enumerate(zip(reference.top, reference.base, strict=True)):
            logs = reference._logs(model, [i])
            assert len(top) == len(base) == int(reference.compared[i].sum())
            torch.testing.assert_close(
                base[:, : top.shape[1]], logs.gather(1, top), atol=1e-4, rtol=0
            )


@torch.no_grad()
def test_keys_and_values_grow_where_they_are():
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(2, 2, 3, n, 5, generator=generator) for n in (4, 1, 2)]
    joined = DynamicLayer()
    joined.update(*states[0])
    layer = Room(joined, [torch.empty(2, 3, 7, 5), torch.empty(2, 3, 7, 5)])
    places = {T.data_ptr() for T in (layer.keys, layer.values)}
    for K, V in states[1:]:
        for found, expected in zip(layer.update(K, V), joined.update(K, V), strict=True):
            assert torch.equal(found, expected)
        assert layer.get_seq_length() == joined.get_seq_length()
    assert places == {T.data_ptr() for T in (layer.keys, layer.values)}
    cache = build()(input_ids=torch.tensor([PROMPTS[0]]), use_cache=True).past_key_values
    give_room(cache, 9)
    assert cache.layers and all(isinstance(layer, Room) for layer in cache.layers)


def test_is_the_mean_kl_over_continued_tokens():
    model = build()
    reference = Reference(model, PROMPTS, tokens=3, batch=2)
    other = build(seed=1)
    total = []
    with torch.no_grad():
        for i, row in enumerate(PROMPTS):
            whole = reference.ids[i, : int(reference.mask[i].sum())]
            assert whole[: len(row)].tolist() == row
            new = len(whole) - len(row)
            assert new == 3 or whole[-1] == 2  # an end token ends it early
            logs = [m(input_ids=whole[None]).logits[0].log_softmax(-1) for m in (model, other)]
            base, tuned = (x[len(row) - 1 : -1] for x in logs)
            total += (base.exp() * (base - tuned)).sum(-1).tolist()
    assert reference.measure(other) == pytest.approx(sum(total) / len(total), rel=1e-4)


def test_continuations_are_drawn_from_the_model():
    model, count = build(), 3000
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[5, 6]])).logits[0, -1].softmax(-1)
    reference = Reference(model, [[5, 6]] * count, tokens=1, batch=500)
    drawn = torch.bincount(reference.ids[:, 2], minlength=len(expected)) / count
    # Five standard deviations of a share, and a count or two where it is tiny.
    room = 5 * (expected * (1 - expected) / count).sqrt() + 2 / count
    assert (drawn - expected).abs().le(room).all()
    again = Reference(model, [[5, 6]] * count, tokens=1, batch=500)
    other = Reference(model, [[5, 6]] * count, tokens=1, batch=500, seed=1)
    assert torch.equal(reference.ids, again.ids) and not torch.equal(reference.ids, other.ids)


def test_gradient_matches_finite_differences():
    model = with_lora(build()).double()
    reference = Reference(model, PROMPTS, tokens=2)
    B = [p for n, p in model.named_parameters() if "lora_B" in n][3]
    with torch.no_grad():
        B.normal_(std=0.1)
    rows = list(range(len(PROMPTS)))
    (gradient,) = torch.autograd.grad(reference.divergence(model, rows), B)
    step = torch.randn_like(B)
    values = []
    with torch.no_grad():
        for sign in (1, -1):
            # Log-probabilities are fp32, so a smaller step would measure their rounding.
            B.add_(sign * 1e-3 * step)
            values.append(float(reference.divergence(model, rows)))
            B.sub_(sign * 1e-3 * step)
    expected = (values[0] - values[1]) / 2e-3
    assert float((gradient * step).sum()) == pytest.approx(expected, rel=5e-3)


def test_large_vocabulary_keeps_the_rest_as_one_token(monkeypatch):
    """A coarser partition can only lower a KL divergence, and keeps it at 0 for equals."""
    model, other = build(), build(seed=1)
    whole = Reference(model, PROMPTS, tokens=2)
    monkeypatch.setattr("grasp.data.reference.TOP", 16)
    coarse = Reference(model, PROMPTS, tokens=2)
    assert coarse.top[0].shape[1] == 16 and coarse.base[0].shape[1] == 17
    assert coarse.measure(model) == pytest.approx(0, abs=1e-5)
    assert 0 < coarse.measure(other) <= whole.measure(other) + 1e-5


def test_samples_are_fixed_by_the_seed():
    model = build()
    a, b = (Reference(model, PROMPTS, batch=3, seed=4) for _ in range(2))
    assert [a.sample() for _ in range(3)] == [b.sample() for _ in range(3)]
    back = Reference.from_state_dict(a.state_dict(), a.batch)
    assert back.sample() == b.sample()
    assert back.measure(build(seed=1)) == a.measure(build(seed=1))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_what_is_drawn_does_not_depend_on_what_runs_beside_it(monkeypatch, family):
    model = build(family)
    mixed = [list(range(3, 3 + n)) for n in (9, 2, 5, 2, 14, 1)]
    together = grasp.draw(model, mixed, tokens=6)
    for name in ("KEPT", "MOST"):
        with monkeypatch.context() as patch:
            patch.setattr(f"grasp.data.drawing.{name}", 1)
            assert grasp.draw(model, mixed, tokens=6) == together
    assert grasp.draw(model, mixed[:3], tokens=6) == together[:3]
    for (ids, labels), row in zip(together, mixed, strict=True):
        said = ids[len(row) :]
        assert ids[: len(row)] == row and labels == [-100] * len(row) + said
        assert len(said) == 6 or said[-1] == 2  # an end token ends it early
        assert 2 not in said[:-1]
