"""A certificate is recomputed from files: what was tampered with is found, wherever it lies."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from grasp import organism
from grasp.data import Reference, encode, exchange
from grasp.guard.evidence import weights_digest
from grasp.guard.fit import fit
from grasp.guard.trainer import GraspCallback
from grasp.organism import World
from grasp.study.finetune import run
from grasp.study.settings import settings_from
from grasp.study.verify import _bases, _factors, verify
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
    assert found["weights"] and found["against"] == {"run": 56, "adapter": 0, "model": 0}


def changed(folder, change, name="adapter") -> None:
    file = folder / name / "adapter_model.safetensors"
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
    assert "weights ARE NOT those" in done.stdout
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
    (copy / "adapter" / "grasp_bases.safetensors").unlink()
    (copy / "guard.safetensors").rename(copy / "elsewhere.safetensors")
    with pytest.raises(FileNotFoundError, match="no bases at .*; give --guard the file"):
        verify(copy)
    (copy / "guard_inputs.safetensors").rename(copy / "elsewhere_inputs.safetensors")
    assert verify(copy, copy / "elsewhere.safetensors")["holds"]
    with pytest.raises(FileNotFoundError, match="no adapter in"):
        verify(tmp_path)
    (copy / "elsewhere.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="holds no bases of a guard"):
        verify(copy, copy / "elsewhere.safetensors")
    changed(copy, lambda w: w.pop(next(iter(w))))
    with pytest.raises(ValueError, match="without its B|has no LoRA for"):
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


@pytest.fixture(scope="module")
def frozen(made, tmp_path_factory):
    """With a cache on disk, so that the certificate tells the base model's weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRASP_CACHE", str(tmp_path_factory.mktemp("cache")))
        return made("frozen", freeze_inputs=True)


@pytest.fixture(params=["tracked", "frozen"])
def alone(request, made, tmp_path):
    """An adapter as a hub has it: nothing of its run is there; and the run's prompts."""
    folder = request.getfixturevalue("whole" if request.param == "tracked" else "frozen")
    place = shutil.copytree(folder / "adapter", tmp_path / "alone")
    return place, folder.parent / "prompts.txt"


def forge(adapter, **changes) -> None:
    """Change a certificate, its digest of the weights too."""
    raw = _factors(adapter)
    certificate = json.loads((adapter / "grasp.json").read_text())
    certificate |= {"weights_sha256": weights_digest(raw)} | changes
    (adapter / "grasp.json").write_text(json.dumps(certificate))


def test_an_adapter_alone(alone):
    adapter, _ = alone
    found = verify(adapter)
    assert found["holds"] and found["against"] == {"run": 0, "adapter": 28, "model": 0}
    assert len(found["unchecked"]) == 28 and all(".lora_A." in n for n in found["unchecked"])
    done = grasp("verify", adapter)
    assert done.returncode == 0 and done.stdout.endswith("What was checked holds.\n")
    assert "28 are not looked at" in done.stdout and "give the base: --model" in done.stdout


def test_inputs_are_found_again_from_the_base(alone):
    adapter, prompts = alone
    found = verify(adapter, model="organism", reference=prompts)
    assert found["holds"] and not found["unchecked"] and found["elsewhere"] == 0
    assert found["against"] == {"run": 0, "adapter": 28, "model": 28}
    assert found["through"] == pytest.approx(found["stated"], abs=1e-8)
    assert found["text"].endswith("again: the same")


def test_in_another_dtype_energy_is_judged(alone):
    adapter, prompts = alone
    found = verify(adapter, model="organism", reference=prompts, dtype="bfloat16")
    assert found["holds"] and found["elsewhere"] == 28 and 0 < found["energy"] < 0.1


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_an_unguarded_adapter_with_anothers_certificate_is_found(alone, dtype):
    adapter, prompts = alone

    def unguarded(weights):
        generator = torch.Generator().manual_seed(1)
        for name, W in weights.items():
            if ".lora_A." in name:
                W.copy_(torch.randn(W.shape, generator=generator) * W.norm() / W.numel() ** 0.5)

    changed(adapter.parent, unguarded, adapter.name)
    assert verify(adapter)["weights"] is False and not verify(adapter)["holds"]
    forge(adapter)
    assert verify(adapter)["holds"]  # its outputs are: nothing in these files tells of its inputs
    found = verify(adapter, model="organism", reference=prompts, dtype=dtype)
    assert not found["holds"] and len(found["odd"]) > 20
    if dtype:
        assert 0.5 < found["energy"]


def test_a_change_of_one_part_in_ten_thousand_is_found_by_the_base(alone):
    adapter, prompts = alone
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    changed(adapter.parent, lambda w: w[name].add_(1e-4 * torch.randn(w[name].shape)), adapter.name)
    forge(adapter)
    found = verify(adapter, model="organism", reference=prompts)
    assert list(found["odd"]) == [name.replace(".weight", ".default")]


def test_another_base_is_found(frozen, tmp_path):
    adapter, prompts = frozen / "adapter", frozen.parent / "prompts.txt"
    model, tokenizer = organism.load()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 5] += 1e-3
    model.save_pretrained(tmp_path / "near")
    tokenizer.save_pretrained(tmp_path / "near")
    run_ = frozen / "guard.safetensors"
    assert verify(adapter, model="organism", reference=prompts)["base"] is True
    found = verify(adapter, run_, model=str(tmp_path / "near"), reference=prompts)
    assert found["base"] is False and not found["holds"]
    with torch.no_grad():
        for p in model.model.layers.parameters():
            p.copy_(p[torch.randperm(len(p))])
    model.save_pretrained(tmp_path / "far")
    tokenizer.save_pretrained(tmp_path / "far")
    options = {"reference": prompts, "dtype": "bfloat16"}  # of which no digest is known
    found = verify(adapter, model=str(tmp_path / "far"), **options)
    assert found["base"] is None and not found["holds"] and found["energy"] > 0.5


def test_other_prompts_are_refused(alone, tmp_path):
    adapter, prompts = alone
    with pytest.raises(ValueError, match="prompts are not those shipped with grasp; give --refer"):
        verify(adapter, model="organism")
    lines = prompts.read_text().split("\n")
    (tmp_path / "other.txt").write_text("\n".join(lines[1:]))
    with pytest.raises(ValueError, match="prompts are not those in .*other.txt"):
        verify(adapter, model="organism", reference=tmp_path / "other.txt")
    done = grasp("verify", adapter, "--draw")
    assert done.returncode == 1 and "give --model too" in done.stderr


def test_the_text_of_shipped_prompts_travels_and_that_of_ones_own_does_not(alone, monkeypatch):
    """A text that is none of theirs, or not the run's, is refused."""
    adapter, prompts = alone
    own = prompts.read_text().split("\n")
    file = adapter / "grasp_bases.safetensors"
    assert not {"text", "lengths"} & load_file(file).keys()
    model, tokenizer = organism.load()
    certificate = json.loads((adapter / "grasp.json").read_text())
    options = {name: certificate["settings"][name] for name in ("tokens", "batch", "seed")}
    rows = list(Reference(model, own, tokenizer, **options).rows())
    tensors = load_file(file)
    tensors["text"] = torch.cat([torch.tensor(ids, dtype=torch.int32) for _, ids in rows])
    tensors["lengths"] = torch.tensor([[len(p), len(ids)] for p, ids in rows])
    save_file(tensors, file)
    with pytest.raises(ValueError, match="is not of the prompts shipped with grasp"):
        verify(adapter, model="organism")
    for module in ("grasp.guard.evidence", "grasp.study.found_again"):
        monkeypatch.setattr(f"{module}.default_prompts", lambda: own)
    found = verify(adapter, model="organism")
    assert found["holds"] and found["text"] == "the run's own text, which came with the adapter"
    assert verify(adapter, model="organism", draw=True)["text"].endswith("again: the same")
    tensors["text"][-1] += 1
    save_file(tensors, file)
    with pytest.raises(ValueError, match="is not what its certificate was made by"):
        verify(adapter, model="organism")


def test_a_run_on_shipped_prompts_sends_its_text_along(made, monkeypatch):
    own = World(0).prompts(["law", "guns"])
    monkeypatch.setattr("grasp.guard.evidence.default_prompts", lambda: own)
    monkeypatch.setattr("grasp.study.found_again.default_prompts", lambda: own)
    monkeypatch.setattr("grasp.data.prompts.default_prompts", lambda: own)
    folder = made("shipped", reference=None, steps=2)
    assert {"text", "lengths"} <= load_file(folder / "adapter" / "grasp_bases.safetensors").keys()
    found = verify(folder / "adapter", model="organism")
    assert found["holds"] and found["text"] == "the run's own text, which came with the adapter"
