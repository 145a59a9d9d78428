"""Inputs of large models on the organism: tracked, few directions left free, and A frozen.

    python benchmarks/bench_frozen.py --choose
    python benchmarks/bench_frozen.py --aside FOLDER

The first tries ranks and rates, and how many directions are left free, on medicine, law and finance
of world 0, with seeds that the second does not use. The second takes the tasks of world 0 and, with
its weights, of world 1, with the seeds 0, 1, 2: plain, tracked, few left free, as many random ones
(control), and frozen. One run a line; what is there already is not run again.
"""

import argparse
import json
import platform
import sys
from itertools import product
from pathlib import Path

import torch

from grasp import organism
from grasp.files import write_text
from grasp.organism.experiment import Settings
from grasp.organism.sweep import sweep
from grasp.study.report import versions

TRIED = ("medicine", "law", "finance")
WORLD_0 = ("code", "medicine", "finance", "law", "travel")
WORLD_1 = ("code", "medicine", "finance", "travel")
FREE = {"free_rank": 64}
FROZEN = {"freeze_inputs": True, "lora_rank": 16, "learning_rate": 1e-3, "read": 0.98}
FORMS = {
    "plain": ("plain", {}),
    "tracked": ("grasp", {}),
    "free 64": ("grasp", FREE),
    "free 64, random": ("random", FREE),
    "frozen": ("grasp", FROZEN),
}
TRIES = [
    *product((12, 16, 24, 32), (1e-3,), (0.98,)),
    *product((16,), (5e-4, 2e-3), (0.98,)),
    *product((16,), (1e-3,), (0.97, 0.95)),
]
CHOICES = (
    {
        "plain": ("plain", {}),
        "tracked": ("grasp", {}),
        "tracked, read 0.98": ("grasp", {"read": 0.98}),
    }
    | {
        f"frozen, r {r}, {rate:g}, read {read}": (
            "grasp",
            {"freeze_inputs": True, "lora_rank": r, "learning_rate": rate, "read": read},
        )
        for r, rate, read in TRIES
    }
    | {f"free {p}": ("grasp", {"free_rank": p}) for p in (32, 48, 64, 96)}
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--choose", action="store_true", help="try ranks and rates")
    parser.add_argument("--aside", type=Path, help="weights of world 1; without them world 0 alone")
    parser.add_argument("--out", type=Path, help="JSON lines")
    parser.add_argument("--runs", type=Path, default=Path("runs/bench_frozen"))
    parser.add_argument("--workers", type=int)
    options = parser.parse_args()
    name = "frozen_choice" if options.choose else "frozen"
    out = options.out or Path(f"benchmarks/results/{name}.json")
    worlds = [(organism.WEIGHTS, 0, TRIED if options.choose else WORLD_0)]
    if options.aside and not options.choose:
        worlds.append((options.aside, 1, WORLD_1))
    command = " ".join("FOLDER" if a == str(options.aside) else a for a in ["python", *sys.argv])
    about = {
        "command": command,
        "versions": versions(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    lines = []
    for folder, world, tasks in worlds:
        forms = CHOICES if options.choose else FORMS
        seeds = (11, 12) if options.choose else (0, 1, 2)
        plain = _runs(options, "plain", ("plain", {}), tasks, seeds, folder, world)
        for form, chosen in forms.items():
            runs = _runs(options, form, chosen, tasks, seeds, folder, world)
            lines += [about | {"form": form, "world": world} | _kept(r, plain) for r in runs]
            _print(form, world, runs, plain)
            write_text(out, "".join(json.dumps(line) + "\n" for line in lines))


def _runs(options, form, chosen, tasks, seeds, folder, world) -> list[dict]:
    method, settings = chosen
    return sweep(
        options.runs / form.replace(" ", "_").replace(",", ""),
        tasks=tasks,
        methods=(method,),
        seeds=seeds,
        settings=Settings(**settings),
        folder=folder,
        world_seed=world,
        workers=options.workers,
        quiet=True,
    )


def _plain_of(run: dict, plain: list[dict]) -> dict:
    return next(p for p in plain if (p["task"], p["seed"]) == (run["task"], run["seed"]))


def _kept(run: dict, plain: list[dict]) -> dict:
    """One run: its task score, the drift that it added, and both against the plain run's."""
    p = _plain_of(run, plain)
    added, whole = run["drift"] - run["base_drift"], p["drift"] - p["base_drift"]
    modules = run["modules"].values()
    return {
        "task": run["task"],
        "seed": run["seed"],
        "task_score": run["task_score"],
        "of_plains_task": run["task_score"] / p["task_score"],
        "added_drift": added,
        "of_plains_drift": added / whole,
        "through": max((m["through"] for m in modules), default=None),
        "settings": run["settings"],
    }


def _print(form: str, world: int, runs: list[dict], plain: list[dict]) -> None:
    for task in dict.fromkeys(r["task"] for r in runs):
        own = [_kept(r, plain) for r in runs if r["task"] == task]
        mean = {k: sum(r[k] for r in own) / len(own) for k in
                ("task_score", "of_plains_task", "added_drift", "of_plains_drift")}  # fmt: skip
        print(
            f"world {world} {task:9} {form:36} task {mean['task_score']:.3f} "
            f"({100 * mean['of_plains_task']:.1f} % of plain's)  drift {mean['added_drift']:+.3f} "
            f"({100 * mean['of_plains_drift']:.1f} %)",
            flush=True,
        )


if __name__ == "__main__":
    main()
