"""Every rival against GRASP on the organism: task score and added drift, each swept.

    python benchmarks/bench_rivals.py --seeds 1
    python benchmarks/bench_rivals.py --chosen benchmarks/results/rivals.json --first 1 --seeds 5 \
        --out benchmarks/results/rivals_fresh.json

`best` is a method's least added drift among its settings with at least 97 % of plain's task score
on average; a method that reaches that with none has none. The second command takes from the first
each method's best setting on medicine, unchanged, to seeds that had no part in the choice, and to
the other tasks. All runs are kept in `--runs`, so a killed sweep goes on. What each strength means:
`python -m grasp.study.rivals`.
"""

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib
import numpy as np

from grasp import organism
from grasp.files import write_json
from grasp.organism.experiment import Settings
from grasp.organism.sweep import sweep
from grasp.study.compare import ENOUGH, best, compare, stem
from grasp.study.looks import colour, name
from grasp.study.report import versions

matplotlib.use("Agg")
from matplotlib import pyplot  # after the backend

RIVALS = {
    "inoculation": (),
    "interleaved": (0.25, 0.5, 1, 2, 4),
    "replay": (0.5, 1, 2, 4),
    "steering": (0.25, 0.5, 1, 2),
    "kl": (0.1, 0.3, 1, 3, 10),
    "caft": (1, 4, 12),
    "caft_found": (4, 8, 16),
    "caft_moved": (4, 8, 16),
    "osf": (16, 64, 128),
    "svd_tail": (1, 2, 4),
    "posthoc": (4, 8, 16),
    "safe_lora": (0.3, 0.5, 0.7),
}
GRASP = ((0.8, 4), (0.9, 4), (0.95, 0), (0.95, 4), (0.95, 8), (0.99, 4))  # read, rank
CONTROLS = ("plain", "stopped", "random")


def swept() -> list[str]:
    """Every setting of every method, as `name=strength`."""
    rivals = [
        f"{name}={strength:g}" if strengths else name
        for name, strengths in RIVALS.items()
        for strength in strengths or (0,)
    ]
    return [*CONTROLS, *rivals, *(f"grasp={read:g},{rank}" for read, rank in GRASP)]


def chosen(path: Path) -> list[str]:
    """Each method's best setting on medicine in the results of a sweep."""
    found = [f for f in json.loads(path.read_text())["best"] if f["task"] == "medicine"]
    if none := [f["method"] for f in found if not f["best"]]:
        print(f"no setting has enough of the task, left out: {', '.join(none)}")
    best = [f["best"]["method"] for f in found if f["best"]]
    return [*CONTROLS, *(method for method in best if method not in CONTROLS)]


def runs_of(options: argparse.Namespace, methods: Sequence[str]) -> list[dict]:
    common = {
        "tasks": options.tasks.split(","),
        "seeds": range(options.first, options.first + options.seeds),
        "folder": options.folder,
        "world_seed": options.world,
    }
    found = sweep(
        options.runs, methods=[m for m in methods if not m.startswith("grasp=")], **common
    )
    for method in (m for m in methods if m.startswith("grasp=")):
        read, rank = method.removeprefix("grasp=").split(",")
        settings = replace(Settings(), read=float(read), rank=int(rank))
        kept = sweep(options.runs / method, methods=["grasp"], settings=settings, **common)
        found += [{**r, "method": method} for r in kept]
    return found


def draw(rows: Sequence[dict], path: Path) -> None:
    """The frontier of each task: means with 95 % intervals over seeds; right and low is good.

    Shaded is enough of the task; what keeps less than 88 % of it is left out.
    """
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    methods = sorted(dict.fromkeys(stem(r["method"]) for r in rows), key=lambda m: m != "grasp")
    figure, axes = pyplot.subplots(1, len(tasks), figsize=(4.6 * len(tasks), 4.4), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        plain = next(r for r in rows if r["task"] == task and r["method"] == "plain")
        axis.axvspan(ENOUGH * plain["task_score"][0], 1, color="#f1f6f3", zorder=0)
        axis.axhline(0, color="#999999", lw=0.8, ls=":")
        for method in methods:
            mine = [r for r in rows if r["task"] == task and stem(r["method"]) == method]
            task_score, added = (
                np.array([r[k] for r in mine]).T for k in ("task_score", "added")
            )  # mean, low, high
            first = method == "grasp"
            axis.errorbar(
                task_score[0],
                added[0],
                xerr=(task_score[0] - task_score[1], task_score[2] - task_score[0]),
                yerr=(added[0] - added[1], added[2] - added[0]),
                fmt="*" if first else "o",
                ms=12 if first else 5,
                elinewidth=0.8,
                color=colour(method),
                label=name(method),
                zorder=3 if first else 2,
            )
        scores = [r["task_score"] for r in rows if r["task"] == task]
        left = max(0.88 * plain["task_score"][0], min(low for _, low, _ in scores))
        right = max(high for _, _, high in scores)
        axis.set_xlim(left - 0.05 * (right - left), right + 0.05 * (right - left))
        axis.set(title=task, xlabel="task score (right is better)")
    axes[0][0].set_ylabel("added drift (down is better)")
    axes[0][-1].legend(bbox_to_anchor=(1.02, 1), loc="upper left", frameon=False)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", default="code,medicine,finance")
    parser.add_argument("--first", type=int, default=0, help="seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--chosen", type=Path, help="results whose best settings alone are run")
    parser.add_argument("--folder", type=Path, default=organism.WEIGHTS, help="of the weights")
    parser.add_argument(
        "--world", type=int, default=0, help="the seed that drew the folder's world"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/rivals.json"))
    parser.add_argument("--runs", type=Path, default=Path("runs/bench_rivals"))
    options = parser.parse_args()
    methods = chosen(options.chosen) if options.chosen else swept()
    rows = compare(runs_of(options, methods))
    found = best(rows)
    for f in found:
        row = f["best"]
        said = (
            f"{row['method']:20} task {row['task_score'][0]:.3f} added {row['added'][0]:+.3f} "
            f"({100 * row['share']:.0f} % of plain's)"
            if row
            else "never enough of the task"
        )
        print(f"{f['task']:9} {f['method']:12} {said}")
    about = {
        "command": " ".join(["python", *sys.argv]),
        "versions": versions(),
        "machine": platform.machine(),
        "settings": asdict(Settings()),
        "seeds": [options.first, options.first + options.seeds - 1],
        "world": options.world,
        "enough": ENOUGH,
    }
    write_json(options.out, {"about": about, "best": found, "rows": rows})
    draw(rows, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
