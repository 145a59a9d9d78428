"""Real processes train one model that FSDP2 splits over them, and each holds a part of its weights.

Two start for all that two can show, and four for a mesh of two dimensions. What comes of a run is
set against the same run in one process, and against bases by products in fp64 of whole weights.
"""

import json
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM, Trainer

from grasp import GraspCallback, Guard
from grasp.data import Reference
from grasp.model import sharding
from tests import sharded_runs as runs
from tests.models import PROMPTS, batch, build, trainable
from tests.sharded_runs import CASES, FEW, GROWTH, HYBRID, Case
from tests.test_trainer import ROWS, arguments
from tests.together import together

LIMIT = 1e-6
RESUMED = {
    "saved": Case(accumulate=2, clip=0.5),
    "saved, few free": Case(accumulate=2, clip=0.5, guard=FEW),
}


def _two(rank: int, folder) -> dict:
    warnings.simplefilter("ignore")
    alone = {name: runs.run(CASES[name]) for name in list(CASES)[rank::2]}
    for name, case in list(RESUMED.items())[rank::2]:
        alone[name] = runs.run(case, keep_at=2, to=folder / name / "one")
    dist.init_process_group("gloo")
    found = {name: runs.run(case) for name, case in CASES.items()}
    for name, case in RESUMED.items():
        found[name] = runs.run(case, keep_at=2, to=folder / name / "two")
        found[name, "two to two"] = runs.run(case, resume=folder / name / "two")
        found[name, "one to two"] = runs.run(case, resume=folder / name / "one")
    found["free"] = runs.run(CASES["adamw"], guarded=False)
    return {
        "alone": alone,
        "split": found,
        "drawn": _drawn(rank),
        "measured": _measured(),
        "left": _left_whole(),
        "refused": {name: refused(folder) for name, refused in REFUSED.items()},
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> dict:
    """What each of two processes found, and what one alone did."""
    folder = tmp_path_factory.mktemp("two")
    first, second = together(_two, folder)
    alone = first["alone"] | second["alone"]
    for name, case in RESUMED.items():
        alone[name, "two to one"] = runs.run(case, resume=folder / name / "two")
    return {
        "folder": folder,
        "alone": alone,
        "split": (first["split"], second["split"]),
        "both": (first, second),
    }


@pytest.mark.parametrize("name", CASES)
def test_is_kept_off_as_in_one_process(two, name):
    first, second = (found[name] for found in two["split"])
    _check(CASES[name], first, second, two["alone"][name])


def _check(case: Case, first: dict, second: dict, alone: dict) -> None:
    outputs, inputs = runs.through(first)
    assert outputs <= LIMIT and inputs <= LIMIT
    assert first["certificate"]["holds"]
    assert first["certificate"]["through"] == pytest.approx(max(outputs, inputs), rel=0.1)
    assert first["bases"].keys() == alone["bases"].keys()
    for n, W in first["after"].items():
        assert torch.equal(W, second["after"][n])
    assert all(torch.equal(U, second["bases"][n]) for n, U in first["bases"].items())
    assert first["certificate"] == second["certificate"]
    if case.close is None:  # what bf16 draws, and takes in, is a little other
        return
    assert all(U.shape == alone["bases"][n].shape for n, U in first["bases"].items())
    assert runs.distance(alone, first) <= case.close
    assert first["norms"] == pytest.approx(alone["norms"], rel=1e-4)
    for n, module in first["certificate"]["modules"].items():
        was = alone["certificate"]["modules"][n]
        assert module["rank"] == was["rank"]
        if case.accumulate == 1:  # one process alone projects, and counts, each micro-batch
            assert module["blocked"] == pytest.approx(was["blocked"], rel=1e-3, abs=1e-5)


def test_without_a_guard_they_would_fill(two):
    for found in two["split"]:
        assert min(runs.through(found["free"] | {"bases": found["adamw"]["bases"]})) > 0.1


def test_cases_are_what_they_say(two):
    """Parts of uneven size, one without a row, and blocks inside wrappers."""
    first, second = two["split"]
    assert {1, 2} <= set(first["three rows"]["rows"]) | set(second["three rows"]["rows"])
    assert 0 in second["a part without rows"]["rows"]
    for name in ("wrapped", "accelerate, bf16, wrapped"):
        assert any("_checkpoint_wrapped_module" in n for n in first[name]["modules"])
        assert not any("_checkpoint_wrapped_module" in n for n in first[name]["bases"])


def test_what_an_optimizer_shows_later_is_kept_off_too(two):
    found = two["split"][0]["three rows"]
    averages = {n.removesuffix(".weight"): W for n, W in found["averages"].items()}
    held = [n for n in found["bases"] if ".lora_B." in n]
    assert held
    for n in held:
        U, W = found["bases"][n].double(), averages[n].double()
        assert float((U.mT @ W).norm()) <= LIMIT * float(W.norm())


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_bit_for_bit(two, name):
    for found in two["split"]:
        saved, resumed = found[name], found[name, "two to two"]
        assert all(torch.equal(W, resumed["after"][n]) for n, W in saved["after"].items())
        assert saved["certificate"] == resumed["certificate"]


@pytest.mark.parametrize("case", RESUMED)
def test_one_writes_or_each(two, case):
    """A state of the guard is the same whoever writes it."""
    folder = two["folder"] / case / "two"
    for name in ("guard.safetensors", "guard_inputs.safetensors"):
        written = {p.read_bytes() for p in folder.glob(f"**/{name}")}
        assert len(written) == 1 and len(list(folder.glob(f"**/{name}"))) == 3


@pytest.mark.parametrize("way", ["two to one", "one to two"])
@pytest.mark.parametrize("name", RESUMED)
def test_resumed_on_another_number_of_processes(two, name, way):
    saved = two["alone"][name]
    found = (two["alone"] if way == "two to one" else two["split"][0])[name, way]
    assert runs.distance(saved, found | {"before": saved["before"]}) <= 1e-4
    assert found["certificate"]["holds"]
    assert max(runs.through(found | {"before": saved["before"]})) <= LIMIT


def _drawn(rank: int) -> list[list[int]]:
    """Continuations of a process that would draw, and end, otherwise than the other."""
    prompts = [[row[0], *row] for row in PROMPTS][:-1] if rank else PROMPTS
    reference = Reference(runs.sharded(build()), prompts, tokens=40, batch=3, seed=rank)
    rows = zip(reference.ids, reference.mask, strict=True)
    return [row[: int(mask.sum())].tolist() for row, mask in rows]


def test_processes_draw_the_same_and_none_waits(two):
    first, second = (found["drawn"] for found in two["both"])
    assert first == second
    assert len({len(row) for row in first}) > 1 and max(map(len, first)) > 10


def _measured() -> tuple[list, list, list]:
    """Drift gradients of a split model, of the same one whole, and what was in `.grad` after."""
    model, other = runs.lora(), runs.lora()
    reference = Reference(model, PROMPTS, tokens=4)
    for p, q in zip(trainable(model), trainable(other), strict=True):
        p.data.add_(0.1)
        q.data.add_(0.1)
    runs.sharded(model)
    for p in trainable(model):
        p.grad = torch.ones_like(p)
    split, whole = (
        sharding.gradients(lambda m=m: reference.divergence(m, [0, 1]), trainable(m), m)
        for m in (model, other)
    )
    sizes = [len(p.to_local()) for p in trainable(model)]
    start = [dist.get_rank() * -(-len(p) // 2) for p in trainable(model)]
    own = [D[a : a + n] for D, a, n in zip(whole, start, sizes, strict=True)]
    return split, own, [p.grad.to_local() for p in trainable(model)]


def test_drift_gradients_are_those_of_one_process(two):
    for found in two["both"]:
        split, own, kept = found["measured"]
        assert all(float(D.norm()) > 0 for D in split)
        for D, E in zip(split, own, strict=True):
            torch.testing.assert_close(D, E, rtol=1e-3, atol=1e-6)
        assert all(bool((G == 1).all()) for G in kept)


def _left_whole() -> dict:
    """A guard on a model of which passes have left whole weights in the modules."""
    model = runs.sharded(runs.lora(), reshard_after_forward=False)
    optimizer = torch.optim.SGD(trainable(model), lr=0.3)
    rows = {k: runs.own(v) for k, v in batch().items()}

    def look() -> bool:
        with torch.no_grad():
            model(**rows)
        return any(not hasattr(p, "to_local") for p in model.parameters())

    before, left = runs.full(model), look()
    with Guard(model, optimizer=optimizer, **GROWTH) as guard:
        for _ in range(3):
            model(**rows).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        left = left and look()
        certificate = guard.certificate()
    after = runs.full(model)
    found = {"before": before, "after": after, "bases": guard.bases, "transposed": False}
    return found | {"certificate": certificate, "left": left}


def test_whole_weights_left_behind_are_not_taken_for_the_model_s(two):
    for found in two["both"]:
        assert found["left"]["left"] and found["left"]["certificate"]["holds"]
        assert max(runs.through(found["left"])) <= LIMIT


def _attach(model: nn.Module, message: str) -> str:
    with pytest.raises(ValueError, match=message) as refused:
        Guard(model, **GROWTH).attach()
    return str(refused.value)


def _fsdp1(folder) -> list[str]:
    options = {"use_orig_params": True, "device_id": torch.device("cpu")}
    model = FullyShardedDataParallel(runs.lora(), **options)
    return [_attach(m, "FSDP1") for m in (model, model.module)]


def _tensor_parallel(folder) -> list[str]:
    plan = {"model.layers.0.self_attn.q_proj": ColwiseParallel()}
    model = parallelize_module(runs.full_fine_tune(), init_device_mesh("cpu", (2,)), plan)
    return [_attach(model, "q_proj.weight is split over processes by tensor parallelism")]


def _tp_plan(folder) -> list[str]:
    if dist.get_rank() == 0:
        build().save_pretrained(folder / "model")
    dist.barrier()
    model = AutoModelForCausalLM.from_pretrained(folder / "model", tp_plan="auto")
    return [_attach(model, "tensor parallelism")]


def _both(folder) -> list[str]:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("shards", "tensors"))
    plan = {"model.layers.0.self_attn.q_proj": ColwiseParallel()}
    model = parallelize_module(runs.full_fine_tune(), mesh["tensors"], plan)
    return [_attach(runs.sharded(model, mesh=mesh["shards"]), "q_proj.weight is split")]


def _meta(folder) -> list[str]:
    return [_attach(runs.sharded(runs.lora().to("meta")), "meta device; load the weights")]


def _no_sync(folder) -> list[str]:
    """Steps without the gradients of any process: nothing could grow."""
    model = runs.sharded(runs.lora())
    optimizer = torch.optim.SGD(trainable(model), lr=0.3)
    with Guard(model, optimizer=optimizer, **GROWTH):
        model.set_requires_gradient_sync(False)
        model(**batch()).loss.backward()
        with pytest.raises(RuntimeError, match="set_requires_gradient_sync") as refused:
            optimizer.step()
    return [str(refused.value)]


REFUSED = {
    "FSDP1": _fsdp1,
    "tensor parallel": _tensor_parallel,
    "tp_plan": _tp_plan,
    "tensor parallel and FSDP2": _both,
    "meta": _meta,
    "no sync": _no_sync,
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(two, name):
    for found in two["both"]:
        for message in found["refused"][name]:
            assert name in ("meta", "no sync") or "FSDP2" in message and "DeepSpeed" in message


def _four(rank: int, folder) -> dict:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    return {name: runs.run(case) for name, case in HYBRID.items()}


def test_replicas_of_shards(tmp_path):
    """Two replicas, each split over two processes."""
    first, *others = together(_four, tmp_path, count=4)
    for name, case in HYBRID.items():
        alone = runs.run(case)
        for other in others:
            _check(case, first[name], other[name], alone)


def _trainer(folder, resume=None) -> dict:
    args = arguments(
        folder / "out",
        ddp_backend="gloo",
        per_device_train_batch_size=2,
        save_strategy="steps",
        save_steps=3,
    )
    runs.plugin()
    callback = GraspCallback(**GROWTH)
    model = runs.lora()
    trainer = Trainer(model=model, args=args, train_dataset=ROWS, callbacks=[callback])
    before = runs.full(model)
    trainer.train(resume_from_checkpoint=resume)
    return {
        "split": sharding.is_split(trainer.model),
        "before": before,
        "after": runs.full(trainer.model),
        "bases": callback.guard.bases,
        "transposed": False,
    }


def _trained(rank: int, folder) -> dict:
    warnings.simplefilter("ignore")
    whole = _trainer(folder)
    certificate = json.loads((folder / "out" / "grasp.json").read_text())
    again = _trainer(folder, str(folder / "out" / "checkpoint-3"))
    return {"whole": whole, "again": again, "certificate": certificate}


def test_one_line_in_a_trainer(tmp_path):
    """Trained, and resumed from its middle bit for bit, with a certificate of the first process."""
    for found in together(_trained, tmp_path):
        assert found["whole"]["split"]
        assert max(runs.through(found["whole"])) <= LIMIT
        assert found["certificate"]["holds"] and found["certificate"]["divergence"] > 0
        for n, W in found["whole"]["after"].items():
            assert torch.equal(W, found["again"]["after"][n])
