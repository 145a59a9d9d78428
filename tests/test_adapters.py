"""What PEFT can do to a LoRA: kept off its bases, or refused by a name that its user knows."""

import copy
import warnings

import peft
import pytest
import torch

from grasp import Guard
from tests.models import PROMPTS, batch, build, train, trainable, with_lora
from tests.test_guarantee import FORMS, deltas, guarded, through, trained_before

SOME = ["q_proj", "o_proj", "up_proj", "down_proj"]


def half_frozen(model, factor: str):
    for name, p in model.named_parameters():
        if f"lora_{factor}" in name and "layers.0" in name:
            p.requires_grad_(False)
    return model


def mica():
    torch.manual_seed(0)
    return with_lora(build(), init_lora_weights="mica", r=8)


KINDS = {
    "B is frozen in a block": lambda: half_frozen(trained_before(), "B"),
    "A is frozen in a block": lambda: half_frozen(trained_before(), "A"),
    "A of a fresh one is frozen": lambda: half_frozen(with_lora(build()), "A"),
    "MiCA": mica,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_factor_alone_is_trained(kind, form):
    """Uᵀ(BA − B₀A₀) = 0 and (BA − B₀A₀)V = 0, where one factor can't give way."""
    if kind == "MiCA" and not hasattr(peft.tuners.lora.variants, "MiCALinearVariant"):
        pytest.skip("this PEFT has no MiCA")
    model = KINDS[kind]()
    before, frozen = deltas(model), copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        guard = guarded(model, optimizer, form).attach()
    train(model, optimizer, 8)
    found = guard.certificate()
    guard.detach()
    after = deltas(model)
    judged = {n.replace(".lora_B.", "|").replace(".lora_A.", "|") for n in guard.bases}
    if form != "given":
        assert judged == set(before)
    # What did not move beyond rounding has no share; the others' are computed apart.
    moved = {n: b for n, b in guard.bases.items() if n not in found["unmoved"]}
    assert moved and found["holds"]
    for name, basis in moved.items():
        key = name.replace(".lora_B.", "|").replace(".lora_A.", "|")
        D, U = after[key] - before[key], basis.double()
        share = float((U.mT @ D if ".lora_B." in name else D @ U).norm() / D.norm())
        said = found["modules"][name]
        assert share == pytest.approx(said["through"], rel=1e-3) and share <= said["bound"] < 1e-4
    if "fresh" not in kind:  # of which A is put off its basis
        for name, p in model.named_parameters():
            if not p.requires_grad:
                assert torch.equal(p, frozen[name]), name


@pytest.mark.parametrize("initial", ["orthogonal", "pissa", "olora"])
def test_what_is_left_nothing_to_learn_did_not_move(initial):
    """B₀A₀ = 0 with neither of them 0: rounding goes by the factors, not by what they make."""
    model = with_lora(build(), init_lora_weights=initial)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with guarded(model, optimizer) as guard:
            train(model, optimizer, 6)
    found = guard.certificate()
    assert found["holds"] and found["through"] < 1e-4
    if initial == "orthogonal":
        assert len(found["unmoved"]) == 28


def variant(name: str, options: dict):
    config = getattr(peft.tuners.lora.config, name, None) if name else None
    if name and config is None:
        pytest.skip(f"this PEFT has no {name}")
    return {
        key: config(**value) if isinstance(value, dict) else value for key, value in options.items()
    }


BLOCKS = {"target_modules_bd_a": SOME[1::2], "target_modules_bd_b": SOME[::2], "nblocks": 2}
REFUSED = {
    "DoRA": ("", {"use_dora": True}),
    "a bias beside": ("", {"lora_bias": True}),
    "BdLora": ("BdLoraConfig", {"use_bdlora": BLOCKS}),
    "Kasa": ("KasaConfig", {"kasa_config": {}}),
    "Monteclora": ("MontecloraConfig", {"monteclora_config": {}}),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_updates_that_are_no_product_are_refused_by_name(kind):
    model = with_lora(build(), SOME, **variant(*REFUSED[kind]))
    with pytest.raises(ValueError, match=f"o_proj is trained with {kind}.*train with LoRA"):
        Guard(model, reference=PROMPTS, tokens=2).attach()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("VeloraConfig", {"velora_config": {}}),
        ("", {"alora_invocation_tokens": batch()["input_ids"][0, :1].tolist()}),
    ],
)
def test_updates_that_are_a_product_after_all(name, options):
    model = with_lora(build(), **variant(name, options))
    before = deltas(model)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    with guarded(model, optimizer) as guard:
        train(model, optimizer, 4)
    assert through(guard, before, deltas(model)) <= 1e-6 and guard.certificate()["holds"]
