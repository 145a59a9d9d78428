"""The guard inside `transformers.Trainer` and what is built on it."""

import functools
import os
import sys
import tempfile
import time
import warnings
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import Trainer, TrainerCallback, TrainingArguments

from grasp.bases.subspaces import Subspaces
from grasp.files import write_json
from grasp.guard import evidence
from grasp.guard.certificate import certificate, why
from grasp.guard.frozen import freeze_early
from grasp.guard.guard import Guard
from grasp.guard.record import record
from grasp.progress import speaking

STATE = "grasp_guard.safetensors"
CERTIFICATE = "grasp.json"


class GraspCallback(TrainerCallback):
    """Guard a fine-tune: `Trainer(..., callbacks=[GraspCallback(subspaces)])`, SFTTrainer too.

    Attaches when training begins, pins the weights after each optimizer step, saves its state with
    every checkpoint and takes it up on resuming, logs `grasp/…`, and leaves a certificate of what
    was blocked, `grasp.json`, with what it is checked by elsewhere (`evidence`), in the output
    folder, or in that of each trial of a hyperparameter search. However training ends, the guard
    goes with it.

    Args:
        subspaces: as `Guard`.
        reference: as `Guard`; strings are tokenized with the trainer's tokenizer.
        options: any other argument of `Guard`.
    """

    def __init__(self, subspaces: Subspaces | None = None, *, reference=None, **options):
        if subspaces is None and reference is None:
            raise ValueError(
                "give subspaces (from grasp.discover) or reference (a list of prompts, such as "
                "grasp.default_prompts())"
            )
        reference = list(reference) if isinstance(reference, Iterator) else reference
        self.subspaces, self.reference, self.options = subspaces, reference, options
        self.guard: Guard | None = None
        self.training = False
        """Whether `train` has begun and not ended, so that beginning again goes on."""
        self._began = 0.0

    def on_init_end(self, args, state, control, model=None, **kwargs):
        loop = calling()
        if self.reference is not None and self.options.get("read") != 0 and model is not None:
            freeze_early(model, self.options.get("freeze_inputs"))
        if loop is not None:
            go_first(self, loop.trainer)
            release_at_the_end(self, loop.trainer)

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if (loop := calling()) is not None:
            go_first(self, loop.trainer)
            if release_at_the_end(self, loop.trainer) and loop.run is not None:
                # It joined late: this training's own end is that of what runs it.
                weakref.finalize(loop.run, self.release).atexit = False
        self.release()  # of a training that began before: another batch size, another trial
        options = self.options
        if self.reference is not None:
            options = {"tokenizer": kwargs.get("processing_class")} | options
        before, self.guard = (
            self.guard,
            Guard(model, self.subspaces, optimizer=optimizer, reference=self.reference, **options),
        )
        with _speaking(args):
            if state.global_step > 0:
                self.guard.attach(_saved(args, state, loop))
            elif before is not None and before.is_of(model) and (self.training or before.frozen):
                # Begun again with smaller batches, where the weights had come to; or A is frozen.
                with tempfile.TemporaryDirectory() as folder:
                    self.guard.attach(before.save(Path(folder) / STATE, everyone=True))
            else:
                self.guard.attach()
        self.training, self._began = True, time.monotonic()

    def on_save(self, args, state, control, **kwargs):
        if self.guard.split or state.is_world_process_zero:
            self.guard.save(_folder(args) / f"checkpoint-{state.global_step}" / STATE)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.guard is None or logs is None:
            return
        found = self._measured()
        logs |= found
        # Trainer has written its history already.
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1] |= found

    def on_train_end(self, args, state, control, **kwargs):
        self.guard.gradients.count()
        self.guard.detach()
        if not (self.guard.split or state.is_world_process_zero):
            return
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        if best and (Path(best) / STATE).exists():
            self.guard.judge_by(Path(best) / STATE)  # it was held off the bases that there were
        with _speaking(args):
            found = self.guard.certificate()
        found["weights_sha256"] = evidence.weights_digest(evidence.factors_of(self.guard))
        if not state.is_world_process_zero:
            return
        seconds = time.monotonic() - self._began
        whole = record(found, self.guard, seconds)
        path = write_json(_folder(args) / CERTIFICATE, whole)
        shipped = whole["text"] is not None and whole["text"]["shipped_prompts"]
        evidence.write(path.with_name(evidence.EVIDENCE), self.guard, shipped)
        if not found["holds"]:
            warnings.warn(
                f"the guarantee does not hold for the model that is kept: {why(found)} "
                f"(through: {found['through']}; {path})",
                stacklevel=2,
            )
        elif len(found["unmoved"]) == len(found["modules"]):
            warnings.warn(
                "no guarded weight moved beyond rounding: what is blocked leaves them nothing to "
                "learn, or nothing trained them; give a smaller read or rank, or a larger r",
                stacklevel=2,
            )

    def release(self) -> None:
        """Take the guard off the model, if it is on it."""
        if self.guard is not None:
            self.guard.detach()

    def _measured(self) -> dict[str, float]:
        self.guard.gradients.count()
        uncovered = [*self.guard.watch.uncovered, *self.guard.replaced()]
        found = certificate(self.guard.guarded, self.guard.frozen, uncovered)
        modules = found["modules"].values()
        measured = {
            "grasp/blocked": _mean([m["blocked"] for m in modules]),
            "grasp/through": float("nan") if found["through"] is None else found["through"],
            "grasp/rank": _mean([m["rank"] for m in modules]),
            "grasp/holds": float(found["holds"]),
        }
        if self.guard.divergences:
            measured["grasp/divergence"] = self.guard.divergences[-1][1]
        return measured


def _speaking(args: TrainingArguments):
    """As Trainer's own bars do."""
    return speaking(None if args.disable_tqdm else 0)


class Loop(NamedTuple):
    """What calls a callback, and what its arguments do not say."""

    trainer: Trainer
    resumed_from: str | None
    folder: str  # of all that is kept: a trial of a hyperparameter search has its own
    run: Any  # what `train` calls to train, and lets go of when it ends


def calling() -> Loop | None:
    """The Trainer that is calling, found among the callers; None where another loop calls."""
    trainer, frame = None, sys._getframe(1)
    local = dict.fromkeys(("resume_from_checkpoint", "trial", "inner_training_loop"))
    while frame is not None:
        if trainer is None and isinstance(frame.f_locals.get("self"), Trainer):
            trainer = frame.f_locals["self"]
        for name, found in local.items():
            if found is None:
                local[name] = frame.f_locals.get(name)
        frame = frame.f_back
    if trainer is None:
        return None
    resumed, folder = local["resume_from_checkpoint"], trainer.args.output_dir
    resumed = os.fspath(resumed) if isinstance(resumed, (str, os.PathLike)) else None
    if local["trial"] is not None:
        folder = trainer._get_output_dir(trial=local["trial"])
    return Loop(trainer, resumed, folder, local["inner_training_loop"])


def go_first(callback: TrainerCallback, trainer: Trainer) -> None:
    """Before the reporters: each reports the logs as they are when its turn comes."""
    callbacks = trainer.callback_handler.callbacks
    if callback in callbacks:
        callbacks.remove(callback)
        callbacks.insert(0, callback)


def release_at_the_end(callback: GraspCallback, trainer: Trainer) -> bool:
    """Trainer gives callbacks no word of an exception, so `train` is made to end with a release.

    Returns:
        Whether it was not made so before.
    """
    train = trainer.train
    if getattr(train, "releases", None) is callback:
        return False

    @functools.wraps(train)
    def released(*args, **kwargs):
        callback.training = False
        try:
            return train(*args, **kwargs)
        finally:
            callback.training = False
            callback.release()
            if getattr(trainer, "hp_search_backend", None) is not None:
                callback.guard = None  # or a trial's model stays beside the next one's

    released.releases = callback
    trainer.train = released
    return True


def _folder(args) -> Path:
    """Where the Trainer that is calling keeps what it trains."""
    loop = calling()
    return Path(args.output_dir if loop is None else loop.folder)


def _saved(args, state, loop: Loop | None) -> Path:
    """The guard's state in the checkpoint that is resumed.

    Raises:
        ValueError: it is not there; says where it was looked for.
    """
    folder = loop.resumed_from if loop is not None else None
    folder = Path(folder or Path(args.output_dir) / f"checkpoint-{state.global_step}")
    if not (folder / STATE).exists():
        raise ValueError(
            f"{folder} was saved without a guard (no {STATE} there), or was cut off while it was "
            "saved; resume an earlier checkpoint, or this one without GraspCallback"
        )
    return folder / STATE


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
