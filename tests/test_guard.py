"""The guarantee, that it has teeth, and that nothing else changes."""

import warnings

import pytest
import torch

from grasp import Guard
from grasp import model as architecture
from tests.models import (
    FAMILIES,
    PROMPTS,
    batch,
    build,
    inside,
    subspaces,
    train,
    trainable,
    with_lora,
)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [True, False])
def test_gradients_stay_off_and_forward_is_identical(family, lora):
    model = build(family)
    if lora:
        fan = {"fan_in_fan_out": True} if family == "gpt2" else {}
        model = with_lora(model, **fan)
    plain = model(**batch()).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a full fine-tune trains embeddings too
        guard = Guard(model, subspaces())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        guard.attach()
    out = model(**batch())
    assert torch.equal(out.logits, plain)
    out.loss.backward()
    assert inside(guard) <= 1e-6
    roles = {g.trained.matrix.role for g in guard.guarded}
    assert roles == {"writer", "value", "hidden"}
    assert max(m["blocked"] for m in guard.leak().values()) > 1e-3
    guard.detach()
    model.zero_grad()
    model(**batch()).loss.backward()
    assert inside(guard) > 1e-2  # teeth: without the guard the gradient is there


def test_detached_guard_leaves_nothing():
    def run(guarded: bool):
        model = with_lora(build())
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        if guarded:
            with Guard(model, subspaces(), optimizer=optimizer, residual=True):
                pass
            with Guard(model, reference=PROMPTS, tokens=2, optimizer=optimizer):
                pass
        losses = train(model, optimizer, 3)
        hooks = [len(p._post_accumulate_grad_hooks or {}) for p in trainable(model)] + [
            len(m._forward_hooks) for m in model.modules()
        ]
        return losses, model.state_dict(), optimizer.state_dict(), sum(hooks)

    losses, weights, state, hooks = run(False)
    losses2, weights2, state2, hooks2 = run(True)
    assert losses == losses2 and hooks == hooks2 == 0
    assert all(torch.equal(weights[k], weights2[k]) for k in weights)
    for a, b in zip(state["state"].values(), state2["state"].values(), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_removes_its_hooks_when_training_fails():
    model = with_lora(build())
    with pytest.raises(RuntimeError, match="boom"), Guard(model, subspaces()):
        raise RuntimeError("boom")
    model(**batch()).loss.backward()
    assert not any(p._post_accumulate_grad_hooks for p in trainable(model))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_pinned_weights_do_not_leak_under_adamw(weight_decay):
    model = with_lora(build())
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=weight_decay)
    with Guard(model, subspaces(), optimizer=optimizer) as guard:
        train(model, optimizer, 50)
    assert max(m["through"] for m in guard.leak().values()) <= 1e-6


def test_gradients_alone_leak_under_adamw():
    """The reason for pinning: AdamW's element-wise scaling turns the update back in."""
    model = with_lora(build())
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    with Guard(model, subspaces()) as guard:
        train(model, optimizer, 50)
    assert max(m["through"] for m in guard.leak().values()) > 1e-2


def test_gradients_alone_are_exact_under_sgd():
    model = with_lora(build())
    with Guard(model, subspaces()) as guard:
        train(model, torch.optim.SGD(trainable(model), lr=0.1, momentum=0.9), 30)
    assert max(m["through"] for m in guard.leak().values()) <= 1e-5


def test_full_weights_keep_what_they_did_along_the_factor():
    model = build()
    for name, p in model.named_parameters():
        p.requires_grad_("_proj" in name)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3, weight_decay=0.1)
    writer = architecture.inspect(model).blocks[0].of_role("writer")[0]
    s = subspaces()
    before = s[0].mT @ writer.base.weight.detach()
    with Guard(model, s, optimizer=optimizer):
        train(model, optimizer, 20)
    after = s[0].mT @ writer.base.weight.detach()
    assert (after - before).norm() <= 1e-5 * before.norm()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "gpt2"])
def test_a_guarded_value_map_cannot_reach_the_factor(family):
    """Over one position attention hands values on, so what v moves along U must be 0 exactly."""
    model = build(family)
    found = architecture.inspect(model)
    s = subspaces()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Guard(model, s) as guard:
            bases = {g.trained.matrix.name: g for g in guard.guarded if g.parameter.ndim == 2}
    block = found.blocks[0]
    (value,) = block.of_role("value")
    U = s[0] if value.writer.scale is None else value.writer.scale[:, None] * s[0]
    kept = []
    handle = value.writer.module.register_forward_hook(lambda m, a, o: kept.append(o[0, 0]))
    g = bases[value.name]
    step = torch.randn_like(g.parameter)
    step -= step @ g.basis @ g.basis.mT if not g.left else g.basis @ (g.basis.mT @ step)
    with torch.no_grad():
        model(input_ids=torch.tensor([[7]]))
        g.parameter.add_(step)
        model(input_ids=torch.tensor([[7]]))
    handle.remove()
    moved = kept[1] - kept[0]
    assert (U.mT @ moved).norm() <= 1e-4 * moved.norm()
    assert moved.norm() > 0.1


def test_hidden_bases_are_the_directions_that_reach_the_factor_most():
    """A step of gate or up along its basis moves U several times as far as one off it."""
    model = build()
    s = subspaces(1)
    block = architecture.inspect(model).blocks[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Guard(model, s) as guard:
            bases = {name.removesuffix(".weight"): U for name, U in guard.bases.items()}
    down = block.of_role("writer")[1]
    ids = torch.randint(64, (32, 8))

    def moved(m, direction) -> float:
        kept = []
        handles = [down.module.register_forward_hook(lambda m, a, o: kept.append(o))]
        with torch.no_grad():
            model(input_ids=ids)
            handles.append(m.module.register_forward_hook(lambda m, a, o: o + 1e-2 * direction))
            model(input_ids=ids)
        for h in handles:
            h.remove()
        return float(((kept[1] - kept[0]) @ s[1]).norm())

    for m in block.of_role("hidden"):
        U = bases[m.name]
        off = torch.randn(20, m.out_features)
        off = torch.nn.functional.normalize(off - off @ U @ U.mT, dim=1)
        others = torch.tensor([moved(m, direction) for direction in off])
        assert moved(m, U[:, 0]) > 2 * others.mean()


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_gradient_checkpointing(reentrant):
    model = with_lora(build()).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with Guard(model, subspaces(), residual=True) as guard:
        model(**batch()).loss.backward()
        assert inside(guard) <= 1e-6
        checked = [p.grad.clone() for p in trainable(model)]
    other = with_lora(build()).train()
    with Guard(other, subspaces(), residual=True):
        other(**batch()).loss.backward()
    for a, p in zip(checked, trainable(other), strict=True):
        torch.testing.assert_close(a, p.grad)


def test_under_accumulation():
    model = with_lora(build())
    with Guard(model, subspaces()) as guard:
        for part in range(3):
            (model(**batch(seed=part)).loss / 3).backward()
        summed = [p.grad.clone() for p in trainable(model)]
        assert inside(guard) <= 1e-6
    other = with_lora(build())
    for part in range(3):
        (other(**batch(seed=part)).loss / 3).backward()
    with Guard(other, subspaces()) as guard:
        guard.gradients.pending = list(guard.guarded)
        guard.gradients.project()
    for a, p in zip(summed, trainable(other), strict=True):
        torch.testing.assert_close(a, p.grad)


def test_under_compile():
    model = with_lora(build())
    compiled = torch.compile(model, backend="aot_eager")
    with Guard(model, subspaces(), residual=True) as guard:
        out = compiled(**batch())
        torch.testing.assert_close(out.logits, model(**batch()).logits)
        out.loss.backward()
        assert inside(guard) <= 1e-6


def test_survives_a_backward_pass_that_failed():
    model = with_lora(build())
    with Guard(model, subspaces()) as guard:
        handle = architecture.inspect(model).blocks[0].module.register_full_backward_hook(fail)
        with pytest.raises(RuntimeError, match="failed half-way"):
            model(**batch()).loss.backward()
        handle.remove()
        model.zero_grad()
        model(**batch()).loss.backward()
        assert inside(guard) <= 1e-6


def fail(*args):
    raise RuntimeError("failed half-way")


def test_overflowing_gradients_do_not_spoil_the_count():
    model = with_lora(build())
    with Guard(model, subspaces()) as guard:
        (model(**batch()).loss * float("inf")).backward()
        model.zero_grad()
        model(**batch()).loss.backward()
        assert all(0 <= m["blocked"] <= 1 for m in guard.leak().values())
        assert inside(guard) <= 1e-6


def test_several_adapters():
    model = with_lora(build())
    model.add_adapter("second", model.peft_config["default"])
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    model.base_model.set_adapter(["default", "second"])
    with Guard(model, subspaces()) as guard:
        model(**batch()).loss.backward()
        assert {g.name.rsplit(".", 1)[-1] for g in guard.guarded} == {"default", "second"}
        assert inside(guard) <= 1e-6


def test_residual_form_projects_what_flows_back():
    model = with_lora(build())
    grads = []

    def watch(module, args, output):
        h = output[0] if isinstance(output, tuple) else output
        h.register_hook(grads.append)

    s = subspaces()
    block = architecture.inspect(model).blocks[0]
    with Guard(model, s, residual=True):
        # Registered before the guard's own hook would be, this one sees the gradient after it.
        block.module.register_forward_hook(watch, prepend=True)
        model(**batch()).loss.backward()
    assert (grads[0] @ s[0]).norm() <= 1e-6 * grads[0].norm()


def test_warns_by_name_of_ways_round():
    model = with_lora(build(), ["o_proj", "v_proj"], modules_to_save=["embed_tokens"])
    with pytest.warns(UserWarning, match=r"v_proj.*embed_tokens"):
        with Guard(model, subspaces(), indirect=False):
            pass


def test_refuses_what_it_can_not_guarantee():
    model = with_lora(build())
    with pytest.raises(ValueError, match="give subspaces"):
        Guard(model)
    with pytest.raises(ValueError, match="nothing is blocked"):
        Guard(model, reference=PROMPTS, rank=0, read=0)
    with pytest.raises(ValueError, match="rank is -1"):
        Guard(model, reference=PROMPTS, rank=-1)
    with pytest.raises(ValueError, match=r"read is 1\.5"):
        Guard(model, reference=PROMPTS, read=1.5)
    with pytest.raises(ValueError, match="give what grasp.draw returns"):
        Guard(model, reference=PROMPTS, drifted=["bad text"])
    with pytest.raises(ValueError, match="read_rank is 0"):
        Guard(model, reference=PROMPTS, read_rank=0)
    with pytest.raises(ValueError, match="rank says how a reference is used"):
        Guard(model, subspaces(), rank=3)
    with pytest.raises(ValueError, match="choose among drift, random"):
        Guard(model, reference=PROMPTS, directions="up")
    with pytest.raises(ValueError, match="reference is empty"):
        Guard(model, reference=[]).attach()
    with pytest.raises(ValueError, match="give tokenizer too"):
        Guard(model, reference=["hello"]).attach()
    with pytest.raises(ValueError, match="matches nothing that is trained"):
        Guard(with_lora(build(), ["q_proj"]), subspaces()).attach()
    with pytest.raises(ValueError, match="no parameter requires grad"):
        Guard(build().requires_grad_(False), subspaces()).attach()
    with pytest.raises(ValueError, match="DoRA"):
        Guard(with_lora(build(), use_dora=True), subspaces()).attach()
    guard = Guard(model, subspaces()).attach()
    with pytest.raises(RuntimeError, match="attached already"):
        guard.attach()
    guard.detach()
