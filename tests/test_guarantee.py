"""What a certificate says is so of the weights that are kept, computed apart from the guard."""

import types
import warnings

import pytest
import torch
from peft import LoraConfig

import grasp
from grasp import Guard
from tests.models import PROMPTS, batch, build, subspaces, train, trainable, with_lora

FORMS = {
    "outputs found": {"read": 0.0, "rank": 3},
    "inputs": {"read": 0.5, "rank": 0},
    "both": {"read": 0.5, "rank": 3},
    "given": {},
}


def guarded(model, optimizer, form: str = "both") -> Guard:
    if form == "given":
        return Guard(model, subspaces(), optimizer=optimizer)
    options = {"tokens": 2, "every": 1, "refresh": 2, "grow": 2, **FORMS[form]}
    return Guard(model, reference=PROMPTS, optimizer=optimizer, **options)


def deltas(model) -> dict[str, torch.Tensor]:
    """What each LoRA adds, from its factors, by the name of its module and adapter."""
    found = {}
    for name, module in model.named_modules():
        for adapter in getattr(module, "lora_A", {}):
            B, A = (f[adapter].weight.detach().double() for f in (module.lora_B, module.lora_A))
            found[f"{name}|{adapter}"] = module.scaling[adapter] * B @ A
    return found


def through(guard: Guard, before: dict, after: dict) -> float:
    """The largest share of a change that lies in a basis."""
    worst, seen = 0.0, 0
    for name, basis in guard.bases.items():
        module, adapter = name.replace(".lora_B.", "|").replace(".lora_A.", "|").rsplit("|", 1)
        D = after[f"{module}|{adapter}"] - before[f"{module}|{adapter}"]
        U = basis.double()
        inside = U.mT @ D if ".lora_B." in name else D @ U
        worst, seen = max(worst, float(inside.norm() / D.norm())), seen + 1
    assert seen
    return worst


def trained_before(**options):
    model = with_lora(build(), **options)
    if not options:
        train(model, torch.optim.AdamW(trainable(model), lr=3e-2), 6)
    return model


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("start", [{}, {"init_lora_weights": "pissa"}])
def test_an_adapter_that_goes_on_is_held_from_where_it_began(form, start):
    """ΔW is the change from the start, whatever the adapter did before: Uᵀ(BA − B₀A₀) = 0."""
    model = trained_before(**start)
    before = deltas(model)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.1)
    with guarded(model, optimizer, form) as guard:
        plain = model(**batch()).logits
        train(model, optimizer, 12)
    after = deltas(model)
    found = guard.certificate()
    assert through(guard, before, after) == pytest.approx(found["through"], rel=1e-3)
    assert found["holds"] and max(m["bound"] for m in found["modules"].values()) < 1e-5
    assert float((model(**batch()).logits - plain).detach().abs().max()) > 1e-3  # it did learn


def test_without_the_other_factors_pin_an_adapter_that_goes_on_leaks(monkeypatch):
    from grasp.guard.guarded import Guarded

    both = Guarded.pins
    monkeypatch.setattr(Guarded, "pins", lambda self: both(self)[:1])
    model = trained_before()
    before = deltas(model)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    with guarded(model, optimizer, "given") as guard:
        train(model, optimizer, 12)
    assert through(guard, before, deltas(model)) > 1e-3
    assert not guard.certificate()["holds"]


def test_a_frozen_adapter_below_is_part_of_the_base():
    model = trained_before()
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model.add_adapter("new", config)
    model.base_model.set_adapter(["default", "new"])
    for name, p in model.named_parameters():
        p.requires_grad_(".new." in name)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    with guarded(model, optimizer) as guard:
        assert abs(guard.growth.reference.measure(model)) < 1e-5  # nothing has moved
        before = deltas(model)
        train(model, optimizer, 6)
        assert through(guard, before, deltas(model)) <= 1e-6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rate", [1e-2, 1e-3, 1e-5])
def test_a_weight_trained_itself_is_judged_by_its_change(form, rate):
    model = build()
    for name, p in model.named_parameters():
        p.requires_grad_("_proj" in name)
    before = {n: p.detach().double() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(trainable(model), lr=rate)
    with guarded(model, optimizer, form) as guard:
        train(model, optimizer, 12)
    found = guard.certificate()
    for name, basis in guard.bases.items():
        W = model.get_parameter(name.removesuffix(" (inputs)")).detach().double()
        D, U = W - before[name.removesuffix(" (inputs)")], basis.double()
        real = float((D @ U if "(inputs)" in name else U.mT @ D).norm() / D.norm())
        said = found["modules"][name]
        assert real == pytest.approx(said["through"], rel=1e-6)
        assert said["holds"] and said["through"] <= said["bound"]
        assert float((D @ U if "(inputs)" in name else U.mT @ D).norm()) < 3e-7 * (W - D).norm()
        assert said["moved"] == pytest.approx(float(D.norm() / (W - D).norm()), rel=1e-6)
    assert found["holds"]


def test_weights_trained_themselves_in_16_bits_are_refused():
    model = build().bfloat16()
    with pytest.raises(ValueError, match="bfloat16.*load the model in float32.*or train a LoRA"):
        Guard(model, reference=PROMPTS, tokens=2).attach()


def test_an_adapter_in_16_bits_says_its_floor():
    model = with_lora(build())
    for p in trainable(model):
        p.data = p.data.bfloat16()
    optimizer = torch.optim.SGD(trainable(model), lr=0.5)
    with guarded(model, optimizer, "given") as guard:
        train(model, optimizer, 6)
    found = guard.certificate()
    assert found["holds"] and 1e-6 < found["through"]
    assert all(m["bound"] == 2**-8 for m in found["modules"].values())


def test_what_begins_to_train_later_is_told_and_not_certified():
    model = with_lora(build())
    late = model.get_parameter("base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight")
    optimizer = torch.optim.AdamW([*trainable(model), late], lr=1e-2)
    with guarded(model, optimizer) as guard:
        train(model, optimizer, 2)
        assert guard.certificate()["holds"]
        late.requires_grad_(True)
        with pytest.warns(UserWarning, match="q_proj.base_layer.weight began to train after"):
            train(model, optimizer, 1)
    found = guard.certificate()
    assert not found["holds"] and "q_proj" in found["uncovered"][0]


def test_inputs_alone_leave_no_way_open():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with guarded(with_lora(build()), None, "inputs"):
            pass


def fused_mlp(self, x):
    """Reads the factors of its parts, and calls none of them."""

    def mapped(part, x):
        W, A, B = part.base_layer.weight, part.lora_A.default.weight, part.lora_B.default.weight
        return x @ W.mT + part.scaling["default"] * (x @ A.mT) @ B.mT

    return mapped(self.down_proj, self.act_fn(mapped(self.gate_proj, x)) * mapped(self.up_proj, x))


def test_forwards_that_are_fused_and_bound_to_modules():
    model = with_lora(build())
    for layer in model.base_model.model.model.layers:
        layer.mlp.forward = types.MethodType(fused_mlp, layer.mlp)
    plain = model(**batch()).logits
    before = deltas(model)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    with guarded(model, optimizer) as guard:
        assert torch.equal(model(**batch()).logits, plain)
        assert all("forward" in vars(x.mlp) for x in model.base_model.model.model.layers)
        train(model, optimizer, 6)
        assert sum("mlp" in name and "lora_A" in name for name in guard.bases) == 6
    assert through(guard, before, deltas(model)) <= 1e-6
    same = with_lora(build())
    with guarded(same, torch.optim.AdamW(trainable(same))) as other:
        for name, basis in other.bases.items():
            torch.testing.assert_close(guard.bases[name], basis)


def test_a_parameter_has_one_guard():
    model = with_lora(build())
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    first = guarded(model, optimizer, "given").attach()
    second = guarded(model, optimizer).attach()
    assert all(len(p._post_accumulate_grad_hooks) == 1 for p in trainable(model))
    first.detach()
    assert all(len(p._post_accumulate_grad_hooks) == 1 for p in trainable(model))
    second.detach()


def test_the_global_generator_is_never_drawn_from():
    wide = build()
    model = with_lora(wide)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    state = torch.get_rng_state()
    with guarded(model, optimizer) as guard:
        train(model, optimizer, 4)
        guard.certificate()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_large_gradients_leading_directions_are_torchs():
    from grasp.bases.growth import _range

    torch.manual_seed(0)
    D = torch.randn(300, 6) * torch.tensor([9.0, 7, 5, 1, 0.1, 0.01]) @ torch.randn(6, 400)
    U, S = _range(D + 1e-3 * torch.randn(300, 400), 7)
    exact = torch.linalg.svd(D, full_matrices=False)
    torch.testing.assert_close(S[:3], exact.S[:3], rtol=1e-3, atol=0)
    assert float((exact.U[:, :3].mT @ U[:, :3]).norm() ** 2) == pytest.approx(3, abs=1e-3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["double", "autocast around all", "autocast around backward"])
def test_in_other_precisions(form, kind):
    model = with_lora(build().double() if kind == "double" else build())
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    before = deltas(model)

    def autocast(where: str):
        return torch.autocast("cpu", torch.bfloat16, enabled=kind == f"autocast around {where}")

    with autocast("all"):
        with guarded(model, optimizer, form) as guard:
            for i in range(6):
                with autocast("backward"):
                    model(**batch(seed=i)).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        assert guard.certificate()["holds"] and min(m["rank"] for m in guard.leak().values())
    assert through(guard, before, deltas(model)) <= (1e-7 if kind == "double" else 1e-6)


def test_bases_of_inputs_are_shared_by_checkpoints_and_found_anew_where_they_are_lost(tmp_path):
    model = with_lora(build())
    optimizer = torch.optim.AdamW(trainable(model), lr=3e-2)
    guard = guarded(model, optimizer).attach()
    train(model, optimizer, 4)
    one, two = (tmp_path / n / "guard.safetensors" for n in ("a", "b"))
    guard.save(one)
    guard.save(two)
    guard.detach()
    beside = [p.with_name("guard_inputs.safetensors") for p in (one, two)]
    assert beside[0].samefile(beside[1])
    beside[1].unlink()
    for state in (one, two):
        again = guarded(model, optimizer).attach(state)
        for name, basis in guard.bases.items():
            torch.testing.assert_close(again.bases[name], basis, atol=1e-5, rtol=0)
        again.detach()
    other = with_lora(build(seed=1))
    with pytest.raises(ValueError, match="is missing or of another run"):
        guarded(other, torch.optim.SGD(trainable(other))).attach(two)


def test_an_adapter_that_is_added_later_is_told():
    model = with_lora(build())
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    with guarded(model, optimizer) as guard:
        train(model, optimizer, 2)
        known = {id(p) for p in model.parameters()}
        config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
        model.add_adapter("later", config)
        model.base_model.set_adapter(["default", "later"])
        optimizer.add_param_group({"params": [p for p in trainable(model) if id(p) not in known]})
        with pytest.warns(UserWarning, match="later.*began to train after"):
            train(model, optimizer, 1)
    assert not guard.certificate()["holds"]


def test_weights_put_in_anothers_place_are_not_certified():
    model = with_lora(build())
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    with guarded(model, optimizer) as guard:
        train(model, optimizer, 3)
    assert guard.certificate()["holds"]
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    found = guard.certificate()
    assert not found["holds"] and len(found["uncovered"]) == 28


def test_one_weight_in_two_places_is_refused():
    model = build()
    for name, p in model.named_parameters():
        p.requires_grad_("_proj" in name)
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    with pytest.raises(ValueError, match="are one weight, .*untie them"):
        Guard(model, reference=PROMPTS, tokens=2).attach()


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ({"train": PROMPTS}, r"dict of train; give one of them, such as reference\['train'\]"),
        ([[3, 64]], "outside the model's 64"),
        ([[3] * 2050], "longer than the model's 2048"),
    ],
)
def test_references_that_do_not_fit_the_model(reference, says):
    with pytest.raises(ValueError, match=says):
        Guard(with_lora(build()), reference=reference, tokens=2).attach()


def test_a_reference_serves_two_guards_alike():
    model = with_lora(build())
    reference = grasp.Reference(model, PROMPTS, tokens=2, batch=3)
    weights = []
    for _ in range(2):
        model = with_lora(build())
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        with Guard(model, reference=reference, every=1, refresh=2, optimizer=optimizer):
            train(model, optimizer, 6)
        weights.append([p.detach().clone() for p in trainable(model)])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_an_adapter_that_is_left_nothing_to_learn_is_told():
    model = trained_before()  # r = 4
    with pytest.warns(UserWarning, match="leaves them nothing to learn; give a smaller rank"):
        with Guard(model, reference=PROMPTS, tokens=2, rank=4):
            pass
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with Guard(model, reference=PROMPTS, tokens=2, rank=3, read=0):
            pass


def test_a_guard_that_is_attached_again_saves_what_it_holds_then(tmp_path):
    model = with_lora(build())
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    guard = guarded(model, optimizer)
    with guard:
        train(model, optimizer, 4)
        guard.save(tmp_path / "one.safetensors")
    model.get_input_embeddings().weight.data.mul_(-2).add_(0.1)  # other inputs than before
    with pytest.warns(UserWarning, match="go on from what they learned"):
        guard.attach()
    assert guard.steps == 0
    train(model, optimizer, 2)
    guard.save(tmp_path / "two.safetensors")
    guard.detach()
    again = guarded(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again.attach(tmp_path / "two.safetensors")
    assert all(torch.equal(again.bases[n], basis) for n, basis in guard.bases.items())
    again.detach()


def test_what_was_never_attached_has_no_certificate():
    guard = Guard(with_lora(build()), subspaces())
    for call in (guard.certificate, guard.pin):
        with pytest.raises(RuntimeError, match="attach first"):
            call()


def test_one_step_with_little_left_to_learn_in():
    """Of A a tenth is left off V, so rounding to what it was is ten times as much of it."""
    model = with_lora(build())
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    options = {"tokens": 4, "read": 0.97, "freeze_inputs": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        guard = Guard(model, reference=PROMPTS[:12], optimizer=optimizer, **options).attach()
    train(model, optimizer, 1)
    guard.detach()
    state = {n.removesuffix(".weight"): p.detach().double() for n, p in model.named_parameters()}
    left = []
    for name, V in guard.bases.items():
        A, B = state[name], state[name.replace("lora_A", "lora_B")]
        left.append(V.shape[1] / V.shape[0])
        assert float((B @ A @ V.double()).norm() / (B @ A).norm()) <= 1e-6, name
    assert max(left) > 0.9
