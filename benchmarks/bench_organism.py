"""The method on the organism: the demo's tasks, topics kept aside, and a world kept aside.

    python benchmarks/bench_organism.py --aside FOLDER
    python benchmarks/bench_organism.py --aside FOLDER --steps 1080 --methods plain,grasp \
        --runs runs/organism_long --out benchmarks/results/organism_long.json
    python benchmarks/bench_organism.py --methods plain,bottom --seeds 3 \
        --out benchmarks/results/organism_bottom.json

Settings were chosen on medicine, law and finance of an earlier world 0 (`EXPERIMENTS.md`). Code and
travel, and all of world 1 (`python -m grasp.organism.pretrain --seed 1 --out FOLDER`), took no part
in that.
"""

import argparse
import platform
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from grasp import compare, organism
from grasp.files import write_json
from grasp.organism.experiment import Settings
from grasp.organism.sweep import sweep
from grasp.study.report import versions

METHODS = ("plain", "stopped", "grasp", "random", "shuffled", "caft")
WORLD_0 = {"tuned on": ("medicine", "law", "finance"), "kept aside": ("code", "travel")}
WORLD_1 = ("code", "medicine", "finance", "travel")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--aside", type=Path, help="weights of world 1; without them world 0 alone")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/organism.json"))
    parser.add_argument("--runs", type=Path, default=Path("runs/bench_organism"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--steps", type=int, default=Settings().steps)
    options = parser.parse_args()
    seeds, settings = range(options.seeds), Settings(steps=options.steps)
    groups = [(f"world 0, {k}", organism.WEIGHTS, 0, tasks) for k, tasks in WORLD_0.items()]
    if options.aside:
        groups.append(("world 1, kept aside", options.aside, 1, WORLD_1))
    tables = {}
    for name, folder, world, tasks in groups:
        runs = sweep(
            options.runs,
            tasks=tasks,
            methods=options.methods.split(","),
            seeds=seeds,
            settings=settings,
            folder=folder,
            world_seed=world,
        )
        tables[name] = compare(runs)
        for row in tables[name]:
            share = "" if row["share"] is None else f"{100 * row['share']:4.0f} %"
            print(
                f"{name:22} {row['task']:9} {row['method']:8} task {row['task_score'][0]:.3f} "
                f"drift {row['drift'][0]:.3f} added {row['added'][0]:+.3f} {share}"
            )
    command = ["python", *sys.argv]
    about = {
        "command": " ".join("FOLDER" if a == str(options.aside) else a for a in command),
        "versions": versions(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "settings": asdict(settings),
        "seeds": list(seeds),
    }
    write_json(options.out, {"about": about, "tables": tables})


if __name__ == "__main__":
    main()
