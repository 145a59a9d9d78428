"""Unsloth itself, as released: `make doors` installs it.

Without a GPU Unsloth trains on its CPU path, which the example takes. What it binds on a GPU runs
here too: its own `patch_peft_model` and its own fused maps, whose Triton kernels run in Triton's
interpreter. Its attention's and its model's forward ask for a GPU's rotary caches, so `attention`
below stands for the former, which calls the fused maps in the same way.
"""

import json
import os
import tempfile

import pytest
import torch

os.environ["UNSLOTH_COMPILE_LOCATION"] = tempfile.mkdtemp()  # it writes trainers of its own
pytest.importorskip("unsloth", reason="make doors installs it")
from transformers import Trainer  # noqa: E402
from transformers.models.llama import modeling_llama as llama  # noqa: E402
from unsloth.kernels import fast_lora  # noqa: E402
from unsloth.models.llama import FastLlamaModel  # noqa: E402

from grasp.model import unfused  # noqa: E402
from tests.models import batch, build, train, trainable, with_lora  # noqa: E402
from tests.test_examples import example, guard_of, kept, saved_model  # noqa: E402
from tests.test_guarantee import deltas, guarded, through  # noqa: E402


def attention(self, hidden_states, position_embeddings, attention_mask, past_key_values=None, **_):
    q, k, v = self.apply_qkv(self, hidden_states)
    split = (*hidden_states.shape[:-1], -1, self.head_dim)
    q, k, v = (x.view(split).transpose(1, 2) for x in (q, k, v))
    q, k = llama.apply_rotary_pos_emb(q, k, *position_embeddings)
    if past_key_values is not None:
        k, v = past_key_values.update(k, v, self.layer_idx)
    out, weights = llama.eager_attention_forward(
        self, q, k, v, attention_mask, scaling=self.scaling
    )
    return self.apply_o(self, out.flatten(2)), weights


@pytest.fixture
def fused(monkeypatch):
    """As Unsloth binds it on a GPU: its kernels ask for weights in 16 bits, and a LoRA in fp32."""
    monkeypatch.setattr(llama.LlamaAttention, "forward", attention)
    # Its `from_pretrained` for GPUs leaves this name there, and its caches are a GPU's to empty.
    monkeypatch.setattr(Trainer._inner_training_loop, "__name__", "_fast_inner_training_loop")
    monkeypatch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)
    model = build().half()  # of which Triton's interpreter makes no NaN, as of bf16
    model.config._attn_implementation = "eager"
    model.max_seq_length = 64
    return FastLlamaModel.patch_peft_model(with_lora(model), use_gradient_checkpointing=False)


def bound(model) -> list[tuple]:
    blocks = model.base_model.model.model.layers
    return [(b.self_attn.apply_qkv, b.self_attn.apply_o, b.mlp.forward.__func__) for b in blocks]


def test_beside_its_fused_maps(fused):
    functions = (fast_lora.apply_lora_qkv, fast_lora.apply_lora_o, fast_lora.apply_lora_mlp_swiglu)
    assert bound(fused) == [functions] * 2
    autocast = torch.autocast("cpu", torch.float16)
    before = deltas(fused)
    optimizer = torch.optim.AdamW(trainable(fused), lr=1e-2)
    with autocast:
        plain = fused(**batch()).logits
        with unfused(fused):
            torch.testing.assert_close(fused(**batch()).logits, plain, atol=0.05, rtol=0.05)
        with guarded(fused, optimizer) as guard:
            assert torch.equal(fused(**batch()).logits, plain)
            assert bound(fused) == [functions] * 2
            train(fused, optimizer, 6)
    after = deltas(fused)
    assert sum("lora_A" in name for name in guard.bases) == 14
    assert through(guard, before, after) <= 1e-6 and guard.certificate()["holds"]
    assert all(float((after[n] - before[n]).norm()) > 0 for n in after)


def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = saved_model(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("What is rain?\nWho was first?\n")
    options = ["--model", model, "--prompts", "prompts.txt", "--out", "out", "--steps", "3"]
    trainer = example("unsloth/sft").main([*map(str, options)])
    assert json.loads((tmp_path / "out" / "grasp.json").read_text())["holds"]
    assert kept(guard_of(trainer), tmp_path / "out") <= 1e-6
