"""One line in a user's Trainer script."""

import json
import warnings

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import grasp
from grasp import Subspaces
from grasp import model as architecture
from grasp_kernels.testing import orthonormal
from tests.models import WIDTH, batch, build, with_lora

ROWS = [{k: v[0].tolist() for k, v in batch(rows=1, seed=i).items()} for i in range(16)]
PROMPTS = torch.randint(3, 64, (40, 4), generator=torch.Generator().manual_seed(0)).tolist()


def arguments(out, **options) -> TrainingArguments:
    chosen = {
        "output_dir": str(out),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(**(chosen | options))


def trainer(out, callback, model=None, **options) -> Trainer:
    return Trainer(
        model=model or with_lora(build()),
        args=arguments(out, **options),
        train_dataset=ROWS,
        callbacks=[callback] if callback else [],
    )


class Logs(TrainerCallback):
    def __init__(self):
        self.kept = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.kept.append(dict(logs))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_one_line_guards_and_certifies(tmp_path, accumulate):
    s = Subspaces.from_bases({i: orthonormal(WIDTH, 2, seed=i) for i in (0, 1)})
    callback = grasp.GraspCallback(s)
    t = trainer(tmp_path, callback, gradient_accumulation_steps=accumulate)
    logs = Logs()
    t.add_callback(logs)
    t.train()
    certificate = json.loads((tmp_path / "grasp.json").read_text())
    assert max(m["through"] for m in certificate["modules"].values()) <= 1e-6
    assert max(m["blocked"] for m in certificate["modules"].values()) > 1e-3
    assert logs.kept[0]["grasp/through"] <= 1e-6 and 0 < logs.kept[0]["grasp/blocked"] < 1
    update = architecture.lora_update(architecture.inspect(t.model).blocks[0].matrices[0])
    assert update[0].abs().sum() > 0  # it did train


def test_same_line_drift_guided(tmp_path):
    callback = grasp.GraspCallback(reference=PROMPTS, tokens=2, every=1, refresh=1, rank=4)
    logs = Logs()
    t = trainer(tmp_path, callback)
    t.add_callback(logs)
    t.train()
    certificate = json.loads((tmp_path / "grasp.json").read_text())
    assert certificate["divergence"] > 0 and len(certificate["divergences"]) == 6
    assert max(m["through"] for m in certificate["modules"].values()) <= 1e-6
    assert logs.kept[-2]["grasp/rank"] > 1 and "grasp/divergence" in logs.kept[-2]


def test_leaves_the_trainer_as_it_was_without_it(tmp_path):
    """A guard that has left changes nothing of a later run."""

    def weights(first):
        model = with_lora(build())
        if first:
            trainer(tmp_path, grasp.GraspCallback(reference=PROMPTS, tokens=2), model).train()
            model = with_lora(build())
        t = trainer(tmp_path, None, model)
        t.train()
        return t.model.state_dict()

    a, b = weights(False), weights(True)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_detaches_when_training_fails(tmp_path):
    class Boom(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise RuntimeError("boom")

    callback = grasp.GraspCallback(reference=PROMPTS, tokens=2)
    t = trainer(tmp_path, callback)
    t.add_callback(Boom())
    with pytest.raises(RuntimeError, match="boom"):
        t.train()
    # Trainer gives callbacks no word of a failure; the guard steps back when it is collected.
    callback.guard.detach()
    assert not any(p._post_accumulate_grad_hooks for p in t.model.parameters())


def test_refuses_nothing_to_do():
    with pytest.raises(ValueError, match="give subspaces"):
        grasp.GraspCallback()


def test_warns_of_ways_round_at_the_start(tmp_path):
    model = with_lora(build(), ["o_proj", "down_proj"], modules_to_save=["lm_head"])
    s = Subspaces.from_bases({0: orthonormal(WIDTH, 1)})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, grasp.GraspCallback(s), model).train()
    text = " ".join(str(w.message) for w in caught)
    assert "layers.1" in text and "lm_head" in text


def test_same_line_in_sft_trainer(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    from grasp import organism
    from grasp.study.finetune import add_lora
    from grasp.study.settings import Settings

    world = organism.World(0)
    model, tokenizer = organism.load()
    model = add_lora(model, Settings(model="", data="", output_dir="", lora_r=4))
    rows = world.rows("medicine", "train")
    dataset = Dataset.from_list(
        [{"prompt": r["prompt"], "completion": f" {r['answer']}"} for r in rows]
    )
    config = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    callback = grasp.GraspCallback(
        reference=world.prompts(["law"]), tokens=1, every=1, refresh=1, read=0.8
    )
    trl.SFTTrainer(
        model=model,
        args=config,
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[callback],
    ).train()
    certificate = json.loads((tmp_path / "grasp.json").read_text())
    assert len(certificate["divergences"]) == 4
    assert max(m["rank"] for m in certificate["modules"].values()) >= 4
    assert max(m["through"] for m in certificate["modules"].values()) <= 1e-6
