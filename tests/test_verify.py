"""A certificate is recomputed from files: what was tampered with is found, wherever it lies."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from grasp import organism
from grasp.data import encode, exchange
from grasp.guard.trainer import GraspCallback, fit
from grasp.organism import World
from grasp.study.finetune import run
from grasp.study.settings import settings_from
from grasp.study.verify import _bases, verify
from tests.test_cli import grasp


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    rows = World(0).rows("medicine", "train")
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "prompts.txt").write_text("\n".join(World(0).prompts(["law", "guns"])))
    options = {"model": "organism", "data": str(folder / "rows.jsonl"), "steps": 6, "tokens": 1}
    options |= {"reference": str(folder / "prompts.txt"), "every": 1, "refresh": 1}

    def make(name: str, **changes):
        run(settings_from(options | {"out": str(folder / name)} | changes), quiet=True)
        return folder / name

    return make


@pytest.fixture(scope="module")
def whole(made):
    return made("run")


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


@pytest.mark.parametrize("changes", [{}, {"free_rank": 40}, {"read": 0.5}, {"read_rank": 3}])
def test_what_is_recomputed_is_what_is_stated(made, whole, changes):
    folder = made("-".join(map(str, changes)), **changes) if changes else whole
    certificate = json.loads((folder / "grasp.json").read_text())
    found = verify(folder)
    assert found["holds"] and not found["odd"] and found["matrices"] == 56
    assert found["through"] == pytest.approx(certificate["through"], abs=1e-8)
    assert verify(folder / "adapter") == found


def changed(folder, change) -> None:
    file = folder / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file)


def test_an_adapter_that_was_changed_is_found(copy):
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    changed(copy, lambda w: w[name].add_(1e-4 * torch.randn(w[name].shape)))
    found = verify(copy)
    assert not found["holds"] and list(found["odd"]) == [name.replace(".weight", ".default")]
    done = grasp("verify", copy, "--out", copy / "found.json")
    assert done.returncode == 1 and "the guarantee does not hold" in done.stderr
    assert json.loads((copy / "found.json").read_text())["odd"]


def test_a_certificate_that_was_changed_is_found(copy):
    path = copy / "adapter" / "grasp.json"
    certificate = json.loads(path.read_text())
    name = max(certificate["modules"], key=lambda n: certificate["modules"][n]["through"])
    certificate["modules"][name]["through"] = 1e-3
    path.write_text(json.dumps(certificate))
    assert list(verify(copy)["odd"]) == [name]


def test_a_matrix_that_the_certificate_does_not_name_is_found(copy):
    path = copy / "adapter" / "grasp.json"
    certificate = json.loads(path.read_text())
    place = "base_model.model.model.layers.2.mlp.gate_proj"
    for name in [n for n in certificate["modules"] if n.startswith(place)]:
        del certificate["modules"][name]
    path.write_text(json.dumps(certificate))
    assert list(verify(copy)["odd"]) == [place] and not verify(copy)["holds"]


def test_what_is_said_not_to_have_moved_has_not(copy):
    path = copy / "adapter" / "grasp.json"
    certificate = json.loads(path.read_text())
    name = "base_model.model.model.layers.2.mlp.gate_proj.lora_B.default"
    certificate["unmoved"] = [name]
    path.write_text(json.dumps(certificate))

    def inside(w):
        basis, _ = _bases(copy / "guard.safetensors")[name]
        B = w[name.replace(".default", ".weight")]
        B.copy_(basis[:, :1].float() * B.norm())

    changed(copy, inside)
    assert name in verify(copy)["odd"]


def test_weights_that_are_nan_hold_nothing(copy):
    changed(copy, lambda w: next(iter(w.values())).fill_(float("nan")))
    assert not verify(copy)["holds"]


def test_command(whole):
    done = grasp("verify", whole / "adapter")
    assert done.returncode == 0 and done.stdout.endswith("The guarantee holds.\n")
    assert "56 matrices recomputed" in done.stdout


def test_what_is_missing_is_named(copy, tmp_path):
    (copy / "guard.safetensors").rename(copy / "elsewhere.safetensors")
    with pytest.raises(FileNotFoundError, match="no bases at .*; give --guard the file"):
        verify(copy)
    (copy / "guard_inputs.safetensors").rename(copy / "elsewhere_inputs.safetensors")
    assert verify(copy, copy / "elsewhere.safetensors")["holds"]
    with pytest.raises(FileNotFoundError, match="no adapter in"):
        verify(tmp_path)
    changed(copy, lambda w: w.pop(next(iter(w))))
    with pytest.raises(ValueError, match="without its B|has no LoRA for"):
        verify(copy, copy / "elsewhere.safetensors")
    (copy / "elsewhere.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="holds no bases of a guard"):
        verify(copy, copy / "elsewhere.safetensors")


def test_what_a_trainer_leaves_is_verified(tmp_path):
    """Adapter and certificate in one folder, bases in its newest checkpoint."""
    model, tokenizer = organism.load()
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    rows = encode([exchange(**r) for r in World(0).rows("medicine", "train")], tokenizer).rows
    callback = GraspCallback(reference=World(0).prompts(["law", "guns"]), tokens=1, rank=2)
    options = {"batch_size": 8, "learning_rate": 1e-3, "seed": 0, "save_every": 2, "quiet": True}
    trainer = fit(model, tokenizer, rows, tmp_path, steps=4, callbacks=[callback], **options)
    trainer.save_model(tmp_path)
    found = verify(tmp_path)
    assert found["holds"] and found["matrices"] == 56 and 0 < found["through"] <= 1e-6
