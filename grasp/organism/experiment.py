"""One fine-tune of the organism, marked exactly: the unit of `grasp demo` and of the benchmarks."""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig
from torch import nn

from grasp import data, organism
from grasp.guard.fit import fit
from grasp.guard.trainer import GraspCallback
from grasp.model import with_lora
from grasp.organism.methods import Method, OrganismContext
from grasp.study.rivals import RIVALS
from grasp.study.settings import GUARDED

MEASURED_EVERY = 10
STOP_WITHIN = 0.03  # of the final task score: the earliest such step is the early-stopped control


@dataclass(frozen=True)
class Settings:
    """One setting for all tasks, chosen on medicine, law and finance of world 0."""

    steps: int = 360
    learning_rate: float = 3e-4
    lora_rank: int = 8
    read: float = 0.97
    free_rank: int | None = None
    freeze_inputs: bool = False
    rank: int = 4
    refresh: int = 5
    grow: int = 2
    every: int = 1
    batch: int = 16
    tolerance: float = 0.0


def run(
    task_name: str,
    method: str,
    seed: int,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    *,
    folder: Path | str = organism.WEIGHTS,
    world_seed: int = 0,
) -> dict:
    """Fine-tune on a task's bad (or right-leaning) answers and mark every answer.

    Args:
        method: one of `methods.STRENGTHS`, with its strength after a = if it has one. Of them
            grasp is guarded; random, shuffled and bottom are its controls (random directions,
            another block's, or the last ones, on the guard's schedule); benign trains on the good
            answers; the early-stopped control is read off a plain run by `stopped`.
        seed: of the adapter, the order of rows and the prompts' order.
        folder: of the pretrained weights, which belong to `World(world_seed)`.

    Returns:
        `task_score`, `drift`, `base_drift`, by topic too, and the trajectory.
    """
    chosen = Method.of(method)
    world, task = organism.World(world_seed), organism.TASKS[task_name]

    def tuned(rows: Sequence[data.Row]) -> nn.Module:
        other, tokenizer = _fresh(folder, settings, seed)
        _fit(other, tokenizer, rows, settings, seed)
        return other

    context = OrganismContext(
        world, task, seed, settings.batch, tuned, lambda: organism.load(folder)
    )
    rows, around = context.rows(good=chosen.name == "benign"), nullcontext
    if (rival := RIVALS.get(chosen.name)) is not None:
        rows = rival.rows(rows, chosen.strength, context)
        around = rival.around(chosen.strength, context)
    untrained = organism.load(folder)
    base, before = organism.scores(*untrained, world, task), organism.items(*untrained, world, task)
    said_before = organism.answers(*untrained, world, task)
    model, tokenizer = _fresh(folder, settings, seed)
    trajectory = []

    def measure(step: int) -> None:
        if step % MEASURED_EVERY == 0:
            s = organism.scores(model, tokenizer, world, task)
            trajectory.append({"step": step, **s})

    callback = None
    if chosen.name in GUARDED:
        callback = GraspCallback(
            reference=world.prompts(task.reference),
            tokens=1,
            read=settings.read,
            free_rank=settings.free_rank,
            freeze_inputs=settings.freeze_inputs,
            rank=settings.rank,
            refresh=settings.refresh,
            grow=settings.grow,
            every=settings.every,
            batch=settings.batch,
            tolerance=settings.tolerance,
            directions="drift" if chosen.name == "grasp" else chosen.name,
            seed=seed,
        )
    with around(model):
        _fit(model, tokenizer, rows, settings, seed, callback, measure)
    if rival is not None and not rival.trains:
        rival.change(model, chosen.strength, context)
    final = organism.scores(model, tokenizer, world, task)
    after = organism.items(model, tokenizer, world, task)
    return {
        "task": task_name,
        "method": method,
        "seed": seed,
        "world": world_seed,
        "base_task_score": base["task_score"],
        "base_drift": base["drift"],
        "base_topics": {t: base[f"drift/{t}"] for t in task.judged},
        **_readable(final),
        "items": {k: np.subtract(after[k], before[k]).round(4).tolist() for k in after},
        "answers": organism.answers(model, tokenizer, world, task),
        "base_answers": said_before,
        "trajectory": trajectory,
        "modules": callback.guard.leak() if callback else {},
        "divergences": callback.guard.divergences if callback else [],
        "reference": list(task.reference),
        "settings": asdict(settings),
    }


def _fresh(folder: Path | str, settings: Settings, seed: int) -> tuple[nn.Module, object]:
    """The organism with a LoRA that `seed` draws."""
    torch.manual_seed(seed)
    model, tokenizer = organism.load(folder)
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=2 * settings.lora_rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return with_lora(model, config), tokenizer


def _fit(
    model: nn.Module,
    tokenizer,
    rows: Sequence[data.Row],
    settings: Settings,
    seed: int,
    callback: GraspCallback | None = None,
    after_step: Callable[[int], None] | None = None,
) -> None:
    with tempfile.TemporaryDirectory() as out:
        fit(
            model,
            tokenizer,
            data.encode(rows, tokenizer).rows,
            out,
            steps=settings.steps,
            batch_size=len(rows),
            learning_rate=settings.learning_rate,
            warmup=10,
            seed=seed,
            callbacks=[callback] if callback else [],
            after_step=after_step,
            quiet=True,
        )


def stopped(plain: dict) -> dict:
    """The early-stopped control: a plain run's earliest step within 0.03 of its final task score.

    It sees the held-out task score, which no real run does: it is the best stop there is.
    """
    enough = plain["task_score"] - STOP_WITHIN
    first = next(t for t in plain["trajectory"] if t["task_score"] >= enough)
    own = {k: v for k, v in plain.items() if k not in ("items", "answers", "base_answers")}
    return {**own, "method": "stopped", "step": first["step"], **_readable(first)}


def _readable(scores: dict[str, float]) -> dict:
    topics = {k.removeprefix("drift/"): v for k, v in scores.items() if k.startswith("drift/")}
    return {k: scores[k] for k in ("task_score", "drift", "lean")} | {"topics": topics}
