"""Scripts of `examples` that need no other tool run on a tiny model, and what they keep holds."""

import json
import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from safetensors.torch import load_file

from grasp import GraspCallback, Guard
from tests.test_trl import tiny, tokenizer

FOLDER = Path(__file__).parent.parent / "examples"
RUN_HERE = [
    "transformers/trainer",
    "transformers/loop",
    "trl/sft",
    "trl/dpo",
    "trl/grpo",
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


@pytest.mark.parametrize("name", RUN_HERE)
def test_runs_and_what_it_keeps_holds(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    model = saved_model(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("What is rain?\nWho was first?\n")
    options = ["--model", model, "--prompts", "prompts.txt", "--out", "out", "--steps", "3"]
    extra = ["--tokens", "4"] if name == "trl/grpo" else []
    made = example(name).main([*map(str, options), *extra])
    guard = made if isinstance(made, Guard) else guard_of(made)
    assert json.loads(Path("out/grasp.json").read_text())["holds"]
    assert sum("lora_A" in module for module in guard.bases) == 14
    assert kept(guard, Path("out")) <= 1e-6


def test_all_are_short_and_tried():
    told = {str(f.relative_to(FOLDER).with_suffix("")) for f in FOLDER.rglob("*.py")}
    elsewhere = {"llama_factory/train", "unsloth/sft", "qlora/train"}  # the last: test_qlora.py
    assert told == {n for n in told if n.startswith("kernels/")} | set(RUN_HERE) | elsewhere
    assert all(len(f.read_text().splitlines()) < 80 for f in FOLDER.rglob("*.py"))
