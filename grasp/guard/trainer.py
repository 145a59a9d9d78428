"""The guard inside `transformers.Trainer` and what is built on it; nothing else imports Trainer."""

import dataclasses
import functools
import os
import sys
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from grasp import data
from grasp.bases.subspaces import Subspaces
from grasp.files import read_json, write_json
from grasp.guard import evidence
from grasp.guard.certificate import certificate, why
from grasp.guard.frozen import freeze_early
from grasp.guard.guard import Guard
from grasp.guard.record import record
from grasp.model.noise import saved_unasked
from grasp.progress import Stage, speaking, tell

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


def fit(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, list[int]]],
    out: Path | str,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    accumulate: int = 1,
    warmup: int = 0,
    save_every: int | None = None,
    resume: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
    after_step: Callable[[int], None] | None = None,
    quiet: bool = False,
    checkpointing: bool = False,
    arguments: Mapping[str, Any] | None = None,
) -> Trainer:
    """Train in place on encoded rows with AdamW, at a constant rate after the warm-up by default.

    Args:
        rows: from `data.encode`; drawn in an order that `seed` fixes.
        out: folder of checkpoints; the newest there is resumed if `resume`.
        save_every: steps between checkpoints; None keeps none.
        after_step: called with the number of steps done.
        quiet: no progress bar and no log lines.
        checkpointing: of activations, which takes less memory and more time.
        arguments: what else, or otherwise, `TrainingArguments` is told.
    """
    chosen: dict[str, Any] = dict(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulate,
        learning_rate=learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=warmup,
        weight_decay=0.0,
        seed=seed,
        data_seed=seed,
        save_strategy="no" if save_every is None else "steps",
        save_steps=save_every or 500,
        save_total_limit=2,
        logging_strategy="no" if quiet else "steps",
        logging_steps=max(1, steps // 10),
        report_to="none",
        disable_tqdm=quiet,
        remove_unused_columns=False,
        use_cpu=next(model.parameters()).device.type == "cpu",
    )
    if checkpointing:
        known = {f.name for f in dataclasses.fields(TrainingArguments)}
        name = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in known)
        chosen |= {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    shown = _Shown()
    with speaking(None if quiet else 0), Stage("Setting up training"):
        told = TrainingArguments(**chosen | dict(arguments or {}))
        told._n_gpu = min(told.n_gpu, 1)  # of several it would make a batch of each, unasked
        trainer = Trainer(
            model=model,
            args=told,
            train_dataset=list(rows),
            processing_class=tokenizer,
            data_collator=lambda batch: data.pad(batch, tokenizer.pad_token_id or 0),
            callbacks=[*callbacks, *([_AfterStep(after_step)] if after_step else []), shown],
        )
    trainer.remove_callback(PrinterCallback if quiet else DEFAULT_PROGRESS_CALLBACK)
    guarded = any(isinstance(c, GraspCallback) for c in callbacks)
    newest = None
    if resume and save_every is not None:  # one without a guard's state is refused, if it is alone
        newest = (guarded and newest_whole(Path(out), guarded=True)) or newest_whole(Path(out))
    with speaking(None if quiet else 0), saved_unasked(model), shown:
        trainer.train(resume_from_checkpoint=newest and str(newest))
    return trainer


def newest_whole(out: Path, guarded: bool = False) -> Path | None:
    """The newest checkpoint that was written to its end: the trainer's state, then a guard's."""
    found = sorted(out.glob("checkpoint-*"), key=lambda p: -int(p.name.rsplit("-", 1)[-1]))
    for checkpoint in found:
        try:
            read_json(checkpoint / "trainer_state.json")
        except (FileNotFoundError, ValueError):
            continue
        if not guarded or (checkpoint / STATE).exists():
            return checkpoint
    return None


class _AfterStep(TrainerCallback):
    def __init__(self, call: Callable[[int], None]):
        self.call = call

    def on_step_end(self, args, state, control, **kwargs):
        self.call(state.global_step)


class _Shown(TrainerCallback):
    """Training as a stage that is shown, and what is logged as lines."""

    def __init__(self):
        self.stage: Stage | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error) -> None:
        """Training ended, whatever it ended by."""
        if self.stage is not None:
            self.stage.__exit__(*error)
            self.stage = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.stage = Stage("Training", state.max_steps, "steps", state.global_step).__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        self.stage.done = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            tell(_in_words(state.global_step, logs))
        elif "train_runtime" in (logs or {}):  # the last: what else is to be done is not training
            self.__exit__(None, None, None)


def _in_words(step: int, logs: Mapping[str, float]) -> str:
    """A line of the log."""
    said = f"Step {step}: loss {logs['loss']:.4g}"
    if "learning_rate" in logs:
        said += f", learning rate {logs['learning_rate']:.2g}"
    if "grasp/blocked" in logs:
        said += f", {logs['grasp/blocked']:.0%} of the gradient blocked"
    if "grasp/divergence" in logs:
        said += f", moved elsewhere by {logs['grasp/divergence']:.2g} nats"
    return said


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
