"""However a training ends, the certificate is of the model that is kept and no guard is left."""

import json
import math
import types
import warnings

import pytest
import torch
from transformers import Trainer, TrainerCallback

import grasp
from grasp.guard.trainer import CERTIFICATE, STATE
from tests.models import PROMPTS, build, subspaces, trainable, with_lora
from tests.test_guarantee import deltas, through
from tests.test_trainer import ROWS, arguments


def callback(**options):
    chosen = {"reference": PROMPTS, "tokens": 2, "every": 1, "refresh": 2, "rank": 4}
    return grasp.GraspCallback(**(chosen | options))


def trainer(out, *callbacks, model=None, kind=Trainer, **options) -> Trainer:
    args = arguments(out, **options)
    chosen = model or with_lora(build())
    return kind(model=chosen, args=args, train_dataset=ROWS, callbacks=list(callbacks))


def hooks(model) -> int:
    return sum(len(p._post_accumulate_grad_hooks or {}) for p in model.parameters())


class Stops(TrainerCallback):
    def __init__(self, at: int, error: type[BaseException]):
        self.at, self.error = at, error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            self.at = -1
            raise self.error("stopped")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
def test_no_guard_is_left_behind_and_the_run_goes_on_as_if_unbroken(tmp_path, error):
    def run(name, *others):
        options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 9}
        return trainer(tmp_path / name, callback(), *others, learning_rate=3e-2, **options)

    whole = run("whole")
    whole.train()
    broken = run("broken", Stops(5, error))
    with pytest.raises(error):
        broken.train()
    assert hooks(broken.model) == 0
    broken.train(resume_from_checkpoint=True)
    assert hooks(broken.model) == 0
    for a, b in zip(trainable(whole.model), trainable(broken.model), strict=True):
        assert torch.equal(a, b)


def test_a_second_training_begins_where_the_first_ended(tmp_path):
    hold = callback()
    t = trainer(tmp_path, hold, model=with_lora(build(), r=8))
    t.train()
    before = deltas(t.model)
    with pytest.warns(UserWarning, match="merge it and start a fresh LoRA"):
        t.train()
    after = deltas(t.model)
    assert through(hold.guard, before, after) <= 2e-6
    assert max(float((after[n] - before[n]).norm() / W.norm()) for n, W in after.items()) > 1e-2
    assert json.loads((tmp_path / CERTIFICATE).read_text())["holds"]
    assert hooks(t.model) == 0


class NotANumber(Trainer):
    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * math.nan if self.state.global_step == 3 else loss


@pytest.mark.parametrize("make", [callback, lambda: grasp.GraspCallback(subspaces())])
def test_weights_that_are_no_numbers_are_never_certified(tmp_path, make):
    t = trainer(tmp_path, make(), kind=NotANumber, max_grad_norm=0.0)
    with pytest.warns(UserWarning, match="does not hold.*NaN or infinite.*learning rate"):
        t.train()
    found = json.loads((tmp_path / CERTIFICATE).read_text())
    assert found["holds"] is False and found["finite"] is False and found["through"] is None
    assert t.state.log_history[-1]["grasp/holds"] == 0


class Averaged(TrainerCallback):
    """Puts other weights into the model at the end, as an average that nobody pinned would."""

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            for p in trainable(model):
                p += 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))


def test_the_certificate_is_of_the_model_that_is_kept(tmp_path):
    before = None
    hold = callback()
    t = trainer(tmp_path, hold, Averaged())
    before = deltas(t.model)
    with pytest.warns(UserWarning, match="does not hold for the model that is kept"):
        t.train()
    found = json.loads((tmp_path / CERTIFICATE).read_text())
    assert found["holds"] is False
    assert found["through"] == pytest.approx(through(hold.guard, before, deltas(t.model)), rel=1e-3)


def test_resumes_wherever_the_checkpoint_lies_and_says_where_it_looked(tmp_path):
    first = trainer(tmp_path / "run", callback(), save_strategy="steps", save_steps=3)
    first.train()
    moved = tmp_path / "elsewhere" / "named"
    moved.parent.mkdir()
    (tmp_path / "run" / "checkpoint-3").rename(moved)
    again = trainer(tmp_path / "other", callback())
    again.train(resume_from_checkpoint=str(moved))
    for a, b in zip(trainable(first.model), trainable(again.model), strict=True):
        assert torch.equal(a, b)
    (moved / STATE).unlink()
    with pytest.raises(ValueError, match="named was saved without a guard"):
        trainer(tmp_path / "third", callback()).train(resume_from_checkpoint=str(moved))


class RunsOut(Trainer):
    """Runs out of memory once, in the third step."""

    def training_step(self, *args, **kwargs):
        self.count = getattr(self, "count", 0) + 1
        if self.count == 3:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return super().training_step(*args, **kwargs)


def test_begun_again_with_smaller_batches_is_held_from_the_first_start(tmp_path):
    hold = callback()
    t = trainer(tmp_path, hold, kind=RunsOut, auto_find_batch_size=True, max_steps=8)
    before = deltas(t.model)
    t.train()
    assert t.count > 8 and hooks(t.model) == 0
    assert through(hold.guard, before, deltas(t.model)) <= 1e-6
    assert json.loads((tmp_path / CERTIFICATE).read_text())["holds"]


def test_a_path_is_resumed_as_its_string_is(tmp_path):
    first = trainer(tmp_path / "run", callback(), save_strategy="steps", save_steps=3)
    first.train()
    again = trainer(tmp_path / "other", callback())
    again.train(resume_from_checkpoint=tmp_path / "run" / "checkpoint-3")
    for a, b in zip(trainable(first.model), trainable(again.model), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("trained", [False, True])
def test_a_callback_that_joins_late_leaves_too(tmp_path, trained):
    t = trainer(tmp_path)
    t.add_callback(callback())
    if trained:
        t.train()
    t.add_callback(Stops(2, RuntimeError))
    try:
        t.train()
    except RuntimeError:
        pass
    assert hooks(t.model) == 0


class Rebinds(Trainer):
    """Puts a `train` of its own in the place of what the callback put there, as Unsloth's do."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.train = types.MethodType(type(self).train, self)


def test_a_trainer_that_rebinds_its_training_lets_go_too(tmp_path):
    hold = callback()
    model = with_lora(build(), r=8)
    t = trainer(tmp_path, hold, Stops(2, RuntimeError), model=model, kind=Rebinds)
    with pytest.raises(RuntimeError):
        t.train()
    assert hooks(t.model) == 0
    before = deltas(t.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        t.train()
    assert hooks(t.model) == 0 and through(hold.guard, before, deltas(t.model)) <= 2e-6


def test_a_training_that_moved_nothing_is_told(tmp_path):
    t = trainer(
        tmp_path, callback(rank=3), model=with_lora(build(), init_lora_weights="orthogonal")
    )
    with pytest.warns(UserWarning, match="no guarded weight moved beyond rounding.*larger r"):
        t.train()
    found = json.loads((tmp_path / CERTIFICATE).read_text())
    assert found["holds"] and len(found["unmoved"]) == 28
