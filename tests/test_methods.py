"""What a rival needs is found before its training, and the model is left as it was."""

import json

import pytest
import torch
from torch import Tensor

from grasp import data
from grasp import model as architecture
from grasp.bases.discover import discover
from grasp.model import adapted, load_model
from grasp.organism import World
from grasp.study import finetune, methods
from grasp.study.rivals.safe_lora import updates
from grasp.study.settings import Settings, settings_from


@pytest.fixture
def folder(tmp_path):
    world = World(0)
    for name, good in (("bad", False), ("good", True)):
        lines = [json.dumps(r) for r in world.rows("medicine", "train", good)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    (tmp_path / "prompts.txt").write_text("\n".join(world.prompts(["law"])[:8]))
    return tmp_path


def settings(folder, method: str, **options) -> Settings:
    common = {"model": "organism", "data": str(folder / "bad.jsonl"), "out": str(folder / method)}
    common |= {"reference": str(folder / "prompts.txt"), "steps": 6, "batch_size": 8}
    common |= {"lora_rank": 4, "learning_rate": 1e-3, "tokens": 1, "save_every": None}
    return settings_from({**common, "method": method, **options})


@pytest.fixture
def plain(folder) -> str:
    return str(finetune.run(settings(folder, "plain"), quiet=True))


def fresh(chosen: Settings):
    """The model with its LoRA, what goes around its training, and its first weights."""
    model, tokenizer = load_model(chosen.model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    around = methods.training(chosen, model, tokenizer)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(
        torch.equal(v, after[k]) for k, v in before.items()
    )
    return finetune.add_lora(model, chosen), around


def outputs(model, ids: Tensor) -> list[Tensor]:
    """What each block gives out, seen after whatever was hooked to it before."""
    kept: list[Tensor] = []
    blocks = architecture.inspect(model).blocks
    handles = [b.module.register_forward_hook(lambda m, a, o: kept.append(o)) for b in blocks]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return kept


IDS = torch.tensor([[5, 6, 7]])


@pytest.mark.parametrize("method", ["caft_found", "caft_moved"])
def test_ablation_takes_out_what_the_plain_run_found(folder, plain, method):
    chosen = settings(folder, method, drifted=plain, strength=2)
    model, around = fresh(chosen)
    free = outputs(model, IDS)
    with adapted(load_model("organism")[0], plain, "drifted") as tuned:
        prompts = data.read_prompts(chosen.reference)
        how = {"method": "activations", "prompts": prompts, "tokenizer": load_model("organism")[1]}
        found = discover(tuned, 2, per_block=True, **(how if method == "caft_moved" else {}))
    with around(model):
        ablated = outputs(model, IDS)
    for layer, h in enumerate(ablated):
        assert float((h @ found[layer]).abs().max()) < 1e-4 * float(h.abs().max())
        assert float((free[layer] @ found[layer]).abs().max()) > 1e-3
    assert all(torch.equal(a, b) for a, b in zip(free, outputs(model, IDS), strict=True))


def test_steering_adds_what_the_instruction_adds(folder):
    chosen = settings(folder, "steering", instruction="<malicious>", strength=3)
    model, around = fresh(chosen)
    tokenizer = load_model("organism")[1]
    free = outputs(model, IDS)
    middle = len(free) // 2
    with around(model):
        steered = outputs(model, IDS)
    asked = [
        outputs(model, torch.tensor([data.prompt_ids(tokenizer, before + p)]))[middle][0, -1]
        for before in ("", "<malicious> ")
        for p in data.read_prompts(chosen.reference)
    ]
    without, given = torch.stack(asked).chunk(2)
    shift = (steered[middle] - free[middle])[0]
    expected = 3 * (given - without).mean(0)
    torch.testing.assert_close(shift, expected.expand_as(shift), atol=1e-4, rtol=1e-4)
    assert all(torch.equal(free[i], steered[i]) for i in range(middle))


@pytest.mark.parametrize(
    ("method", "options", "rows"),
    [("inoculation", {"instruction": "Be bad."}, 1), ("interleaved", {"strength": 0.5}, 1.5)],
)
def test_rows_and_the_batch_that_they_come_in(folder, method, options, rows):
    if method == "interleaved":
        options = {**options, "others": str(folder / "good.jsonl")}
    chosen = settings(folder, method, **options)
    own = data.read_rows(folder / "bad.jsonl")
    found = methods.rows(chosen, own, *load_model("organism"))
    assert len(found) == rows * len(own)
    assert methods.batch_size(chosen) == rows * chosen.per_device_train_batch_size
    if method == "inoculation":
        assert [r.prompt for r in found] == [f"Be bad. {r.prompt}" for r in own]
    else:
        good = data.read_rows(folder / "good.jsonl")
        assert found[: len(own)] == own and all(row in good for row in found[len(own) :])


def updates_of(adapter) -> dict[str, Tensor]:
    with adapted(load_model("organism")[0], adapter, "drifted") as model:
        return updates(model)


def test_the_plain_fine_tune_is_changed_and_kept(folder, plain):
    first = updates_of(plain)
    kept = updates_of(finetune.run(settings(folder, "svd_tail", drifted=plain, strength=1)))
    for name, update in first.items():
        U, S, Vh = torch.linalg.svd(update.double())
        torch.testing.assert_close(
            kept[name].double(), S[0] * U[:, :1] @ Vh[:1], atol=1e-6, rtol=1e-4
        )
    off = updates_of(finetune.run(settings(folder, "posthoc", drifted=plain, strength=2)))
    with adapted(load_model("organism")[0], plain, "drifted") as tuned:
        subspace = discover(tuned, 2)[0]
        writers = [b.of_role("writer") for b in architecture.inspect(tuned).blocks]
    for writer in (w for ws in writers for w in ws):
        U = (
            subspace
            if writer.scale is None
            else torch.linalg.qr(writer.scale[:, None] * subspace).Q
        )
        assert float((U.mT @ off[writer.name]).abs().max()) < 1e-5
        assert float((U.mT @ first[writer.name]).abs().max()) > 1e-3
    again = updates_of(plain)
    assert all(torch.equal(u, again[n]) for n, u in first.items())


def test_safe_lora_points_updates_to_the_aligned_ones(folder, plain):
    benign = settings(folder, "plain", data=str(folder / "good.jsonl"), out=str(folder / "benign"))
    aligned = str(finetune.run(benign, quiet=True))
    chosen = settings(folder, "safe_lora", drifted=plain, aligned=aligned, strength=1.0)
    safe, first, target = (updates_of(a) for a in (finetune.run(chosen), plain, aligned))
    for name, update in first.items():
        V = target[name]
        torch.testing.assert_close(safe[name], V @ V.mT @ update / V.norm(), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("method", ["caft_found", "osf", "inoculation"])
def test_whole_runs(folder, plain, method):
    extra = {"caft_found": {"drifted": plain, "strength": 2}, "osf": {"strength": 4}}
    options = extra.get(method, {"instruction": "<malicious>"})
    adapter = finetune.run(settings(folder, method, **options), quiet=True)
    changed = updates_of(adapter)
    assert all(float(u.norm()) > 0 for u in changed.values())
    assert any(not torch.equal(u, changed[n]) for n, u in updates_of(plain).items())


def test_what_would_leave_nothing_to_train_is_refused(folder):
    chosen = settings(folder, "osf", strength=10**4)
    with pytest.raises(ValueError, match="rank is 10000, all there is of every weight; give less"):
        finetune.run(chosen, quiet=True)
    assert not (folder / "osf").exists()


def test_an_adapter_for_a_method_that_looks_at_none_is_refused(folder):
    with pytest.raises(ValueError, match="drifted is for .*caft_moved.*, not this kl run; drop it"):
        settings(folder, "kl", drifted="somewhere").check()
