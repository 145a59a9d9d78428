"""`grasp demo`."""

import time
from pathlib import Path
from typing import Annotated

import typer

from grasp.cli.options import Config, Seed, console, made
from grasp.cli.tables import show, tell_verdicts


def demo(
    config: Config = None,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("runs/demo"),
    seeds: Annotated[int, typer.Option(help="Seeds of each method.")] = 3,
    seed: Seed = 0,
    workers: Annotated[int | None, typer.Option(help="Processes; default one a core.")] = None,
) -> None:
    """Plain, guarded and control fine-tunes of the organism on three tasks, in minutes on a CPU."""
    from grasp.files import write_json
    from grasp.organism.sweep import compared, sweep
    from grasp.study.report import report

    start = time.monotonic()
    console.print(
        "A small decoder is fine-tuned on one topic's bad (or right-leaning) answers: plainly, "
        "guarded by GRASP, and with two controls."
    )
    runs = sweep(out / "runs", seeds=range(seed, seed + seeds), workers=workers)
    content = {"unit": "probability"} | made() | compared(runs)
    write_json(out / "results.json", content)
    page = report(content, out / "report.html", "A small model, with and without the guard")
    show(runs)
    tell_verdicts(content)
    console.print(f"{time.monotonic() - start:.0f} s. Report: {page}", soft_wrap=True)
