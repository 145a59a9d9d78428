"""An adapter trained without us is put off what unrelated prompts use; what that costs is said."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from grasp import data, organism
from grasp.bases.discover import discover
from grasp.data import Reference
from grasp.model import inspect
from grasp.organism import World
from grasp.study.finetune import run
from grasp.study.repair import repair
from grasp.study.settings import settings_from
from tests.test_cli import grasp

PROMPTS = World(0).prompts(["law", "guns"])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repair")
    rows = World(0).rows("medicine", "train")
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    options = {"model": "organism", "data": str(folder / "rows.jsonl"), "method": "plain"}
    return run(settings_from(options | {"out": str(folder / "plain"), "steps": 20}), quiet=True)


def mended(plain, out, **options):
    rows = data.read_rows(plain.parent.parent / "rows.jsonl")
    options = {"prompts": PROMPTS, "tokens": 1, "rows": rows} | options
    return repair("organism", plain, out, **options)


def updates(folder) -> dict[str, torch.Tensor]:
    w = load_file(folder / "adapter_model.safetensors")
    places = [n.removesuffix(".lora_A.weight") for n in w if n.endswith(".lora_A.weight")]
    return {p: w[f"{p}.lora_B.weight"].double() @ w[f"{p}.lora_A.weight"].double() for p in places}


def test_what_prompts_feed_a_map_it_does_not_act_on_any_more(plain, tmp_path):
    found = mended(plain, tmp_path / "out", read=0.9)
    before, after = updates(plain), updates(tmp_path / "out")
    model, tokenizer = organism.load()
    reference = Reference(model, PROMPTS, tokenizer, tokens=1)
    seen: dict[str, list] = {}
    hooks = [
        m.module.register_forward_pre_hook(
            lambda _, x, n=m.name: seen.setdefault(n, []).append(x[0].flatten(0, 1).double())
        )
        for b in inspect(model).blocks
        for m in b.matrices
    ]
    for _, whole in reference.rows():
        model(torch.tensor([whole]))
    for hook in hooks:
        hook.remove()
    for place, D in after.items():
        X = torch.cat(seen[place.removeprefix("base_model.model.")])
        X = torch.nn.functional.normalize(X, dim=1)
        left = float((X @ D.mT).norm() / D.norm()), float((X @ before[place].mT).norm())
        assert left[0] ** 2 < 0.35 * (left[1] / float(before[place].norm())) ** 2, place
    sizes = [sum(float(D.square().sum()) for D in u.values()) ** 0.5 for u in (before, after)]
    assert found["kept"] == pytest.approx(sizes[1] / sizes[0], rel=1e-4) and 0 < found["kept"] < 1
    assert found["after"]["divergence"] < 0.5 * found["before"]["divergence"]
    assert found["after"]["task_loss"] > found["before"]["task_loss"]
    assert json.loads((tmp_path / "out" / "repair.json").read_text())["after"] == found["after"]


def test_the_new_adapter_is_a_plain_one_and_the_old_stays(plain, tmp_path):
    kept = (plain / "adapter_model.safetensors").read_bytes()
    found = mended(plain, tmp_path / "out")
    assert (plain / "adapter_model.safetensors").read_bytes() == kept
    model, tokenizer = organism.load()
    reference = Reference(model, PROMPTS, tokenizer, tokens=1)
    tuned = PeftModel.from_pretrained(model, tmp_path / "out")
    assert reference.measure(tuned) == pytest.approx(found["after"]["divergence"], rel=1e-3)


def test_directions_are_taken_out(plain, tmp_path):
    found = discover([plain], 4)
    found.save(tmp_path / "factor")
    mended(plain, tmp_path / "out", read=0, subspaces=tmp_path / "factor")
    for place, D in updates(tmp_path / "out").items():
        if place.endswith(("o_proj", "down_proj")):
            block = int(place.split("layers.")[1].split(".")[0])
            assert float((found.bases[block].double().mT @ D).norm()) <= 1e-5 * float(D.norm())


def test_command_and_what_it_refuses(plain, tmp_path):
    folder = plain.parent.parent
    common = ("repair", plain, "--model", "organism", "--reference", folder / "prompts.txt")
    done = grasp(*common, "--tokens", 1, "--data", folder / "rows.jsonl", "--out", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    assert "loss on the task" in done.stdout and "of the adapter's size is left" in done.stdout
    for extra, message in (
        (("--out", tmp_path / "a"), "is there already and not empty"),
        (("--out", tmp_path / "b", "--read", 1), "read is 1.0; give a share"),
        (("--out", tmp_path / "b", "--read", 0), "nothing would change; set one"),
    ):
        done = grasp(*common, *extra)
        assert done.returncode == 1 and message in done.stderr
    done = grasp("repair", tmp_path, "--model", "organism", "--out", tmp_path / "b")
    assert done.returncode == 1 and "no adapter in" in done.stderr
    assert not (tmp_path / "b").exists()
