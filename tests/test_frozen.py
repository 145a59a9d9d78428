"""A put off inputs and frozen: exact whatever trains B, computed apart from the guard."""

import copy
import json

import pytest
import torch

import grasp
from grasp import Guard
from grasp.bases.spectrum import complement
from grasp.guard import frozen
from tests.models import FAMILIES, PROMPTS, batch, build, subspaces, train, trainable, with_lora

OPTIONS = {"reference": PROMPTS, "tokens": 3, "rank": 2, "refresh": 2, "read": 0.9}


def lora(family="llama", **options):
    return with_lora(build(family), **options)


def factors(model) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    named = model.named_parameters()
    state = {n.removesuffix(".weight"): p.detach().double().clone() for n, p in named}
    return {n: (state[n.replace("lora_A", "lora_B")], A) for n, A in state.items() if "lora_A" in n}


def tracked_bases(family="llama", **options) -> dict[str, torch.Tensor]:
    """V of the same model and prompts, in fp64: what frozen inputs must be off."""
    model = lora(family, **options)
    with Guard(model, freeze_inputs=False, **OPTIONS) as guard:
        found = {g.name: (g.basis.double(), g.inside) for g in guard.guarded if "lora_A" in g.name}
    return {name: complement(D) if inside else D for name, (D, inside) in found.items()}


def through(model, V) -> float:
    return max(
        float((B @ A @ V[n]).norm() / (B @ A).norm()) for n, (B, A) in factors(model).items()
    )


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_no_update_acts_on_the_inputs(family):
    conv = {"fan_in_fan_out": True} if family == "gpt2" else {}
    model, V = lora(family, **conv), tracked_bases(family, **conv)
    started = factors(model)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.1)
    plain = model(**batch()).logits
    with Guard(model, optimizer=optimizer, freeze_inputs=True, **OPTIONS) as guard:
        assert torch.equal(model(**batch()).logits, plain)
        put = factors(model)
        train(model, optimizer, 6)
        found = guard.certificate()
    assert not any("lora_A" in name for name in guard.bases)  # nothing is kept of that side
    assert set(V) == {f.name for f in guard.frozen}
    for name, (B, A) in factors(model).items():
        assert torch.equal(A, put[name][1]) and bool(B.any())
        exact = started[name][1] - started[name][1] @ V[name] @ V[name].mT
        exact *= started[name][1].norm() / exact.norm()
        torch.testing.assert_close(put[name][1], exact, atol=1e-6 * float(exact.norm()), rtol=0)
        said = found["modules"][name]
        assert said["frozen"] and said["holds"] and said["rank"] == V[name].shape[1]
        inside = started[name][1] @ V[name]
        assert said["before"] == pytest.approx(float(inside.norm() / started[name][1].norm()))
        share = float((B @ A @ V[name]).norm() / (B @ A).norm())
        assert said["through"] == pytest.approx(share, rel=0.05, abs=1e-9)
    assert through(model, V) <= 1e-6 and found["holds"] and 0.85 < found["share"] < 1
    for state in optimizer.state_dict()["state"].values():
        assert all(T.shape[0] != 4 for T in state.values() if T.ndim == 2)  # none of A's


def test_what_is_left_of_an_a_inside_the_basis_is_rounding_and_stays_so():
    """Brought to the size that A had, it would be another A, and none that PEFT drew."""
    model, V = lora("llama"), tracked_bases("llama")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_A" in name:
                Q = V[name.removesuffix(".weight")]
                p.copy_(p.double() @ Q @ Q.mT)
    started = factors(model)
    with Guard(model, freeze_inputs=True, **OPTIONS):
        for name, (_, A) in factors(model).items():
            assert A.norm() < 1e-5 * started[name][1].norm()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=1e-2, foreach=True),
        lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2),
    ],
)
def test_without_any_hook_it_holds(make):
    model, V = lora(), tracked_bases()
    facts = grasp.init_lora_null(model, PROMPTS, tokens=3, read=0.9)
    assert set(facts) == set(V)
    for name, said in facts.items():
        assert said["rank"] == V[name].shape[1] and 0 < said["before"] <= 1 and said["share"] > 0.85
    optimizer = make(trainable(model))

    def loss():
        optimizer.zero_grad()
        value = model(**batch()).loss
        value.backward()
        return value

    for _ in range(3):
        optimizer.step(loss)
    assert all(bool(B.any()) for B, _ in factors(model).values())
    assert through(model, V) <= 1e-6


def test_an_a_that_moves_voids_the_certificate():
    model = lora()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    with Guard(model, optimizer=optimizer, freeze_inputs=True, **OPTIONS) as guard:
        train(model, optimizer, 2)
        assert guard.certificate()["holds"]
        name = guard.frozen[3].name
        with torch.no_grad():
            model.get_parameter(f"{name}.weight")[0, 0].add_(1e-7)
        found = guard.certificate()
    assert not found["holds"] and not found["modules"][name]["frozen"]
    assert [n for n, m in found["modules"].items() if not m["holds"]] == [name]


def test_what_is_let_go_trains_again():
    model = lora()
    with Guard(model, freeze_inputs=True, **OPTIONS):
        assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_A" in n)
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path):
    def start():
        model = lora()
        return model, torch.optim.AdamW(trainable(model), lr=1e-2)

    options = OPTIONS | {"freeze_inputs": True}
    model, optimizer = start()
    with Guard(model, optimizer=optimizer, **options) as guard:
        train(model, optimizer, 3)
        guard.save(tmp_path / "guard.safetensors")
        kept = {n: p.detach().clone() for n, p in model.state_dict().items()}
        moments = copy.deepcopy(optimizer.state_dict())
        train(model, optimizer, 3)
    again, resumed = start()
    again.load_state_dict(kept)
    resumed.load_state_dict(moments)
    # What the saved run did decides where nobody says.
    second = Guard(again, optimizer=resumed, **OPTIONS).attach(tmp_path / "guard.safetensors")
    train(again, resumed, 3)
    for name, p in model.state_dict().items():
        assert torch.equal(p, again.state_dict()[name]), name
    assert second.certificate() == guard.certificate()
    second.detach()
    other = lora()
    with pytest.raises(ValueError, match="is not what it was in the run.*load the adapter"):
        Guard(other, **OPTIONS).attach(tmp_path / "guard.safetensors")


def test_before_a_trainer_splits_weights_where_that_is_asked_for():
    for freeze in (None, False, True):
        model = lora()
        frozen.freeze_early(model, freeze)
        asked = [p.requires_grad for n, p in model.named_parameters() if "lora_A" in n]
        assert asked and not any(asked) if freeze else all(asked)


def test_the_size_of_bases_is_foreseen():
    model = lora()
    with Guard(model, freeze_inputs=False, **OPTIONS | {"read": 0.8}) as guard:
        reading = [
            (g.trained.matrix.takes_in, g.trained.size, 1)
            for g in guard.guarded
            if g.trained.holds == "inputs"
        ]
        own = {g.basis.data_ptr(): g.basis.nbytes for g in guard.guarded if "lora_A" in g.name}
    assert len(set(reading)) == len(own)
    assert 0.5 < frozen.bytes_of(reading) / sum(own.values()) < 2


def test_outputs_given_are_blocked_as_well():
    model, V = lora(), tracked_bases()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    options = OPTIONS | {"rank": 0}
    with Guard(model, subspaces(), optimizer=optimizer, freeze_inputs=True, **options) as guard:
        train(model, optimizer, 4)
    assert through(model, V) <= 1e-6
    assert guard.bases and guard.certificate()["holds"]


def test_inputs_alone_leave_nothing_to_hook():
    model, V = lora(), tracked_bases()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    with Guard(model, optimizer=optimizer, freeze_inputs=True, **OPTIONS | {"rank": 0}) as guard:
        assert not guard.guarded
        train(model, optimizer, 4)
        assert guard.certificate()["holds"]
    assert through(model, V) <= 1e-6


def test_what_cannot_be_frozen_is_refused():
    with pytest.raises(ValueError, match="freeze_inputs=True puts A off inputs, but none are"):
        Guard(lora(), subspaces(), freeze_inputs=True)
    with pytest.raises(ValueError, match="freeze_inputs=True puts A off inputs, but none are"):
        Guard(lora(), freeze_inputs=True, **OPTIONS | {"read": 0})
    whole = build()
    whole.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    whole.lm_head.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"proj.weight .*is no LoRA's A; train a fresh LoRA"):
        Guard(whole, freeze_inputs=True, **OPTIONS).attach()
    learned = lora()
    train(learned, torch.optim.AdamW(trainable(learned), lr=1e-2), 1)
    with pytest.raises(ValueError, match=r"lora_A.default goes on from an adapter that learned"):
        Guard(learned, freeze_inputs=True, **OPTIONS).attach()
    with pytest.raises(ValueError, match="no LoRA that trains; add one first"):
        grasp.init_lora_null(build().requires_grad_(False), PROMPTS)
    with pytest.raises(ValueError, match="read is 1.0; give a share above 0 and below 1"):
        grasp.init_lora_null(lora(), PROMPTS, read=1.0)


def test_in_the_trainer(tmp_path):
    from tests.test_trainer import PROMPTS as prompts
    from tests.test_trainer import trainer

    options = {"reference": prompts, "tokens": 2, "every": 1, "refresh": 1}
    callback = grasp.GraspCallback(freeze_inputs=True, **options)
    t = trainer(tmp_path, callback)
    A = [p for n, p in t.model.named_parameters() if "lora_A" in n]
    assert not any(p.requires_grad for p in A)  # before an optimizer or a wrapper sees it
    t.train()
    certificate = json.loads((tmp_path / "grasp.json").read_text())
    assert certificate["holds"] and certificate["through"] <= 1e-6
    held = {id(p) for group in t.optimizer.param_groups for p in group["params"]}
    assert not held & {id(p) for p in A}
    V = {f.name for f in callback.guard.frozen}
    assert len(V) == len(A) and all(certificate["modules"][n]["frozen"] for n in V)
