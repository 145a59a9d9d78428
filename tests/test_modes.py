"""What stands on a module in its own place steps aside while the model is looked at."""

import pytest
import torch

import grasp
from grasp.bases.inputs import input_bases
from grasp.model import inspect, resting, unfused
from tests.models import PROMPTS, batch, build, with_lora


def test_maps_that_an_attention_is_given_are_its_own_while_it_is_looked_at():
    attention = build().model.layers[0].self_attn
    attention.apply_qkv, attention.apply_o = lambda *args: None, lambda *args: None
    bound = attention.apply_qkv
    x = torch.randn(1, 3, 32)
    with unfused(attention):
        q, k, v = attention.apply_qkv(attention, x)
        assert torch.equal(q, attention.q_proj(x)) and torch.equal(v, attention.v_proj(x))
        assert torch.equal(attention.apply_o(q), attention.o_proj(q))
    assert attention.apply_qkv is bound


def test_where_the_keys_are_the_values_they_stand_for_both():
    attention = build().model.layers[0].self_attn
    attention.v_proj, attention.apply_qkv = None, lambda *args: None
    with unfused(attention):
        q, k, v = attention.apply_qkv(torch.randn(1, 3, 32))
    assert v is k and q is not k


@pytest.mark.parametrize("name", ["forward", "apply_in_proj_fused", "apply_out_proj"])
def test_what_is_bound_in_a_classs_place_steps_aside_and_comes_back(name):
    """Axolotl's linear attentions look for the last two, and without them call their own maps."""
    module = torch.nn.Linear(2, 2)
    setattr(module, name, bound := lambda x: x)
    with unfused(module):
        assert name not in vars(module)
    assert vars(module)[name] is bound


def test_a_lora_that_adds_nothing_does_not_run():
    """One whose B is not 0 does, and outputs are bit for bit the same."""
    model = with_lora(build())
    attention = model.get_base_model().model.layers[0].self_attn
    with torch.no_grad():
        attention.q_proj.lora_B["default"].weight.normal_()
    attention.k_proj.lora_A["default"].weight.requires_grad_(False)
    ran = []
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_hook(lambda m, args, out, name=name: ran.append(name))
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    with torch.no_grad():
        expected = model(**batch()).logits
        every = ran.copy()
        ran.clear()
        with resting(model):
            assert torch.equal(model(**batch()).logits, expected)
        assert len(ran) == 1 and "layers.0.self_attn.q_proj" in ran[0] and len(every) == 14
        ran.clear()
        model(**batch())
    assert ran == every
    assert {name: p.requires_grad for name, p in model.named_parameters()} == asked


def test_adapters_that_were_switched_off_stay_so():
    model = with_lora(build())
    with model.disable_adapter():
        with resting(model):
            pass
        assert all(m.disable_adapters for m in model.modules() if hasattr(m, "disable_adapters"))


def test_a_start_runs_no_lora_that_adds_nothing():
    model = with_lora(build())
    found = inspect(model)  # which looks at gradients of what trains
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_pre_hook(lambda *args: pytest.fail("a LoRA ran"))
    reference = grasp.Reference(model, PROMPTS, tokens=3)
    matrices = [m for block in found.blocks for m in block.matrices]
    assert list(input_bases(found, matrices, list(reference.rows()), 0.9, quick=True))


def test_the_head_is_given_what_it_need_not_copy():
    """A slice of hidden states would have torch copy the head for each row on a CPU."""
    model, seen = build(), []
    model.lm_head.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    grasp.draw(model, PROMPTS, tokens=3)
    assert seen and all(x.shape[1] == 1 and x.is_contiguous() for x in seen)
