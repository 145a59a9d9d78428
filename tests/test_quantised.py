"""Maps that are no `nn.Linear`: each library's own where it is installed, and a stand-in for all.

A quantised map may hold buffers alone, ask for a dtype that none of them has, and in evaluation run
without autograd, or pack its weights for good so that no gradient passes from then on.
"""

import json

import pytest
import torch
import transformers as t
from safetensors.torch import save_file
from torch import nn

import grasp
from grasp import Guard
from grasp.guard.trainer import CERTIFICATE
from grasp.model import evaluating, inspect, load_adapter
from grasp_kernels.testing import orthonormal
from tests.models import PROMPTS, batch, train, trainable, with_lora
from tests.test_guarantee import deltas, through
from tests.test_trainer import arguments
from tests.test_training import ROWS

WIDTH, GROUP = 128, 32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES = {
    "vocab_size": 64,
    "hidden_size": WIDTH,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


class Packed(nn.Module):
    """Whole numbers in buffers; computes in bf16; what evaluation once ran, never trains again."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("codes", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.packed = False

    def forward(self, x):
        W = (self.codes * self.scale).to(torch.bfloat16)
        self.packed = self.packed or not (self.training or x.requires_grad)
        if not self.packed:
            return nn.functional.linear(x, W)
        with torch.no_grad():
            return nn.functional.linear(x, W)


def dense() -> nn.Module:
    torch.manual_seed(0)
    model = t.LlamaForCausalLM(t.LlamaConfig(**SIZES))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(5)
    return model


def stand_in(tmp_path):
    model = dense().bfloat16()
    for name, module in list(model.named_modules()):
        if name.endswith("_proj"):
            model.set_submodule(name, Packed(module))
    model.requires_grad_(False)
    # PEFT puts a LoRA on what it knows, so the factors are put there as PEFT would.
    linear = with_lora(dense().bfloat16(), TARGETS)
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            linear.get_submodule(f"base_model.model.{name}").base_layer = module
    return linear


def loaded(tmp_path, config, dtype=torch.float32):
    dense().save_pretrained(tmp_path / "dense")
    folder, options = tmp_path / "dense", {"dtype": dtype, "device_map": "cpu"}
    model = t.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **options)
    return with_lora(model, TARGETS)


def nf4(tmp_path):
    pytest.importorskip("bitsandbytes")
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    config = t.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True, **options)
    return loaded(tmp_path, config, torch.bfloat16)


def int8(tmp_path):
    pytest.importorskip("bitsandbytes")
    return loaded(tmp_path, t.BitsAndBytesConfig(load_in_8bit=True))


def quanto(tmp_path):
    pytest.importorskip("optimum.quanto")
    return loaded(tmp_path, t.QuantoConfig(weights="int4"))


def torchao(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    return loaded(tmp_path, t.TorchAoConfig(quantization.Int8WeightOnlyConfig()))


def torchao4(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    options = {"granularity": quantization.PerGroup(GROUP), "weight_dtype": torch.int4}
    config = t.TorchAoConfig(quantization.IntxWeightOnlyConfig(**options))
    return loaded(tmp_path, config, torch.bfloat16)


def hqq(tmp_path):
    base = pytest.importorskip("hqq.models.hf.base")
    from hqq.core.quantize import BaseQuantizeConfig

    model, config = dense(), BaseQuantizeConfig(nbits=4, group_size=64)
    options = {"compute_dtype": torch.float32, "device": "cpu"}
    base.AutoHQQHFModel.quantize_model(model, quant_config=config, **options)
    return with_lora(model, TARGETS)


def packed_on_disk(tmp_path, about: dict):
    """A checkpoint of whole numbers drawn at random, as GPTQ and AWQ lay them out."""
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum.gptq")
    model, generator = dense(), torch.Generator().manual_seed(0)
    tensors = {}
    for key, W in model.state_dict().items():
        if not key.endswith("_proj.weight"):
            tensors[key] = W.clone()
            continue
        (out, into), prefix = W.shape, key.removesuffix("weight")
        gptq = about["quant_method"] == "gptq"
        shape = (into // 8, out) if gptq else (into, out // 8)
        drawn = torch.randint(-(2**31), 2**31 - 1, shape, generator=generator)
        tensors[f"{prefix}qweight"] = drawn.int()
        tensors[f"{prefix}qzeros"] = torch.full((into // GROUP, out // 8), 0x77777777).int()
        tensors[f"{prefix}scales"] = torch.full((into // GROUP, out), float(W.std()) / 5).half()
        if gptq:
            tensors[f"{prefix}g_idx"] = (torch.arange(into) // GROUP).int()
    folder = tmp_path / "packed"
    model.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"bits": 4, "group_size": GROUP, "desc_act": False, **about}
    (folder / "config.json").write_text(json.dumps(config))
    options = {"dtype": torch.bfloat16, "device_map": "cpu"}
    return with_lora(t.AutoModelForCausalLM.from_pretrained(folder, **options), TARGETS)


def gptq(tmp_path):
    about = {"quant_method": "gptq", "backend": "gptq_torch"}
    return packed_on_disk(tmp_path, {"sym": True, **about})


def awq(tmp_path):
    about = {"quant_method": "awq", "version": "gemm", "backend": "torch_awq"}
    return packed_on_disk(tmp_path, {"zero_point": True, **about})


KINDS = [stand_in, nf4, int8, quanto, torchao, torchao4, hqq, gptq, awq]
ABOUT = {  # what the documentation lists
    nf4: ("bitsandbytes", "4 bits (nf4, doubly quantised); QLoRA"),
    int8: ("bitsandbytes", "8 bits"),
    gptq: ("GPTQ", "4 bits, its PyTorch backend"),
    awq: ("AWQ", "4 bits, its PyTorch backend"),
    hqq: ("HQQ", "4 bits"),
    quanto: ("quanto", "4 bits"),
    torchao: ("torchao", "8 bits, by `Trainer` too"),
    torchao4: ("torchao", "4 bits, in a loop of your own: `Trainer` refuses it"),
}


def gradients(model) -> list[torch.Tensor]:
    model.train()
    model(**batch()).loss.backward()
    found = [p.grad.clone() for p in trainable(model) if p.grad is not None]
    model.zero_grad()
    return found


@pytest.mark.parametrize("form", ["found", "given"])
@pytest.mark.parametrize("make", KINDS)
def test_is_kept_off_its_bases(tmp_path, make, form):
    model = make(tmp_path)
    roles = {m.role for m in inspect(model).blocks[0].matrices}
    assert roles == {"writer", "value", "hidden", "reader"}
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    if form == "found":
        options = {"reference": PROMPTS, "tokens": 2, "every": 1, "refresh": 2, "rank": 3}
    else:
        options = {
            "subspaces": grasp.Subspaces.from_bases({i: torch.eye(WIDTH, 3) for i in (0, 1)})
        }
    before = deltas(model)
    with Guard(model, optimizer=optimizer, **options) as guard:
        train(model.train(), optimizer, 6)
        assert guard.certificate()["holds"]
    assert len(guard.bases) == (28 if form == "found" else 10)
    assert through(guard, before, deltas(model)) <= 1e-6
    train(model, optimizer, 1)  # unguarded
    assert through(guard, before, deltas(model)) > 1e-4


@pytest.mark.parametrize("make", KINDS)
def test_gradients_are_what_they_were_before_it_was_looked_at(tmp_path, make):
    model = make(tmp_path)
    before = gradients(model)
    assert len(before) == 28
    with evaluating(model):  # dropout is off, and quantised maps are as in training
        model(**batch()).loss.backward()
    for p, G in zip(trainable(model), before, strict=True):
        torch.testing.assert_close(p.grad, G)
    model.zero_grad()
    with Guard(model, reference=PROMPTS, tokens=2):
        pass
    for now, G in zip(gradients(model), before, strict=True):
        torch.testing.assert_close(now, G)


@pytest.mark.parametrize("make", [k for k in KINDS[1:] if k is not torchao4])  # Trainer refuses
def test_a_trainer_certifies_what_it_saves(tmp_path, make):
    model = make(tmp_path)
    hold = grasp.GraspCallback(reference=PROMPTS, tokens=2, every=1, refresh=2, rank=3)
    options = {"save_strategy": "steps", "save_steps": 3}
    trainer = t.Trainer(model, arguments(tmp_path, **options), train_dataset=ROWS, callbacks=[hold])
    before = deltas(model)
    trainer.train()
    after = deltas(model)
    assert through(hold.guard, before, after) <= 1e-6
    assert json.loads((tmp_path / CERTIFICATE).read_text())["holds"]
    trainer.save_model(tmp_path / "kept")
    base = model.unload()
    saved = load_adapter(base, tmp_path / "kept")
    assert through(hold.guard, before, deltas(saved)) <= 1e-6


def test_a_map_that_ends_gradients_is_refused(tmp_path):
    model = stand_in(tmp_path).eval()
    with torch.no_grad():
        model(**batch())  # evaluated, and so packed for good
    with pytest.raises(ValueError, match=r"_proj \(Packed\) hands no gradient on.*that trains"):
        Guard(model, reference=PROMPTS, tokens=2).attach()


@pytest.mark.parametrize("make", [lambda path: with_lora(dense(), TARGETS), *KINDS[:2]])
def test_a_basis_that_fills_its_space_leaves_rounding_of_the_weight_beneath(tmp_path, make):
    model = make(tmp_path).train()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    given = grasp.Subspaces.from_bases({0: orthonormal(WIDTH, WIDTH, seed=0)})
    with pytest.warns(UserWarning, match="can still be written"):
        guard = Guard(model, given, optimizer=optimizer, indirect=False).attach()
    train(model, optimizer, 3)
    guard.detach()
    found = guard.certificate()
    assert found["holds"] and found["unmoved"] == list(guard.bases) and len(guard.bases) == 2
    for said in found["modules"].values():
        assert said["through"] is None and 0 < said["moved"] < 2.4e-7
    train(model, optimizer, 1)  # unguarded
    after = guard.certificate()
    assert not after["holds"] and after["through"] == pytest.approx(1) and not after["unmoved"]
