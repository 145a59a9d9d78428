"""Families of decoders: each is understood, and kept off its bases, whatever its parts are called.

The bases come from the guard; what the adapters do along them is computed here, from what PEFT says
that it adds to each weight, in fp64.
"""

import copy

import pytest
import torch

from grasp import Guard
from grasp.model import inspect
from tests.families import FAMILIES, IMAGES, OF_TEXT, SEEING, Family, seeing
from tests.models import COMMON, PROMPTS, WIDTH, batch, train, trainable, with_lora


def shares(model: torch.nn.Module, bases: dict[str, torch.Tensor]) -> list[float]:
    """‖Uᵀ ΔW‖ / ‖ΔW‖ and ‖ΔW V‖ / ‖ΔW‖ of each LoRA."""
    found = []
    for name, module in model.named_modules():
        if not getattr(module, "lora_B", None):
            continue
        U, V = (bases[f"{name}.lora_{factor}.default"].double() for factor in "BA")
        D = copy.deepcopy(module).double().get_delta_weight("default").detach()
        D = D.mT if module.fan_in_fan_out else D  # GPT-2 stores [in, out]
        found += [float((U.mT @ D).norm() / D.norm()), float((D @ V).norm() / D.norm())]
    return found


def guard(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Guard:
    options = {"tokens": 2, "every": 1, "refresh": 1, "rank": 2}
    return Guard(model, reference=PROMPTS, optimizer=optimizer, **options)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=batch()["input_ids"]).logits


@pytest.mark.filterwarnings("error:the factor can still be written")
@pytest.mark.parametrize("family", FAMILIES)
def test_is_understood_and_kept_off_its_bases(family):
    model = with_lora(FAMILIES[family].build(), FAMILIES[family].targets)
    found = inspect(model)
    assert found.width == WIDTH and len(found.blocks) == 2
    if family in SEEING:
        decoder = {id(m) for m in model.get_decoder().modules()}
        assert all(id(block.module) in decoder for block in found.blocks)
    before = logits(model)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    with guard(model, optimizer) as g:
        assert torch.equal(logits(model), before)
        train(model, optimizer, 3)
        assert g.certificate()["holds"]
    assert all(share <= 1e-6 for share in shares(model, g.bases))
    train(model, optimizer, 1)  # unguarded
    assert max(shares(model, g.bases)) > 1e-3


def test_a_larger_encoder_of_images_is_not_taken_for_the_decoder():
    images = {**IMAGES, "hidden_size": 64, "num_hidden_layers": 3}
    model = Family("Git", {**COMMON, "vision_config": images}).build()
    found = inspect(model)
    assert found.width == WIDTH
    assert [block.module for block in found.blocks] == list(model.git.encoder.layer)


def test_each_of_two_attentions_in_a_block_has_its_writer():
    found = inspect(FAMILIES["longcat_flash"].build().requires_grad_(False))
    for block in found.blocks:
        names = {m.name.removeprefix(block.name + ".") for m in block.of_role("writer")}
        assert {"self_attn.0.o_proj", "self_attn.1.o_proj"} <= names
        assert {"mlps.0.down_proj", "mlps.1.down_proj"} <= names


def test_an_adapted_head_is_guarded_too():
    model = with_lora(FAMILIES["llama"].build(), ["o_proj", "lm_head"])
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    with guard(model, optimizer) as g:
        train(model, optimizer, 3)
    assert "base_model.model.lm_head.lora_B.default" in g.bases
    assert all(share <= 1e-6 for share in shares(model, g.bases))


NEEDS_IMAGES = {
    "idefics": Family("Idefics", {**COMMON, "vision_config": IMAGES}, model="ForVisionText2Text"),
    "blip2": seeing("Blip2", "opt", ffn_dim=48, word_embed_proj_dim=WIDTH),
}


@pytest.mark.parametrize("family", NEEDS_IMAGES)
def test_refuses_what_does_not_run_on_text_alone(family):
    with pytest.raises(ValueError, match=r"on token ids alone \(.*pixel_values.*get_decoder\(\)"):
        inspect(NEEDS_IMAGES[family].build())


def test_the_language_model_inside_is_guarded_instead():
    family = NEEDS_IMAGES["blip2"]
    model = with_lora(family.build(), r".*language_model.*\.(q_proj|v_proj|fc1|fc2)").get_decoder()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    with guard(model, optimizer) as g:
        train(model, optimizer, 3)
        assert g.certificate()["holds"]
    assert all(share <= 1e-6 for share in shares(model, g.bases))


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("mllama", OF_TEXT),  # attention to images
        ("jamba", ["dt_proj"]),  # its weight is used, and it never called
    ],
)
def test_refuses_what_does_not_run_for_every_token(family, targets):
    model = with_lora(FAMILIES[family].build(), targets)
    with pytest.raises(ValueError, match="did not run for a token.*leave it out of target_modules"):
        inspect(model)
