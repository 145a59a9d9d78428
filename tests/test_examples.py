"""Scripts of `examples` that need no other tool run on a tiny model, and what they keep holds."""

import json
import os
import re
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from grasp import GraspCallback, Guard
from tests.sharded_runs import plugin
from tests.test_cli import grasp
from tests.test_trl import tiny, tokenizer
from tests.together import together

FOLDER = Path(__file__).parent.parent / "examples"
RUN_HERE = [
    "transformers/trainer",
    "transformers/loop",
    "trl/sft",
    "trl/dpo",
    "trl/grpo",
    "qlora/train",
]
"""The others run beside their tools: `make doors`; those of the kernels in `test_recipes.py`."""


def example(name: str):
    spec = spec_from_file_location(name.replace("/", "_"), FOLDER / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def saved_model(folder: Path) -> Path:
    """A tiny model and its tokenizer, where an example looks for one."""
    tiny(max_position_embeddings=512).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def guard_of(trainer) -> Guard:
    callbacks = trainer.callback_handler.callbacks
    return next(c.guard for c in callbacks if isinstance(c, GraspCallback))


def kept(guard: Guard, folder: Path) -> float:
    """The largest share inside a basis of what a fresh adapter's file adds."""
    weights = load_file(folder / "adapter_model.safetensors")
    worst = 0.0
    for name, basis in guard.bases.items():
        module = re.sub(r"\.lora_[AB]\..*", "", name)
        B, A = (weights[f"{module}.lora_{f}.weight"].double() for f in "BA")
        D, U = B @ A, basis.double()
        inside = U.mT @ D if ".lora_B." in name else D @ U
        worst = max(worst, float(inside.norm() / D.norm()))  # NaN where nothing was learned
    return worst


def options(folder: Path) -> list[str]:
    """Of a short run, with all that it asks for in the folder."""
    model = saved_model(folder / "model")
    (folder / "prompts.txt").write_text("What is rain?\nWho was first?\n")
    where = {"--model": model, "--prompts": folder / "prompts.txt", "--out": folder / "out"}
    return [*(str(w) for pair in where.items() for w in pair), "--steps", "3"]


@pytest.mark.parametrize("name", RUN_HERE)
def test_runs_and_what_it_keeps_holds(tmp_path, monkeypatch, name):
    if name == "qlora/train":
        pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(tmp_path)
    extra = ["--tokens", "4"] if name == "trl/grpo" else []
    made = example(name).main([*options(tmp_path), *extra])
    guard = made if isinstance(made, Guard) else guard_of(made)
    assert json.loads(Path("out/grasp.json").read_text())["holds"]
    assert sum("lora_A" in module for module in guard.bases) == 14
    assert kept(guard, Path("out")) <= 1e-6
    if name == "qlora/train":
        layers = [m.base_layer for m in made.model.modules() if hasattr(m, "lora_A")]
        assert len(layers) == 14 and {m.weight.dtype for m in layers} == {torch.uint8}


def test_tensorboard_holds_what_the_guard_says(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    example("trl/sft").main(options(tmp_path))
    (events,) = (tmp_path / "out").rglob("events.out.tfevents.*")
    shown = EventAccumulator(str(events.parent))
    shown.Reload()
    found = {tag for tag in shown.Tags()["scalars"] if "grasp/" in tag}
    assert {tag.partition("grasp/")[2] for tag in found} >= {"blocked", "through", "rank", "holds"}
    (holds,) = (tag for tag in found if tag.endswith("holds"))
    assert all(event.value == 1 for event in shown.Scalars(holds))


def test_frozen_inputs_stay_off_the_prompts(tmp_path, monkeypatch):
    """Of what the base takes in on the prompts each A lets hardly anything through, B learns."""
    monkeypatch.chdir(tmp_path)
    trainer = example("transformers/frozen").main(options(tmp_path))
    model = trainer.model
    seen: dict[str, torch.Tensor] = {}
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert not any(m.lora_A.default.weight.requires_grad for m in layers.values())
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, a, name=name: seen.update({name: a[0][0]}))
    ids = tokenizer()(
        tokenizer().apply_chat_template(
            [{"role": "user", "content": "What is rain?"}],
            tokenize=False,
            add_generation_prompt=True,
        ),
        return_tensors="pt",
    ).input_ids
    with torch.no_grad(), model.disable_adapter():
        model(input_ids=ids)
    assert len(seen) == 14
    for name, layer in layers.items():
        A, B, x = layer.lora_A.default.weight, layer.lora_B.default.weight, seen[name]
        energy = x.shape[1] * (x @ A.mT).norm() ** 2 / (A.norm() * x.norm()) ** 2
        assert energy <= 0.5, name  # at random it is 1
        assert B.norm() > 0, name


def _fsdp2(rank: int, folder: Path, words: list[str]) -> dict:
    """As under `accelerate launch` with its file, which sets FSDP2 up on accelerators alone."""
    import accelerate

    accelerate.Accelerator = plugin
    return example("accelerate/fsdp2").main(words)


def _deepspeed(rank: int, folder: Path, words: list[str]) -> dict:
    script = example("deepspeed/train")
    script.GraspCallback = partial(GraspCallback, tokens=4)  # ZeRO-3 gathers a model at each
    trainer = script.main(words)
    return {"bases": dict(guard_of(trainer).bases)}


def test_two_processes_under_fsdp2(tmp_path):
    first, second = together(_fsdp2, tmp_path, options(tmp_path))
    assert first["holds"] and first["through"] == second["through"] <= 1e-6
    assert len(first["modules"]) == 28
    assert json.loads((tmp_path / "out/grasp.json").read_text())["holds"]
    changed = PeftModel.from_pretrained(tiny(max_position_embeddings=512), tmp_path / "out")
    moved = [p.norm() for n, p in changed.named_parameters() if "lora_B" in n]
    assert len(moved) == 14 and min(moved) > 0


@pytest.mark.skipif(os.name == "nt", reason="DeepSpeed")
def test_two_processes_under_deepspeed(tmp_path):
    pytest.importorskip("deepspeed")
    first, second = together(_deepspeed, tmp_path, options(tmp_path))
    assert json.loads((tmp_path / "out/grasp.json").read_text())["holds"]
    for name, basis in first["bases"].items():
        torch.testing.assert_close(basis, second["bases"][name], rtol=0, atol=0)
    guard = type("Kept", (), first)
    assert kept(guard, tmp_path / "out") <= 1e-6


def test_a_kl_penalty_beside_the_guard(tmp_path, monkeypatch):
    model = saved_model(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("What is rain?\nWho was first?\n")
    monkeypatch.chdir(FOLDER.parent)
    short = {"max_steps": 2, "tokens": 4, "reference": str(tmp_path / "prompts.txt")}
    small = [f"model={model}", f"out={tmp_path / 'kl'}", "seeds=[0]", "items=2"]
    small += [f"finetune={json.dumps(short)}", "by_method={grasp: {learning_rate: 2e-3}}"]
    words = [word for key in small for word in ("--set", key)]
    done = grasp("compare", "--config", "examples/compare/kl.yaml", *words)
    assert done.returncode == 0, done.stderr
    runs = json.loads((tmp_path / "kl/results.json").read_text())["runs"]
    assert {"plain", "grasp", "kl=1"} <= {r["method"] for r in runs}
    assert all(r["task_score"] == r["task_score"] and r["drift"] == r["drift"] for r in runs)
    assert (tmp_path / "kl/report.html").exists()


def test_all_are_short_and_tried():
    told = {str(f.relative_to(FOLDER).with_suffix("")) for f in FOLDER.rglob("*.py")}
    elsewhere = {"llama_factory/train", "unsloth/sft"}
    above = {"transformers/frozen", "accelerate/fsdp2", "deepspeed/train"}
    kernels = {n for n in told if n.startswith("kernels/")}
    assert told == kernels | set(RUN_HERE) | elsewhere | above
    listed = (FOLDER / "README.md").read_text()
    assert all(f"]({n}.py)" in listed for n in told)
    assert all(len(f.read_text().splitlines()) < 80 for f in FOLDER.rglob("*.py"))
