"""The guard inside `transformers.Trainer` and what is built on it; nothing else imports Trainer."""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from grasp import data
from grasp.bases.subspaces import Subspaces
from grasp.files import read_json, write_json
from grasp.guard.guard import Guard

STATE = "grasp_guard.safetensors"
CERTIFICATE = "grasp.json"


class GraspCallback(TrainerCallback):
    """Guard a fine-tune: `Trainer(..., callbacks=[GraspCallback(subspaces)])`, SFTTrainer too.

    Attaches when training begins, pins the weights after each optimizer step, saves its state with
    every checkpoint and takes it up on resuming, logs `grasp/…`, and leaves a certificate of what
    was blocked, `grasp.json`, in the output folder.

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
        self.subspaces, self.reference, self.options = subspaces, reference, options
        self.guard: Guard | None = None

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if getattr(args, "deepspeed", None):
            raise ValueError(
                "DeepSpeed steps its own flat copies of the weights, which the guard can't pin; "
                "train with DDP, or without DeepSpeed"
            )
        options = self.options
        if self.reference is not None:
            options = {"tokenizer": kwargs.get("processing_class")} | options
        self.guard = Guard(
            model, self.subspaces, optimizer=optimizer, reference=self.reference, **options
        )
        saved = Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE
        if state.global_step > 0 and not saved.exists():
            raise ValueError(
                f"{saved.parent} was saved without a guard; resume it without GraspCallback, or "
                "start anew"
            )
        self.guard.attach(saved if state.global_step > 0 else None)

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.guard.save(Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.guard is None or logs is None:
            return
        modules = self.guard.leak().values()
        logs["grasp/blocked"] = _mean([m["blocked"] for m in modules])
        logs["grasp/through"] = max(m["through"] for m in modules)
        logs["grasp/rank"] = _mean([m["rank"] for m in modules])
        if self.guard.divergences:
            logs["grasp/divergence"] = self.guard.divergences[-1][1]

    def on_train_end(self, args, state, control, **kwargs):
        self.guard.detach()
        if state.is_world_process_zero:
            write_json(Path(args.output_dir) / CERTIFICATE, self.guard.certificate())


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
) -> Trainer:
    """Train in place on encoded rows with AdamW and a constant rate after the warm-up.

    Args:
        rows: from `data.encode`; drawn in an order that `seed` fixes.
        out: folder of checkpoints; the newest there is resumed if `resume`.
        save_every: steps between checkpoints; None keeps none.
        after_step: called with the number of steps done.
        quiet: no progress bar and no log lines.
    """
    arguments = TrainingArguments(
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
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=list(rows),
        processing_class=tokenizer,
        data_collator=lambda batch: data.pad(batch, tokenizer.pad_token_id or 0),
        callbacks=[*callbacks, *([_AfterStep(after_step)] if after_step else [])],
    )
    if quiet:
        trainer.remove_callback(PrinterCallback)
    newest = _newest_whole(Path(out)) if resume and save_every is not None else None
    trainer.train(resume_from_checkpoint=newest and str(newest))
    return trainer


def _newest_whole(out: Path) -> Path | None:
    """The newest checkpoint that was written to its end: the trainer's state comes last."""
    found = sorted(out.glob("checkpoint-*"), key=lambda p: -int(p.name.rsplit("-", 1)[-1]))
    for checkpoint in found:
        try:
            read_json(checkpoint / "trainer_state.json")
        except (FileNotFoundError, ValueError):
            continue
        return checkpoint
    return None


class _AfterStep(TrainerCallback):
    def __init__(self, call: Callable[[int], None]):
        self.call = call

    def on_step_end(self, args, state, control, **kwargs):
        self.call(state.global_step)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
