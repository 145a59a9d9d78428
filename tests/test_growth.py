"""Bases found on unlabelled prompts: at the start, while a run trains, and as controls."""

import inspect
import re

import pytest
import torch
from safetensors.torch import load_file

from grasp import Guard, Reference, draw
from grasp.bases.growth import DIRECTIONS, Growth
from grasp.study.settings import Settings
from tests.models import PROMPTS, batch, build, inside, subspaces, train, trainable, with_lora


def test_drift_guided_bases_grow_and_hold():
    model = with_lora(build())
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    options = {"rank": 5, "refresh": 2, "grow": 2}
    guard = Guard(model, reference=PROMPTS, tokens=2, optimizer=optimizer, read=0, **options)
    with guard:
        plain = model(**batch()).logits
        assert not guard.bases
        train(model, optimizer, 10)
        ranks = {m["rank"] for m in guard.leak().values()}
        # A matrix of 16 outputs and r = 4 has at most four directions in one gradient.
        assert ranks and max(ranks) == 5
        assert max(m["through"] for m in guard.leak().values()) <= 1e-6
        model(**batch()).loss.backward()
        assert inside(guard) <= 1e-6
    assert not torch.equal(model(**batch()).logits, plain)
    for U in guard.bases.values():
        torch.testing.assert_close(U.mT @ U, torch.eye(U.shape[1]), atol=1e-5, rtol=0)


def test_drift_guided_without_an_optimizer_sees_the_steps():
    model = with_lora(build())
    with Guard(model, reference=PROMPTS, tokens=2, every=1, refresh=1) as guard:
        other = torch.nn.Linear(2, 2)
        other(torch.ones(2)).sum().backward()
        torch.optim.SGD(other.parameters(), lr=0.1).step()
        assert guard.steps == 0
        train(model, torch.optim.AdamW(trainable(model), lr=1e-2), 3)
        assert guard.steps == 3 and len(guard.divergences) == 3


def test_says_so_when_no_step_was_seen():
    model = with_lora(build())
    with pytest.warns(UserWarning, match="no basis grew"):
        with Guard(model, reference=PROMPTS, tokens=2):
            model(**batch()).loss.backward()
            with torch.no_grad():
                for p in trainable(model):
                    p -= 0.1 * p.grad
    model, other = with_lora(build()), torch.optim.SGD(torch.nn.Linear(2, 2).parameters())
    with pytest.raises(ValueError, match="holds none of the guarded"):
        Guard(model, subspaces(), optimizer=other).attach()
    assert not any(p._post_accumulate_grad_hooks for p in trainable(model))


def test_drift_guided_training_drifts_less():
    """On the prompts that guide it; the organism's test shows it on topics that do not."""

    def drift(guarded: bool, directions: str = "drift") -> float:
        model = with_lora(build())
        reference = Reference(model, PROMPTS, tokens=2)
        optimizer = torch.optim.AdamW(trainable(model), lr=3e-3)
        if guarded:
            with Guard(
                model,
                reference=reference,
                optimizer=optimizer,
                refresh=2,
                rank=12,
                directions=directions,
            ):
                train(model, optimizer, 30)
        else:
            train(model, optimizer, 30)
        return reference.measure(model)

    plain, guarded, random = drift(False), drift(True), drift(True, "random")
    assert guarded < 0.6 * plain
    assert random > guarded


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("lora", [True, False])
def test_inputs_of_the_reference_are_not_acted_on(family, lora):
    """What the update does to them is what lies in the energy that the basis leaves out."""

    def drift(read: float) -> float:
        model = build(family)
        if lora:
            model = with_lora(model, **({"fan_in_fan_out": True} if family == "gpt2" else {}))
        else:
            for name, p in model.named_parameters():
                p.requires_grad_(p.ndim > 1 and ("_proj" in name or "c_" in name))
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        plain = model(**batch()).logits
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.1)
        with Guard(
            model, reference=PROMPTS, tokens=2, optimizer=optimizer, read=read, rank=2
        ) as guard:
            assert torch.equal(model(**batch()).logits, plain)
            train(model, optimizer, 8)
            inputs = [g for g in guard.guarded if g.trained.holds == "inputs"]
            assert bool(inputs) == (read > 0)
            if inputs:
                assert max(g.leak()["through"] for g in inputs) <= 1e-6
                assert min(g.leak()["blocked"] for g in inputs) > 0.1
        assert max(m["through"] for m in guard.leak().values()) <= 1e-5
        assert any(not torch.equal(before[n], p) for n, p in model.named_parameters())
        return guard.growth.reference.measure(model)

    assert drift(0.99) < 0.5 * drift(0.0)


def test_a_frozen_lora_a_is_taken_off_the_inputs_too():
    model = with_lora(build())
    for name, p in model.named_parameters():
        if "lora_A" in name:
            p.requires_grad_(False)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    with Guard(model, reference=PROMPTS, tokens=2, optimizer=optimizer) as guard:
        train(model, optimizer, 2)
    assert max(m["through"] for m in guard.leak().values()) <= 1e-6


def grown(directions: str, **options) -> dict[str, torch.Tensor]:
    """The bases after a first growth, up to which all directions train alike."""
    model = with_lora(build())
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    options |= {"reference": PROMPTS, "optimizer": optimizer, "directions": directions}
    with Guard(model, tokens=2, refresh=2, **options) as guard:
        train(model, optimizer, 2)
    return guard.bases


def test_bottom_directions_are_the_last_of_the_drift_gradient():
    options = {"read": 0, "rank": 2}  # of the four that a gradient has at r = 4
    found, last = grown("drift", **options), grown("bottom", **options)
    assert set(found) == set(last) and len(found) == 14
    for name, U in found.items():
        assert U.shape == last[name].shape and float((U.mT @ last[name]).norm()) < 1e-3


@pytest.mark.parametrize("options", [{"rank": 0}, {"read": 0, "rank": 2}])
def test_shuffled_directions_are_another_blocks(options):
    found, shuffled = grown("drift", **options), grown("shuffled", **options)
    assert set(found) == set(shuffled) and len(found) == 14
    for name, U in found.items():
        V = shuffled[re.sub(r"layers\.(\d)", lambda m: f"layers.{1 - int(m[1])}", name)]
        torch.testing.assert_close(U @ U.mT, V @ V.mT, atol=1e-4, rtol=0)
    lone = with_lora(build(), ["o_proj"], layers_to_transform=[0])
    with pytest.raises(ValueError, match="finds no other block with a matrix like"):
        Guard(lone, reference=PROMPTS, directions="shuffled", **options).attach()


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("directions", DIRECTIONS)
def test_state_is_taken_up(tmp_path, directions, lora):
    def start():
        model = with_lora(build()) if lora else build()
        if not lora:
            for name, p in model.named_parameters():
                p.requires_grad_("_proj" in name)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        options = {"tokens": 2, "refresh": 2, "rank": 6, "batch": 4, "optimizer": optimizer}
        options["directions"] = directions
        return model, optimizer, Guard(model, reference=PROMPTS, **options)

    model, optimizer, guard = start()
    with guard:
        train(model, optimizer, 6)
    expected = [p.detach().clone() for p in trainable(model)]

    model, optimizer, guard = start()
    with guard:
        train(model, optimizer, 3)
        guard.save(tmp_path / "guard.safetensors")
        kept = load_file(tmp_path / "guard.safetensors")
        # An adapter leaves the base model, so what it sees there need not be kept.
        assert any("lora_A" in key and "basis" in key for key in kept) is False
        assert any("inputs" in key and "basis" in key for key in kept) is not lora
    weights, state = model.state_dict(), optimizer.state_dict()
    model, optimizer, guard = start()
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    guard.attach(tmp_path / "guard.safetensors")
    for step in range(3, 6):
        model(**batch(seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    guard.detach()
    for a, p in zip(expected, trainable(model), strict=True):
        assert torch.equal(a, p)
    with pytest.raises(ValueError, match="of another guard"):
        Guard(with_lora(build(), ["o_proj"]), subspaces()).attach(tmp_path / "guard.safetensors")
    (tmp_path / "bad").write_text("no")
    with pytest.raises(ValueError, match="no saved guard"):
        guard.attach(tmp_path / "bad")


def test_one_set_of_defaults():
    """What the evidence is made with is what the callback, the guard and the command line do."""
    of_growth = inspect.signature(Growth).parameters
    for other in (Reference, draw, Settings):
        shared = inspect.signature(other).parameters.keys() & of_growth.keys()
        assert ({"tokens"} if other is draw else {"tokens", "batch"}) <= shared
        for name in shared - {"reference", "drifted"}:
            assert inspect.signature(other).parameters[name].default == of_growth[name].default
