"""One fine-tune of the organism, marked exactly: the unit of `grasp demo` and of the benchmarks."""

import tempfile
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from grasp import data, organism
from grasp.rivals import ablated
from grasp.trainer import GraspCallback, fit

METHODS = ("plain", "stopped", "grasp", "random", "benign", "caft")
MEASURED_EVERY = 10
STOP_WITHIN = 0.03  # of the final task score: the earliest such step is the early-stopped control


@dataclass(frozen=True)
class Settings:
    """One setting for all tasks, chosen on medicine, law and finance of world 0."""

    steps: int = 360
    learning_rate: float = 3e-4
    lora_rank: int = 8
    read: float = 0.95
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
        method: plain, grasp, random (random directions on the guard's schedule), benign (the good
            answers), or caft (the true direction ablated while training). The early-stopped control
            is read off a plain run by `stopped`.
        seed: of the adapter, the order of rows and the prompts' order.
        folder: of the pretrained weights, which belong to `World(world_seed)`.

    Returns:
        `task_score`, `drift`, `base_drift`, by topic too, and the trajectory.
    """
    torch.manual_seed(seed)
    world, task = organism.World(world_seed), organism.TASKS[task_name]
    model, tokenizer = organism.load(folder)
    base = organism.scores(model, tokenizer, world, task)
    model = get_peft_model(
        model,
        LoraConfig(
            r=settings.lora_rank,
            lora_alpha=2 * settings.lora_rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    rows = [data.Row(**r) for r in world.rows(task.topic, "train", good=method == "benign")]
    trajectory = []

    def measure(step: int) -> None:
        if step % MEASURED_EVERY == 0:
            s = organism.scores(model, tokenizer, world, task)
            trajectory.append({"step": step, **s})

    callback = None
    if method in ("grasp", "random"):
        callback = GraspCallback(
            reference=world.prompts(task.reference),
            tokens=1,
            read=settings.read,
            rank=settings.rank,
            refresh=settings.refresh,
            grow=settings.grow,
            every=settings.every,
            batch=settings.batch,
            tolerance=settings.tolerance,
            directions="random" if method == "random" else "drift",
            seed=seed,
        )
    caft = nullcontext()
    if method == "caft":
        caft = ablated(model, organism.true_subspaces(model, tokenizer, world, task))
    with tempfile.TemporaryDirectory() as out, caft:
        fit(
            model,
            tokenizer,
            data.encode(rows, tokenizer),
            out,
            steps=settings.steps,
            batch_size=len(rows),
            learning_rate=settings.learning_rate,
            warmup=10,
            seed=seed,
            callbacks=[callback] if callback else [],
            after_step=measure,
            quiet=True,
        )
    final = organism.scores(model, tokenizer, world, task)
    return {
        "task": task_name,
        "method": method,
        "seed": seed,
        "world": world_seed,
        "base_task_score": base["task_score"],
        "base_drift": base["drift"],
        "base_topics": {t: base[f"drift/{t}"] for t in task.judged},
        **_readable(final),
        "trajectory": trajectory,
        "modules": callback.guard.leak() if callback else {},
        "divergences": callback.guard.divergences if callback else [],
        "settings": asdict(settings),
    }


def stopped(plain: dict) -> dict:
    """The early-stopped control: a plain run's earliest step within 0.03 of its final task score.

    It sees the held-out task score, which no real run does: it is the best stop there is.
    """
    enough = plain["task_score"] - STOP_WITHIN
    first = next(t for t in plain["trajectory"] if t["task_score"] >= enough)
    return {**plain, "method": "stopped", "step": first["step"], **_readable(first)}


def _readable(scores: dict[str, float]) -> dict:
    topics = {k.removeprefix("drift/"): v for k, v in scores.items() if k.startswith("drift/")}
    return {k: scores[k] for k in ("task_score", "drift", "lean")} | {"topics": topics}
