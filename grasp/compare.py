"""Runs side by side: means over seeds, intervals, and drift at equal task performance."""

from collections.abc import Sequence

import numpy as np

from grasp.evaluate import interval

NEEDED = ("task", "method", "seed", "task_score", "drift", "base_drift")


def compare(runs: Sequence[dict], against: str = "plain") -> list[dict]:
    """Summarise runs by task and method.

        added = drift − base_drift        share = mean added / mean added of `against`

    Args:
        runs: each with `task`, `method`, `seed`, `task_score`, `drift` and `base_drift`.
        against: the method that the others are measured by.

    Returns:
        A row for each task and method in the order they came: number of seeds, means and 95 %
        bootstrap intervals over seeds of `task_score` and `added`, `task_loss` (of `against`'s
        mean) and `share`, which is None where `against` added nothing.

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
                "share": float(np.mean(added)) / added_there if added_there else None,
            }
        )
    return rows


def _of(runs: Sequence[dict], task: str, method: str) -> list[dict]:
    return [r for r in runs if r["task"] == task and r["method"] == method]
