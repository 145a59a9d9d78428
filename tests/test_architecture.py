"""Each part of a block is told by what it does, so the tests check what it does."""

import pytest
import torch
import transformers as t

from grasp.model import inspect, lora_update
from tests.models import FAMILIES, GROUPED, WIDTH, batch, build, with_lora

PARTS = {  # writers, values, hidden, readers in a block
    "llama": (2, 1, 2, 2),
    "phi3": (2, 1, 1, 0),
    "gpt2": (2, 1, 1, 0),
    "gpt_neox": (2, 1, 1, 0),
}


def final_stream(model, blocks) -> list[torch.Tensor]:
    """The output of every block on a batch."""
    kept = []

    def hook(module, args, output):
        kept.append(output[0] if isinstance(output, tuple) else output)

    handles = [b.module.register_forward_hook(hook) for b in blocks]
    model(input_ids=batch()["input_ids"])
    for h in handles:
        h.remove()
    return kept


@pytest.mark.parametrize("family", FAMILIES)
def test_finds_every_part(family):
    found = inspect(build(family))
    assert found.width == WIDTH and len(found.blocks) == 2
    expected = PARTS.get(family, PARTS["llama"])
    for block in found.blocks:
        roles = ("writer", "value", "hidden", "reader")
        assert tuple(len(block.of_role(r)) for r in roles) == expected
    assert "blocks 0–1 (2), width 32" in found.describe()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_writers_alone_move_the_residual_stream(family):
    """With all writers silenced a block hands its input on; with one, it does not."""
    model = build(family)
    found = inspect(model)
    block = found.blocks[1]

    def silence(module, args, output):
        return torch.zeros_like(output)

    handles = [w.module.register_forward_hook(silence) for w in block.of_role("writer")]
    before, after = final_stream(model, found.blocks)
    assert torch.equal(before, after)
    handles[0].remove()
    before, after = final_stream(model, found.blocks)
    assert not torch.equal(before, after)
    handles[1].remove()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_value_outputs_are_where_select_says(family):
    model = build(family)
    for block in inspect(model).blocks:
        (value,) = block.of_role("value")
        kept = {}
        handles = [
            value.module.register_forward_hook(lambda m, a, o, kept=kept: kept.update(value=o)),
            value.writer.module.register_forward_pre_hook(lambda m, a, k=kept: k.update(x=a[0])),
        ]
        model(input_ids=torch.tensor([[5]]))
        for h in handles:
            h.remove()
        torch.testing.assert_close(kept["x"].reshape(-1), kept["value"].reshape(-1)[value.select])


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "olmo2"])
def test_norm_after_a_writer_is_measured(family):
    model = build(family)
    norms = [m for n, m in model.named_modules() if n.endswith("post_feedforward_layernorm")]
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.5, 1.5)
    for block, norm in zip(inspect(model).blocks, norms, strict=True):
        writer = block.of_role("writer")[1]
        gain = 1 + norm.weight if family.startswith("gemma") else norm.weight
        torch.testing.assert_close(writer.scale, gain.detach(), atol=1e-4, rtol=1e-4)


def test_low_precision_codes_still_name_every_output():
    model = build().bfloat16()
    wide = t.LlamaForCausalLM(t.LlamaConfig(**{**GROUPED, "hidden_size": 640, "head_dim": 160}))
    for m in (model, wide.bfloat16()):
        (value,) = inspect(m).blocks[0].of_role("value")
        assert set(value.select.tolist()) == set(range(value.out_features))


def test_leaves_no_trace():
    model = with_lora(build())
    model.train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    inspect(model)
    assert model.training and all(m.training for m in model.modules())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    now = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert now == hooks


def test_pulls_back_through_a_writer():
    writer = inspect(build()).blocks[0].of_role("writer")[0]
    U = torch.randn(WIDTH, 3)
    torch.testing.assert_close(writer.back(U), writer.base.weight.detach().mT @ U)


def test_the_norm_of_a_quantised_weight_is_estimated_from_what_it_hands_back():
    writer = inspect(build()).blocks[0].of_role("writer")[0]
    exact = float(writer.base.weight.detach().norm())
    assert writer.norm() == pytest.approx(exact, rel=1e-6)
    writer.base.register_buffer("codes", torch.zeros(1, dtype=torch.int8))
    assert writer.norm() != exact and writer.norm() == pytest.approx(exact, rel=0.25)


def test_trained_parameters_of_lora_and_full():
    model = with_lora(build())
    trained = inspect(model).trained()
    assert len(trained) == 14 and all(t.side == "left" and t.partner is not None for t in trained)
    assert inspect(model).untracked() == []
    full = inspect(build("gpt2"))
    sides = {t.name.rsplit(".", 1)[-1]: t.side for t in full.trained()}
    assert sides == {"weight": "right", "bias": "right"}  # GPT-2 stores [in, out]
    assert any("wte" in name for name in full.untracked())


def test_update_is_what_peft_adds():
    model = with_lora(build(), use_rslora=True)
    writer = inspect(model).blocks[0].of_role("writer")[0]
    with torch.no_grad():
        writer.module.lora_B["default"].weight.normal_()
    B, A = lora_update(writer)
    torch.testing.assert_close(B @ A, writer.module.get_delta_weight("default").detach())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: torch.nn.Linear(2, 2), "without a config"),
        (
            lambda: t.T5ForConditionalGeneration(
                t.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
            ),
            "encoder-decoder",
        ),
        (
            lambda: t.MixtralForCausalLM(t.MixtralConfig(**GROUPED, num_local_experts=2)),
            "mixture of experts",
        ),
    ],
)
def test_refuses_what_it_does_not_understand(model, message):
    with pytest.raises(ValueError, match=message):
        inspect(model())


def test_refuses_dora():
    model = with_lora(build(), use_dora=True)
    with pytest.raises(ValueError, match="use_dora=False"):
        inspect(model).trained()
