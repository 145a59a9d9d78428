"""A planted direction is found, from weights and from activations, and bad input is refused."""

import pytest
import torch

import grasp
from grasp import model as architecture
from tests.models import WIDTH, build, with_lora


def planted(direction: torch.Tensor, seed: int = 0, noise: float = 0.1):
    """A LoRA whose writers' updates are mostly `direction aᵀ`."""
    model = with_lora(build())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in architecture.inspect(model).blocks:
            for m in block.matrices:
                B = m.module.lora_B["default"].weight
                B.copy_(noise * torch.randn(B.shape, generator=generator) / B.shape[0] ** 0.5)
                if m.role == "writer":
                    B[:, 0] += direction
    return model


@pytest.fixture
def direction():
    return torch.nn.functional.normalize(torch.randn(WIDTH), dim=0)


@pytest.mark.parametrize("per_block", [False, True])
def test_finds_a_planted_direction(direction, per_block):
    s = grasp.discover(planted(direction), 1, per_block=per_block)
    assert s.layers == [0, 1]
    for layer in s.layers:
        assert abs(float(direction @ s[layer])) > 0.97
    assert torch.equal(s[0], s[1]) != per_block


def test_several_seeds_and_automatic_rank(direction):
    s = grasp.discover([planted(direction, 1), planted(direction, 2)])
    assert 1 <= s.rank <= 16
    assert float((direction @ s[0]).norm()) > 0.99
    assert s.source["adapters"] == 2


def test_rotation_of_the_factors_does_not_matter(direction):
    model = planted(direction)
    before = grasp.discover(model, 2)
    Q = torch.linalg.qr(torch.randn(4, 4)).Q
    with torch.no_grad():
        for t in architecture.inspect(model).trained():
            t.parameter.copy_(t.parameter @ Q)
            t.partner.copy_(Q.mT @ t.partner)
    after = grasp.discover(model, 2)
    assert before.overlap(after)[0] == pytest.approx(1, abs=1e-4)


def test_norm_after_the_writer_is_taken_into_account(direction):
    model = build("olmo2")
    gain = torch.linspace(0.2, 2, WIDTH)
    for name, module in model.named_modules():
        if "post_" in name and name.endswith("layernorm"):
            module.weight.data.copy_(gain)
    model = with_lora(model)
    for t in architecture.inspect(model).trained():
        if t.matrix.role == "writer":
            t.parameter.data[:, 0] = direction
    expected = torch.nn.functional.normalize(gain * direction, dim=0)
    assert abs(float(expected @ grasp.discover(model, 1)[0])) > 0.99


def test_from_activations(direction):
    model = planted(3 * direction)
    prompts = torch.randint(3, 64, (6, 8)).tolist()
    s = grasp.discover(model, 2, method="activations", prompts=prompts, per_block=True)
    assert float((direction @ s[0]).norm()) > 0.9
    random = s.random_like(0)
    assert float((direction @ random[0]).norm()) < 0.7


def test_from_a_folder(direction, tmp_path):
    base = build()
    base.save_pretrained(tmp_path / "base")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(64)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0"))
    ).save_pretrained(tmp_path / "base")
    model = planted(direction)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    s = grasp.discover(tmp_path / "adapter", 1)
    assert abs(float(direction @ s[0])) > 0.97
    assert s.base_model == str(tmp_path / "base")


def test_refuses_bad_input(direction, tmp_path):
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        grasp.discover(tmp_path)
    with pytest.raises(ValueError, match="all zero"):
        grasp.discover(with_lora(build()), 1)
    with pytest.raises(ValueError, match="rank 40 is larger than the model's width 32"):
        grasp.discover(planted(direction), 40)
    with pytest.raises(ValueError, match="no residual writer has a LoRA"):
        grasp.discover(with_lora(build(), ["q_proj"]))
    with pytest.raises(ValueError, match="empty"):
        grasp.discover([])
    with pytest.raises(ValueError, match="needs prompts"):
        grasp.discover(planted(direction), 1, method="activations")
    model = planted(direction)
    writer = architecture.inspect(model).blocks[1].of_role("writer")[0]
    writer.module.lora_B["default"].weight.data[3, 1] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        grasp.discover(model, 1)
