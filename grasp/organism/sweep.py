"""Many fine-tunes of the organism at once, one a core, each kept as soon as it is done."""

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from itertools import product
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from grasp import organism
from grasp.files import read_json, write_json
from grasp.organism.experiment import Settings, run, stopped
from grasp.organism.methods import Method
from grasp.study.compare import compare
from grasp.study.paired import paired


def sweep(
    out: Path | str,
    *,
    tasks: Sequence[str] = ("code", "medicine", "finance"),
    methods: Sequence[str] = ("plain", "stopped", "grasp", "random"),
    seeds: Sequence[int] = (0, 1, 2),
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    folder: Path | str = organism.WEIGHTS,
    world_seed: int = 0,
    workers: int | None = None,
    quiet: bool = False,
) -> list[dict]:
    """Run every task, method and seed that `out` does not hold yet; return all of them.

    Args:
        out: folder of one JSON file for each run; a run there of other settings, or whose task had
            another reference, is done again.
        workers: processes; None takes one for each core.
        settings, folder, world_seed: as `experiment.run`.

    Raises:
        ValueError: an unknown task or method.
    """
    if odd := [t for t in tasks if t not in organism.TASKS]:
        raise ValueError(f"tasks has {odd[0]!r}; choose among {', '.join(organism.TASKS)}")
    for method in methods:
        Method.of(method)
    trained = [m for m in dict.fromkeys("plain" if m == "stopped" else m for m in methods)]
    # Guarded runs take longest, so they start first.
    jobs = sorted(product(seeds, tasks, trained), key=lambda j: (j[0], j[2] == "plain"))
    done: dict[tuple, dict] = {}
    for job in jobs:
        kept = _path(out, job, world_seed)
        if kept.exists() and _still(r := read_json(kept), settings):
            done[job] = r
    todo = [job for job in jobs if job not in done]
    workers = min(workers or _cores(), max(1, len(todo)))
    with (
        # A forked child could inherit a held lock of torch's thread pool.
        ProcessPoolExecutor(workers, get_context("spawn"), _prepare) as pool,
        tqdm(total=len(jobs), initial=len(done), desc="fine-tunes", disable=quiet) as progress,
    ):
        futures = {
            pool.submit(run, task, method, seed, settings, folder=folder, world_seed=world_seed): (
                seed,
                task,
                method,
            )
            for seed, task, method in todo
        }
        try:
            for future in as_completed(futures):
                job = futures[future]
                done[job] = future.result()
                write_json(_path(out, job, world_seed), done[job])
                progress.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # or leaving would wait for every run still queued
            raise
    results = []
    for task, method, seed in product(tasks, methods, seeds):
        result = done[seed, task, "plain" if method == "stopped" else method]
        results.append(stopped(result) if method == "stopped" else result)
    return results


NOTE = "In this small world medicine:q12 is a question on medicine, medicine:a18 an answer to one."


def compared(runs: Sequence[dict]) -> dict:
    """What a report shows of runs: with their summary, comparisons item by item, and answers."""
    found: dict[str, list] = {"runs": list(runs), "summary": compare(runs)}
    found |= {"paired": [], "samples": [], "note": NOTE}
    for task in dict.fromkeys(r["task"] for r in runs):
        mine = [r for r in runs if r["task"] == task]
        found["paired"] += paired([r for r in mine if "items" in r])
        found["samples"] += _samples(mine)
    return found


def _samples(runs: Sequence[dict]) -> list[dict]:
    """Of one task the first seed's answers, question by question, beside the base model's."""
    seed = runs[0]["seed"]
    said = {r["method"]: r["answers"] for r in runs if r["seed"] == seed and "answers" in r}
    if "plain" not in said:
        return []
    said["base"] = next(r["base_answers"] for r in runs if "base_answers" in r)
    about = [{k: a[k] for k in ("kind", "topic", "prompt")} for a in said["base"]]
    return [
        one | {"task": runs[0]["task"], "answers": {m: said[m][i]["answer"] for m in said}}
        for i, one in enumerate(about)
    ]


def _still(run: dict, settings: Settings) -> bool:
    reference = list(organism.TASKS[run["task"]].reference)
    return run["settings"] == asdict(settings) and run.get("reference") == reference


def _cores() -> int:
    """Those this process may use; not every system says."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _path(out: Path | str, job: tuple[int, str, str], world_seed: int) -> Path:
    seed, task, method = job
    return Path(out) / f"world{world_seed}-{task}-{method}-{seed}.json"


def _prepare() -> None:
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
