"""Fine-tunes of a quantised base, from files: what holds, goes on, is scored, or is refused."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from grasp.files import read_json
from grasp.model import inspect, load_model, loading
from grasp.study import finetune, studies
from grasp.study.design import study_from
from grasp.study.evaluate import evaluate
from grasp.study.scoring import Measures
from grasp.study.settings import settings_from
from tests.test_finetune import prompts_file, rows_file, settings  # noqa: F401
from tests.test_study import config  # noqa: F401

BITS = {4: {"load_in_4bit": True}, 8: {"load_in_8bit": True}}


def installed():
    pytest.importorskip("bitsandbytes")


def shares(adapter: Path, guard: Path | None = None) -> list[float]:
    """‖Uᵀ ΔW‖ / ‖ΔW‖ and ‖ΔW V‖ / ‖ΔW‖ of each LoRA, from the files that the run left.

    Args:
        guard: of the bases; None takes `grasp finetune`'s.
    """
    tensors = load_file(adapter / "adapter_model.safetensors")
    guard = guard or adapter.parent / "guard.safetensors"
    bases = {k.removeprefix("basis."): U for k, U in load_file(guard).items()}
    with safe_open(guard.with_name(f"{guard.stem}_inputs.safetensors"), framework="pt") as file:
        about = json.loads(file.metadata()["grasp_inputs"])
        for name, owner in about["same"].items():
            bases[name] = file.get_tensor(owner)
            if name in about["inside"]:  # where less is left than is blocked, that is kept
                Q = torch.linalg.qr(bases[name].double(), mode="complete").Q
                bases[name] = Q[:, bases[name].shape[1] :]
    found = []
    for key, A in tensors.items():
        if "lora_A" in key:
            D = tensors[key.replace("lora_A", "lora_B")].double() @ A.double()
            name = key.removesuffix(".weight") + ".default"
            U, V = bases[name.replace("lora_A", "lora_B")].double(), bases[name].double()
            assert U.shape[1] and V.shape[1]
            found.append(float((U.mT @ D).norm() / D.norm()))
            found.append(float((D @ V).norm() / D.norm()))
    return found


@pytest.mark.parametrize("bits", BITS)
def test_a_killed_run_goes_on_bit_for_bit_and_is_kept_off_its_bases(
    rows_file,  # noqa: F811
    prompts_file,  # noqa: F811
    tmp_path,
    bits,
):
    installed()

    def kill(step: int) -> None:
        if step == 5:
            raise KeyboardInterrupt

    options = BITS[bits] | {"refresh": 1, "every": 1}
    whole = finetune.run(settings(rows_file, prompts_file, tmp_path / "a", **options), quiet=True)
    chosen = settings(rows_file, prompts_file, tmp_path / "b", **options)
    with pytest.raises(KeyboardInterrupt):
        finetune.run(chosen, after_step=kill, quiet=True)
    resumed = []
    killed = finetune.run(chosen, after_step=resumed.append, quiet=True)
    assert resumed == [4, 5, 6, 7, 8]
    one, other = (load_file(a / "adapter_model.safetensors") for a in (whole, killed))
    assert all(torch.equal(T, other[k]) for k, T in one.items())
    assert {T.dtype for T in one.values()} == {torch.float32}
    found = read_json(killed.parent / "grasp.json")
    unbroken = read_json(whole.parent / "grasp.json")
    assert found["holds"] and found | {"cost": unbroken["cost"]} == unbroken
    worst = shares(killed)
    assert len(worst) == len(one) and max(worst) <= 1e-6
    assert max(worst) == pytest.approx(found["through"], rel=1e-2)

    model, _ = load_model(chosen.model, **chosen.weights)
    kinds = {4: "Linear4bit", 8: "Linear8bitLt"}
    maps = [m for b in inspect(model).blocks for m in b.matrices]
    assert {type(m.module).__name__ for m in maps} == {kinds[bits]}
    with pytest.raises(ValueError, match=f"holds a run with load_in_{bits}bit = True"):
        finetune.run(settings(rows_file, prompts_file, tmp_path / "b", refresh=1, every=1))


def test_a_study_scores_on_the_base_that_was_trained_on(config, tmp_path):  # noqa: F811
    installed()
    config["finetune"] |= {"steps": 4, "load_in_4bit": True}
    config |= {"stops": [], "methods": ["plain", "grasp", "osf"]}
    del config["benign"]
    chosen = study_from(config)
    result = studies.run(chosen)
    assert {r["method"] for r in result["runs"]} == {"plain", "grasp", "osf"}
    kept = read_json(tmp_path / "out" / "grasp-0" / "grasp.json")
    assert kept["holds"]
    base = {w: _scores(chosen, w) for w in (4, None)}
    scored = read_json(tmp_path / "out" / "base.json")["unrelated"]
    assert scored == pytest.approx(base[4], abs=1e-5)
    assert scored != pytest.approx(base[None], abs=1e-3)


def _scores(chosen, bits) -> list[float]:
    pairs = {"unrelated": Measures(chosen).pairs["unrelated"]}
    return evaluate(*load_model("organism", bits=bits), pairs, {})["unrelated"]


def test_a_gguf_file_is_quantised_as_the_folder_is():
    installed()
    folder, _ = load_model("organism", bits=4)
    plain, _ = load_model("organism")
    again = loading._loaded_again(
        plain, dtype=torch.float32, quantization_config=loading._bitsandbytes(4, torch.float32)
    )
    x = torch.randint(3, 60, (2, 6))
    with torch.no_grad():
        assert torch.equal(again.train()(x).logits, folder.train()(x).logits)
    assert again.generation_config is plain.generation_config
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight


def test_what_can_not_be_loaded_is_said_before_anything_is(monkeypatch):
    given = {"model": "organism", "data": "rows.jsonl", "out": "out"}
    both = settings_from(given | {"load_in_4bit": True, "load_in_8bit": True})
    with pytest.raises(ValueError, match="load_in_4bit and load_in_8bit are both true; choose"):
        both.check()
    with pytest.raises(ValueError, match="load_in_4bit is 'yes'; give true or false"):
        settings_from(given | {"load_in_4bit": "yes"}).check()
    with pytest.raises(ValueError, match="bits is 3; give 4 or 8"):
        load_model("organism", bits=3)
    found = importlib.util.find_spec
    hidden = lambda name, *a: None if name == "bitsandbytes" else found(name, *a)  # noqa: E731
    monkeypatch.setattr(loading, "find_spec", hidden)
    with pytest.raises(ValueError, match="load_in_8bit needs bitsandbytes.*pip install"):
        settings_from(given | {"load_in_8bit": True}).check()
