"""The plugin in Axolotl itself, as released: `make doors` installs it, with its own TRL.

Its fused kernels run here too. What Triton writes runs in Triton's interpreter, on a CPU, which
needs the device that two lines of Axolotl name ("cuda") to be another.
"""

import json
import os

import pytest
import torch
import yaml
from safetensors.torch import load_file

os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"
pytest.importorskip("axolotl", reason="make doors installs it")
from axolotl.integrations.base import BasePlugin, PluginManager  # noqa: E402
from axolotl.utils.config import prepare_plugins, validate_config  # noqa: E402
from axolotl.utils.dict import DictDefault  # noqa: E402

import grasp  # noqa: E402
from grasp import Subspaces  # noqa: E402
from grasp.model import unfused  # noqa: E402
from grasp_kernels.testing import orthonormal  # noqa: E402
from tests.models import batch, build, train, trainable, with_lora  # noqa: E402
from tests.test_examples import FOLDER, kept, saved_model  # noqa: E402
from tests.test_guarantee import deltas, guarded, through  # noqa: E402

PLUGIN = "grasp.integrations.axolotl.GraspPlugin"
FUSED = {"lora_qkv_kernel": True, "lora_o_kernel": True, "lora_mlp_kernel": True}


@pytest.fixture(autouse=True)
def manager(monkeypatch):
    """Axolotl's own, which lives as long as its process, as new."""
    monkeypatch.setattr(PluginManager, "_instance", None)
    return PluginManager.get_instance()


def config(**keys) -> DictDefault:
    """What a user writes, as Axolotl reads it: plugins loaded, then everything checked."""
    written = {
        "base_model": "none",
        "plugins": [PLUGIN],
        "datasets": [{"path": "rows.jsonl", "type": "completion"}],
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-4,
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_linear": True,
        **keys,
    }
    read = DictDefault(written)
    prepare_plugins(read)
    return validate_config(read)


def test_one_line_guards(manager):
    cfg = config()
    (callback,) = manager.add_callbacks_pre_trainer(cfg, None)
    assert isinstance(manager.plugins[PLUGIN], BasePlugin)
    assert isinstance(callback, grasp.GraspCallback) and callback.options == {}
    assert callback.reference == grasp.default_prompts()


def test_what_the_section_says_is_what_the_guard_is_given(manager, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is rain?\n")
    said = {"read": 0.9, "rank": 2, "tokens": 3, "every": 1, "read_rank": 5, "residual": False}
    cfg = config(grasp={**said, "reference": str(prompts)})
    (callback,) = manager.add_callbacks_pre_trainer(cfg, None)
    assert callback.options == said and callback.reference == str(prompts)
    grasp.Guard(build(), reference=callback.reference, **callback.options)


def test_subspaces_alone_bring_no_prompts(manager, tmp_path):
    Subspaces.from_bases({0: orthonormal(8, 2)}).save(tmp_path / "factor")
    cfg = config(grasp={"subspaces": str(tmp_path / "factor")})
    (callback,) = manager.add_callbacks_pre_trainer(cfg, None)
    assert callback.reference is None and 0 in callback.subspaces


def test_a_later_run_that_lists_no_plugin_has_no_guard(manager):
    config()
    other = DictDefault({"plugins": ["axolotl.integrations.grokfast.GrokfastPlugin"]})
    assert manager.add_callbacks_pre_trainer(other, None) == []
    assert manager.add_callbacks_pre_trainer(DictDefault({}), None) == []


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"peft_use_dora": True}, "peft_use_dora is True.*DoRA.*leave it out"),
        ({"relora": True, "jagged_restart_steps": 5}, "relora is True.*out of the guard"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size is 2.*train with DDP"),
        ({"context_parallel_size": 2}, "context_parallel_size is 2.*train with DDP"),
        ({"grasp": {"raed": 0.9}}, "grasp.raed\n.*not permitted"),
        ({"grasp": {"read": "most"}}, "grasp.read\n.*number"),
        ({"grasp": {"reference": "nowhere.txt"}}, "'nowhere.txt' is not there; give a path"),
    ],
)
def test_what_it_cannot_guard_is_refused_by_name(keys, says):
    with pytest.raises(ValueError, match=f"(?s){says}"):
        config(**keys)


@pytest.fixture
def on_this_device(monkeypatch):
    empty = torch.empty

    def made_here(*size, device=None, **options):
        return empty(*size, device=None if device == "cuda" else device, **options)

    monkeypatch.setattr(torch, "empty", made_here)


@pytest.fixture
def fused(tmp_path, monkeypatch, on_this_device):
    """A LoRA as Axolotl patches it: its attention's class, and what it binds on each block."""
    from axolotl.monkeypatch import lora_kernels
    from transformers.models.llama.modeling_llama import LlamaAttention

    monkeypatch.setattr(LlamaAttention, "forward", LlamaAttention.forward)
    model = build()
    model.config.save_pretrained(tmp_path)
    cfg = DictDefault({"base_model": str(tmp_path), "adapter": "lora", **FUSED})
    lora_kernels.patch_self_attn_lora(cfg)
    yield lora_kernels.apply_lora_kernel_patches(with_lora(model), cfg)
    del LlamaAttention._original_forward


def test_beside_its_fused_kernels(fused):
    from axolotl.kernels import lora

    blocks = fused.base_model.model.model.layers
    bound = [(b.self_attn.apply_qkv, b.self_attn.apply_o, b.mlp.forward) for b in blocks]
    functions = (lora.apply_lora_qkv, lora.apply_lora_o, lora.apply_lora_mlp_swiglu)
    assert all(tuple(f.__func__ for f in fs) == functions for fs in bound)
    plain = fused(**batch()).logits
    with unfused(fused):
        torch.testing.assert_close(fused(**batch()).logits, plain)
        assert not any("forward" in vars(b.mlp) for b in blocks)
    before = deltas(fused)
    optimizer = torch.optim.AdamW(trainable(fused), lr=1e-2)
    with guarded(fused, optimizer) as guard:
        assert torch.equal(fused(**batch()).logits, plain)
        train(fused, optimizer, 6)
    again = [(b.self_attn.apply_qkv, b.self_attn.apply_o, b.mlp.forward) for b in blocks]
    assert again == bound
    after = deltas(fused)
    assert sum("lora_A" in name for name in guard.bases) == 14
    assert through(guard, before, after) <= 1e-6 and guard.certificate()["holds"]
    assert all(float((after[n] - before[n]).norm()) > 0 for n in after)


def test_its_bases_are_those_of_a_model_without_fused_kernels(fused):
    with guarded(fused, torch.optim.AdamW(trainable(fused))) as guard:
        found = guard.bases
    for block in fused.base_model.model.model.layers:
        del block.mlp.forward
        block.self_attn.apply_qkv = lambda x, a=block.self_attn: (
            a.q_proj(x),
            a.k_proj(x),
            a.v_proj(x),
        )
        block.self_attn.apply_o = block.self_attn.o_proj
    with guarded(fused, torch.optim.AdamW(trainable(fused))) as guard:
        for name, basis in guard.bases.items():
            torch.testing.assert_close(found[name], basis)


def test_the_example_runs_on_axolotls_own_command_line(tmp_path, monkeypatch, on_this_device):
    from axolotl.cli.train import do_cli

    (tmp_path / "prompts.txt").write_text("What is rain?\nWho was first?\n")
    written = yaml.safe_load((FOLDER / "axolotl" / "lora.yaml").read_text())
    written["datasets"][0]["path"] = str(FOLDER / "rows.jsonl")
    written |= {
        "base_model": str(saved_model(tmp_path / "model")),
        "dataset_prepared_path": str(tmp_path / "data"),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 3,
        "save_steps": 3,
        "sequence_len": 256,
        "bf16": False,  # and below: for a machine without a GPU
        "attn_implementation": "eager",
    }
    written["grasp"] |= {"reference": str(tmp_path / "prompts.txt"), "tokens": 2}
    (tmp_path / "lora.yaml").write_text(yaml.safe_dump(written))
    seen = []
    begins = grasp.GraspCallback.on_train_begin

    def begun(self, *args, **kwargs):
        begins(self, *args, **kwargs)
        seen.append(self.guard)

    monkeypatch.setattr(grasp.GraspCallback, "on_train_begin", begun)
    do_cli(str(tmp_path / "lora.yaml"))
    (guard,) = seen
    assert "forward" in vars(guard.model.base_model.model.model.layers[0].mlp)
    assert json.loads((tmp_path / "out" / "grasp.json").read_text())["holds"]
    assert kept(guard, tmp_path / "out") <= 1e-6
    assert load_file(tmp_path / "out" / "checkpoint-3" / "grasp_guard.safetensors")
