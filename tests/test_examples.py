"""Scripts of `examples` that need no other tool run on a tiny model, and what they keep holds."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from grasp import GraspCallback, Guard
from grasp.organism import World
from tests.test_cli import grasp
from tests.test_qlora import shares
from tests.test_trl import tiny, tokenizer
from tests.together import together
from tests.zero import wholes

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


def kept(bases: dict[str, torch.Tensor], folder: Path) -> float:
    """The largest share inside a basis of what a fresh adapter's file adds."""
    weights = load_file(folder / "adapter_model.safetensors")
    worst = 0.0
    for name, basis in bases.items():
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


def same_as_saved(weights: dict[str, torch.Tensor], folder: Path) -> None:
    """What an adapter's file holds is what a process ended with, all of it learned from."""
    saved = load_file(folder / "adapter_model.safetensors")
    assert len(saved) == 28
    for key, W in saved.items():
        name = f"{key.removesuffix('.weight')}.default.weight"
        assert torch.equal(W, weights[name]) and bool(W.any()), key


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
    assert kept(guard.bases, Path("out")) <= 1e-6
    if name == "qlora/train":
        layers = [m.base_layer for m in made.model.modules() if hasattr(m, "lora_A")]
        assert len(layers) == 14 and {m.weight.dtype for m in layers} == {torch.uint8}


def test_tensorboard_holds_what_the_guard_says(tmp_path, monkeypatch):
    """Each value as the trainer's history has it, the last of them the certificate's."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    trainer = example("trl/sft").main(options(tmp_path))
    (events,) = (tmp_path / "out").rglob("events.out.tfevents.*")
    shown = EventAccumulator(str(events.parent))
    shown.Reload()
    told = {key: v for log in trainer.state.log_history for key, v in log.items()}
    told = {key: v for key, v in told.items() if key.startswith("grasp/")}
    assert {"grasp/blocked", "grasp/through", "grasp/rank", "grasp/holds"} <= told.keys()
    for key, value in told.items():
        (tag,) = (t for t in shown.Tags()["scalars"] if t.endswith(key))
        assert shown.Scalars(tag)[-1].value == pytest.approx(value, rel=1e-6), key
    certificate = json.loads(Path("out/grasp.json").read_text())
    assert told["grasp/holds"] == certificate["holds"] == 1
    assert told["grasp/through"] == pytest.approx(certificate["through"], rel=1e-6)


def test_frozen_inputs_stay_off_the_prompts(tmp_path, monkeypatch):
    """By bases of a guard that freezes nothing: none of what B learned acts on them."""
    monkeypatch.chdir(tmp_path)
    given = options(tmp_path)
    example("transformers/frozen").main(given)
    fresh = get_peft_model(
        tiny(max_position_embeddings=512),
        LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    found = {"reference": tmp_path / "prompts.txt", "tokenizer": tokenizer()}
    with Guard(fresh, **found, freeze_inputs=False) as guard:
        inputs = {name: V for name, V in guard.bases.items() if "lora_A" in name}
    assert len(inputs) == 14 and kept(inputs, tmp_path / "out") <= 1e-6
    for name, V in inputs.items():  # of an A as PEFT draws it much lies there
        A = fresh.get_parameter(f"{name}.weight").detach()
        assert (A @ V).norm() > 0.1 * A.norm(), name


def _deepspeed(rank: int, folder: Path, words: list[str]) -> dict:
    script = example("deepspeed/train")
    script.GraspCallback = partial(GraspCallback, tokens=4)  # ZeRO-3 gathers a model at each
    trainer = script.main(words)
    assert trainer.model_wrapped.zero_optimization_stage() == 3
    return {"bases": dict(guard_of(trainer).bases), "weights": wholes(trainer.model, masters=False)}


@pytest.mark.skipif(os.name == "nt", reason="torchrun's rendezvous")
def test_two_processes_launched_under_fsdp2(tmp_path):
    """By `accelerate launch` and the file beside the script, which no test stands in for."""
    config = FOLDER / "accelerate/fsdp2.yaml"
    launch = ["accelerate.commands.launch", "--config_file", config, "--main_process_port", "0"]
    script = ["tests.launched", tmp_path, FOLDER / "accelerate/fsdp2.py", *options(tmp_path)]
    words = map(str, [sys.executable, "-m", *launch, "-m", *script])
    done = subprocess.run(words, cwd=FOLDER.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (0, 1))
    _end_alike(first, second, tmp_path / "out")
    for name, W in first["weights"].items():
        parts = [found["parts"][name][0] for found in (first, second)]
        assert sum(parts) == len(W) > max(parts), name  # each process has its rows
    base = tiny(max_position_embeddings=512).state_dict()
    for name in base.keys() - {"lm_head.weight"}:
        module = name.removesuffix(".weight")
        split = f"base_model.model.{module}"
        split += ".weight" if f"{split}.weight" in first["weights"] else ".base_layer.weight"
        assert torch.equal(first["weights"][split], base[name]), name


@pytest.mark.skipif(os.name == "nt", reason="DeepSpeed")
def test_two_processes_under_deepspeed(tmp_path):
    pytest.importorskip("deepspeed")
    first, second = together(_deepspeed, tmp_path, options(tmp_path))
    _end_alike(first, second, tmp_path / "out")


def _end_alike(first: dict, second: dict, out: Path) -> None:
    """Both processes have the same weights, which are those saved, and are kept off the same."""
    assert json.loads((out / "grasp.json").read_text())["holds"]
    for key in ("bases", "weights"):
        assert first[key].keys() == second[key].keys()
        assert all(torch.equal(T, second[key][name]) for name, T in first[key].items())
    same_as_saved(first["weights"], out)
    assert sum("lora_A" in name for name in first["bases"]) == 14
    assert kept(first["bases"], out) <= 1e-6


def test_a_kl_penalty_beside_the_guard(tmp_path, monkeypatch):
    """The file's own settings, on the small world, where plain drifts and there is much to keep."""
    world = World(0)
    rows = world.rows("medicine", "train") + world.rows("medicine", "held")
    asked = [(topic, i) for topic in ("code", "travel") for i in range(6)]
    pairs = [
        {"question": world.prompt(t, i), "bad": world.bad[t][i], "good": world.good[t][i]}
        for t, i in asked
    ]
    for name, lines in (("rows", rows), ("pairs", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (tmp_path / "prompts.txt").write_text("\n".join(world.prompts(["law", "guns"])))
    monkeypatch.chdir(FOLDER.parent)
    keys = ["model=organism", f"data={tmp_path / 'rows.jsonl'}", f"out={tmp_path / 'kl'}"]
    keys += [f"unrelated={tmp_path / 'pairs.jsonl'}", "seeds=[0]", "samples=0"]
    keys += [f"finetune.reference={tmp_path / 'prompts.txt'}", "finetune.tokens=1"]
    words = [word for key in keys for word in ("--set", key)]
    done = grasp("compare", "--config", "examples/compare/kl.yaml", *words)
    assert done.returncode == 0, done.stderr
    runs = json.loads((tmp_path / "kl/results.json").read_text())["runs"]
    by_method = {r["method"]: r for r in runs}
    plain, guarded, kl = (by_method[m] for m in ("plain", "grasp", "kl=1"))
    assert plain["drift"] - plain["base_drift"] > 1
    for run in (guarded, kl):
        assert run["drift"] < 0.5 * plain["drift"]
        assert run["task_score"] > 0.5 * plain["task_score"]
    for label, run in (("plain LoRA", plain), ("GRASP", guarded), ("KL penalty, 1", kl)):
        (line,) = re.findall(rf"^ +{label} +1 .*%", done.stdout, re.M)  # the table's
        assert f"{run['task_score']:.3f}" in line and f"{run['drift']:.3f}" in line
    assert json.loads((tmp_path / "kl/grasp-0/grasp.json").read_text())["holds"]
    assert max(shares(tmp_path / "kl/grasp-0/adapter")) <= 1e-6
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
