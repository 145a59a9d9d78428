"""Runs side by side: means over seeds, intervals, and drift at equal task performance."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from grasp.files import read_json
from grasp.study.evaluate import interval

ENOUGH = 0.97  # of the plain runs' task score: less is a worse model, not a better method
NEEDED = ("task", "method", "seed", "task_score", "drift", "base_drift")


def read_results(path: Path | str) -> dict:
    """A results.json that `grasp demo` or `grasp compare` wrote: `runs`, and what goes with them.

    Raises:
        ValueError: the file holds no JSON, or no runs.
        FileNotFoundError: there is no such file.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("runs"), list):
        raise ValueError(
            f"{path} holds no runs; give a results.json of grasp demo or grasp compare"
        )
    return content


def compare(runs: Sequence[dict], against: str = "plain") -> list[dict]:
    """Summarise runs by task and method.

        added = drift − base_drift        share = mean added / mean added of `against`

    Args:
        runs: each with `task`, `method`, `seed`, `task_score`, `drift` and `base_drift`.
        against: the method that the others are measured by.

    Returns:
        A row for each task and method in the order they came: number of seeds, means and 95 %
        bootstrap intervals over seeds of `task_score` and `added`, `task_loss` (of `against`'s
        mean), `share`, which is None where `against` added nothing, and `against_at_task`: what
        `against` added at the row's task score, on the line through its mean and those of runs
        named "stopped", which are the same at earlier steps; None off the line's ends.

    Raises:
        ValueError: no runs, a key that is missing, or a task without a run of `against`.
    """
    if not runs:
        raise ValueError("there are no runs to compare")
    for i, run in enumerate(runs):
        if missing := [k for k in NEEDED if k not in run]:
            raise ValueError(f"runs[{i}] lacks {missing[0]!r}; it needs {', '.join(NEEDED)}")
    rows = []
    for task, method in dict.fromkeys((r["task"], r["method"]) for r in runs):
        mine = _of(runs, task, method)
        theirs = _of(runs, task, against)
        if not theirs:
            raise ValueError(f"task {task!r} has no run of {against!r} to compare with")
        added = [r["drift"] - r["base_drift"] for r in mine]
        added_there = float(np.mean([r["drift"] - r["base_drift"] for r in theirs]))
        task_there = float(np.mean([r["task_score"] for r in theirs]))
        score = interval([r["task_score"] for r in mine])
        rows.append(
            {
                "task": task,
                "method": method,
                "seeds": len(mine),
                "task_score": score,
                "drift": interval([r["drift"] for r in mine]),
                "base_drift": float(np.mean([r["base_drift"] for r in mine])),
                "added": interval(added),
                "task_loss": task_there - score[0],
                "share": float(np.mean(added)) / added_there if added_there > 0 else None,
            }
        )
    for row in rows:
        row["against_at_task"] = _at_task(rows, row, against)
    return rows


def best(rows: Sequence[dict], enough: float = ENOUGH, against: str = "plain") -> list[dict]:
    """For each task and method its strength of least added drift at enough of the task.

    Args:
        rows: of `compare`; a method's strengths stand behind a "=" in its name.
        enough: share of `against`'s mean task score.

    Returns:
        `task`, `method`, `settings` (how many strengths there are) and `best`, the row, or None
        where no strength has enough; for each task the least drift first.
    """
    least = {r["task"]: enough * r["task_score"][0] for r in rows if r["method"] == against}
    found = []
    for task, method in dict.fromkeys((r["task"], stem(r["method"])) for r in rows):
        mine = [r for r in rows if r["task"] == task and stem(r["method"]) == method]
        able = [r for r in mine if r["task_score"][0] >= least[task]]
        row = min(able, key=lambda r: r["added"][0]) if able else None
        found.append({"task": task, "method": method, "settings": len(mine), "best": row})
    order = list(least)
    return sorted(
        found,
        key=lambda f: (order.index(f["task"]), f["best"]["added"][0] if f["best"] else np.inf),
    )


def stem(method: str) -> str:
    """A method's name without its strength: "kl" of "kl=0.3"."""
    return method.partition("=")[0]


def _at_task(rows: Sequence[dict], row: dict, against: str) -> float | None:
    line = sorted(
        (r["task_score"][0], r["added"][0])
        for r in rows
        if r["task"] == row["task"] and stem(r["method"]) in (against, "stopped")
    )
    scores, added = zip(*line, strict=True)
    score = row["task_score"][0]
    return float(np.interp(score, scores, added)) if scores[0] <= score <= scores[-1] else None


def _of(runs: Sequence[dict], task: str, method: str) -> list[dict]:
    return [r for r in runs if r["task"] == task and r["method"] == method]
