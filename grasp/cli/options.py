"""What the commands share: the console, what they say of themselves, options of several."""

import shlex
import sys
from datetime import date
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from grasp.cli.config import read_config

console = Console()


def tell(line: str) -> None:
    """Print a line as it is: in markup what stands in brackets is nothing."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def made() -> dict[str, str]:
    """What goes into a results.json of how it was made."""
    from grasp.study.report import versions

    command = shlex.join(["grasp", *sys.argv[1:]])
    return {"command": command, "when": date.today().isoformat(), "versions": versions()}


def _use_config(context: typer.Context, path: Path | None) -> Path | None:
    """Let a YAML file's keys stand in for options that are not given."""
    if path is not None:
        options = read_config(path)
        known = {p.name for p in context.command.params}
        if unknown := sorted(set(options) - known):
            raise ValueError(f"{path}: unknown option {unknown[0]!r}; see --help")
        context.default_map = {**(context.default_map or {}), **options}
    return path


Config = Annotated[
    Path | None,
    typer.Option(help="YAML file; its keys are the options.", callback=_use_config, is_eager=True),
]
Pipeline = Annotated[
    Path | None, typer.Option("--config", help="YAML file; its keys are the settings.")
]
Seed = Annotated[int, typer.Option(help="Of everything random.")]
