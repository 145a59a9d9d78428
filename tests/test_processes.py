"""Two real processes train copies of one model."""

import json

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from grasp import GraspCallback, Guard
from grasp.bases import inputs
from grasp.model import processes as ranks
from grasp.study import finetune
from grasp.study.settings import Settings
from tests.models import PROMPTS, batch, build, inside, trainable, with_lora
from tests.together import together

GROWTH = {"reference": PROMPTS, "tokens": 4, "read": 0.5, "rank": 2, "refresh": 2, "grow": 1}


def _fit(model, wrap, rows, seed: int = 0, steps: int = 6, **options) -> dict:
    """The weights after a guarded loop on `rows` of each batch, and what lay in the bases."""
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(trainable(model), lr=0.3)  # Adam scales rounding up
    shares = []
    with Guard(wrapped, optimizer=optimizer, seed=seed, **GROWTH | options) as guard:
        for step in range(steps):
            part = {k: v[rows] for k, v in batch(rows=4, seed=step).items()}
            wrapped(**part).loss.backward()
            if step > 0:  # from then on no B is 0
                shares.append(inside(guard))
            torch.nn.utils.clip_grad_norm_(trainable(model), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        leak = guard.leak()
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    through = max(m["through"] for m in leak.values())
    blocked = {n: m["blocked"] for n, m in leak.items()}
    return {"weights": weights, "inside": max(shares), "through": through, "blocked": blocked}


def _averaged(rank: int, folder, seeds, options) -> dict:
    dist.init_process_group("gloo")
    model = with_lora(build())
    rows = slice(2 * rank, 2 * rank + 2)
    return _fit(model, DistributedDataParallel, rows, seed=seeds[rank], **options)


@pytest.mark.parametrize("options", [{}, {"free_rank": 6}])
def test_two_halves_train_as_one_whole(tmp_path, options):
    """Gradients come averaged to the projection, so that nothing of them is left in a basis."""
    first, second = together(_averaged, tmp_path, (0, 0), options)
    alone = _fit(with_lora(build()), lambda m: m, slice(0, 4), **options)
    for name, weight in first["weights"].items():
        torch.testing.assert_close(weight, second["weights"][name], rtol=0, atol=0)
        torch.testing.assert_close(weight, alone["weights"][name], rtol=1e-3, atol=1e-5)
    for found in (first, second):
        assert found["inside"] <= 1e-6
        assert found["through"] <= 1e-6
        assert found["blocked"] == pytest.approx(alone["blocked"], rel=1e-2)  # clipped or not
        assert max(found["blocked"].values()) > 0.1


def test_bases_are_the_first_ranks(tmp_path):
    """Ranks that would draw other continuations, and find other bases, still hold one model."""
    first, second = together(_averaged, tmp_path, (0, 1), {})
    for name, weight in first["weights"].items():
        torch.testing.assert_close(weight, second["weights"][name], rtol=0, atol=0)
    assert max(first["through"], second["through"]) <= 1e-6


def _trainer(rank: int, folder) -> dict:
    from tests.test_trainer import trainer

    options = {"ddp_backend": "gloo", "gradient_accumulation_steps": 2}
    t = trainer(folder / "out", GraspCallback(**GROWTH), **options)
    t.train()
    assert isinstance(t.model_wrapped, DistributedDataParallel)
    return {n: p.detach() for n, p in t.model.named_parameters() if p.requires_grad}


def test_one_line_in_a_trainer_under_two_processes(tmp_path):
    first, second = together(_trainer, tmp_path)
    assert any(float(w.norm()) > 0 for n, w in first.items() if "lora_B" in n)
    for name, weight in first.items():
        torch.testing.assert_close(weight, second[name], rtol=0, atol=0)
    certificate = json.loads((tmp_path / "out" / "grasp.json").read_text())
    assert max(m["through"] for m in certificate["modules"].values()) <= 1e-6


def _refused(rank: int, folder) -> str:
    with pytest.raises(RuntimeError, match="one process") as pipeline:
        finetune.run(Settings(model="m", data="d", output_dir=str(folder / "run")))
    return str(pipeline.value)


def _unsure(rank: int, folder) -> dict:
    """One process finds its bases stable at once, the other never."""
    dist.init_process_group("gloo")
    inputs._is_stable = lambda basis: rank == 1
    model = with_lora(build())
    with Guard(DistributedDataParallel(model), quick=False, **GROWTH) as guard:
        return guard.bases


def test_all_draw_more_where_one_would(tmp_path):
    """Drawing takes all of them, so that one that does not would leave the others waiting."""
    first, second = together(_unsure, tmp_path)
    assert all(torch.equal(V, second[name]) for name, V in first.items()) and first


def test_a_command_is_refused_before_processes_meet(tmp_path):
    """As `torchrun grasp finetune` would."""
    assert all(together(_refused, tmp_path))
    assert not (tmp_path / "run").exists()


def test_one_process_takes_its_own():
    tensors = [torch.ones(2), torch.zeros(3)]
    assert all(a is b for a, b in zip(ranks.from_first(tensors), tensors, strict=True))
    model = build()
    assert ranks.unwrapped(torch.nn.DataParallel(model)) is model
