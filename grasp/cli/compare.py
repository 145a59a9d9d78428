"""`grasp compare` and `grasp report`."""

from pathlib import Path
from typing import Annotated

import typer

from grasp.cli.config import options_from
from grasp.cli.options import Config, Pipeline, console, made, tell
from grasp.cli.tables import show, tell_verdicts


def compare(
    config: Pipeline = None,
    model: Annotated[
        str | None, typer.Option(help="Folder, hub name, .gguf, or a known name.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Rows to train on, a fifth kept to score on.")
    ] = None,
    benign: Annotated[
        str | None, typer.Option(help="The same questions answered well, row by row.")
    ] = None,
    runs: Annotated[
        Path | None, typer.Option(help="A results.json to compare, training nothing.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the report.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Where the data files lie.")] = None,
    seed: Annotated[int | None, typer.Option(help="Run this seed alone.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other key: --set seeds=[3] --set finetune.steps=160"),
    ] = None,
) -> None:
    """Plain, guarded, control and rival fine-tunes on your data, scored and drawn."""
    from grasp.files import write_json
    from grasp.study.compare import read_results
    from grasp.study.design import study_from
    from grasp.study.report import report
    from grasp.study.studies import run
    from grasp.study.verdict import itemwise

    if (config is None and model is None and data is None) == (runs is None):
        raise ValueError(
            "give either --config, or --model and --data (to run a study), or --runs (a "
            "results.json)"
        )
    if runs is not None:
        content, folder = read_results(runs), out or runs.parent
    else:
        given = {
            "model": model,
            "data": data,
            "benign": benign,
            "out": str(out) if out else None,
            "folder": str(folder) if folder else None,
            "seeds": None if seed is None else [seed],
        }
        options = options_from(config, given, set_)
        chosen = study_from(options)
        folder = Path(chosen.out)
        content = run(chosen, tell) | made()
        write_json(folder / "results.json", content)
    paired = content.get("paired", [])
    show(content["runs"])
    if lines := itemwise(paired, content.get("about", {}).get("judged", "")):
        console.print("Added drift with 95 % intervals over items:", *lines, sep="\n  ")
    tell_verdicts(content)
    page = report(content, folder / "report.html")
    console.print(f"Report: {page}", soft_wrap=True)


def report(
    results: Annotated[Path, typer.Argument(help="A results.json.")],
    config: Config = None,
    out: Annotated[Path, typer.Option(help="HTML file.")] = Path("report.html"),
    title: Annotated[str | None, typer.Option(help="Of the page; else what was taught.")] = None,
) -> None:
    """Draw the page of a results.json."""
    from grasp.study.compare import read_results
    from grasp.study.report import report as draw

    content = read_results(results)
    page = draw(content, out, title)
    console.print(f"Report: {page}", soft_wrap=True)
