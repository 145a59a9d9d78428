"""What stands on a module in its own place steps aside while the model is looked at."""

import pytest
import torch

from grasp.model import unfused
from tests.models import build


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
