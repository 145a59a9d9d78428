"""A fine-tune of encoded rows by `transformers.Trainer`, shown while it lasts."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from grasp import data
from grasp.files import read_json
from grasp.guard.trainer import STATE, GraspCallback
from grasp.model.noise import saved_unasked
from grasp.progress import Stage, speaking, tell

PADS = {"labels": data.IGNORED}  # all else is padded by 0
TOKENS = 1024  # of the rows that a processor takes at a time: with more it is no faster


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
        trainer = _InPieces(
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


class _InPieces(Trainer):
    """On a processor the rows of a batch go through a few at a time, the shortest first.

    The loss is over all learned tokens of a step, so that the sum of the pieces' losses, and of
    their gradients, is the batch's. What is kept for the backward pass, and the logits, which are
    as wide as the vocabulary, are one piece's.
    """

    def training_step(self, model, inputs, num_items_in_batch=None):
        if num_items_in_batch is None or inputs["input_ids"].device.type != "cpu":
            return super().training_step(model, inputs, num_items_in_batch)
        losses = [
            super(_InPieces, self).training_step(model, piece, num_items_in_batch)
            for piece in pieces(inputs, TOKENS)
        ]
        return torch.stack(losses).sum()


def pieces(batch: Mapping[str, Tensor], tokens: int) -> Iterator[dict[str, Tensor]]:
    """The rows of a right-padded batch, by length, in pieces of at most `tokens`, or of one row.

    A piece is as wide as its longest row, or up to an eighth wider: for each shape that comes up
    PyTorch keeps what it prepared for it, which adds up where lengths are all different.

    Args:
        batch: `input_ids`, `attention_mask` and `labels`, `[rows, longest]`.
    """
    lengths = batch["attention_mask"].sum(1).tolist()
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    while order:
        taken = 1
        while taken < len(order) and (taken + 1) * _width(lengths[order[taken]]) <= tokens:
            taken += 1
        rows, order = order[:taken], order[taken:]
        longest = lengths[rows[-1]]
        more = (0, _width(longest) - longest)
        yield {
            name: functional.pad(of[rows, :longest], more, value=PADS.get(name, 0))
            for name, of in batch.items()
        }


def _width(longest: int) -> int:
    """Of eight widths between a power of two and the next, the least that holds so many."""
    step = 1 << max(0, longest.bit_length() - 4)
    return -(-longest // step) * step


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
