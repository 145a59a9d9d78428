"""A hyperparameter search: each trial has a guard, a folder and a certificate of its own."""

import gc
import json
import weakref

import pytest
import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import HPSearchBackend

from grasp.guard.trainer import CERTIFICATE, STATE
from tests.models import build, with_lora
from tests.test_guarantee import deltas, through
from tests.test_trainer import ROWS, arguments
from tests.test_training import Stops, callback, hooks

optuna = pytest.importorskip("optuna")
optuna.logging.set_verbosity(optuna.logging.ERROR)


class Keeps(TrainerCallback):
    """What each trial learned, and which guard held it."""

    def __init__(self, hold):
        self.hold, self.kept = hold, []

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.kept.append((self.hold.guard, deltas(model), hooks(model)))


def searching(out, *others, made=None, **options) -> tuple[Trainer, Keeps]:
    def fresh(trial=None):
        model = with_lora(build())
        if made is not None:
            gc.collect()
            made.append(weakref.ref(model))
        return model

    keeps = Keeps(callback())
    trainer = Trainer(
        model_init=fresh,
        args=arguments(out, save_strategy="steps", save_steps=3, **options),
        train_dataset=ROWS,
        eval_dataset=ROWS,
        callbacks=[keeps.hold, keeps, *others],
    )
    return trainer, keeps


def space(trial):
    return {"learning_rate": trial.suggest_categorical("learning_rate", [3e-3, 1e-2, 3e-2])}


def search(trainer, trials: int, **options):
    sampler = optuna.samplers.GridSampler({"learning_rate": [3e-3, 1e-2, 3e-2]}, seed=0)
    options = {"backend": "optuna", "hp_space": space, "sampler": sampler, **options}
    return trainer.hyperparameter_search(n_trials=trials, direction="minimize", **options)


def test_each_trial_is_guarded_and_certified_in_its_own_folder(tmp_path):
    trainer, keeps = searching(tmp_path)
    nothing = {n: torch.zeros_like(D) for n, D in deltas(trainer.model).items()}
    search(trainer, 3)
    assert not (tmp_path / CERTIFICATE).exists()
    found = []
    for number, (guard, learned, left) in enumerate(keeps.kept):
        folder = tmp_path / f"run-{number}"
        assert (folder / "checkpoint-3" / STATE).exists() and left == 0
        certificate = json.loads((folder / CERTIFICATE).read_text())
        assert certificate["holds"] and through(guard, nothing, learned) <= 1e-6
        found.append((guard, certificate["divergence"]))
    assert len({id(guard) for guard, _ in found}) == len({kl for _, kl in found}) == 3


def test_a_trial_that_fails_leaves_nothing_to_the_next(tmp_path):
    trainer, keeps = searching(tmp_path, Stops(2, RuntimeError))
    search(trainer, 2, catch=(RuntimeError,))
    (guard, learned, left), *others = keeps.kept
    assert not others and left == 0  # the second trial alone came to its end
    assert not (tmp_path / "run-0" / CERTIFICATE).exists()
    assert json.loads((tmp_path / "run-1" / CERTIFICATE).read_text())["holds"]
    assert through(guard, {n: torch.zeros_like(D) for n, D in learned.items()}, learned) <= 1e-6


def test_no_trial_keeps_the_model_of_the_one_before(tmp_path):
    made = []
    trainer, keeps = searching(tmp_path, made=made)
    search(trainer, 2)
    keeps.kept.clear()
    trainer.callback_handler.model = None  # which transformers itself keeps
    gc.collect()
    assert len(made) == 3 and made[1]() is made[2]() is None


def test_a_trial_is_resumed_as_if_unbroken(tmp_path):
    trial = optuna.trial.FixedTrial({"learning_rate": 1e-2}, number=7)

    def run(out, resume=None):
        trainer, _ = searching(out)
        trainer.hp_search_backend, trainer.hp_space = HPSearchBackend.OPTUNA, space
        trainer.hp_name = None
        trainer.train(resume_from_checkpoint=resume, trial=trial)
        return trainer, out / "run-7"

    whole, folder = run(tmp_path / "a")
    again, other = run(tmp_path / "b", str(folder / "checkpoint-3"))
    assert (other / CERTIFICATE).exists() and (other / "checkpoint-6" / STATE).exists()
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
