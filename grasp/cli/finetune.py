"""`grasp finetune`."""

from typing import Annotated

import typer

from grasp.cli.config import options_from
from grasp.cli.options import Pipeline, console


def finetune(
    config: Pipeline = None,
    model: Annotated[
        str | None, typer.Option(help="Folder, hub name, .gguf, or a known name.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="JSON lines, .gz too.")] = None,
    out: Annotated[str | None, typer.Option(help="Folder of the adapter.")] = None,
    method: Annotated[
        str | None,
        typer.Option(help="grasp, plain, a control or a rival: all are listed below."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    best_of: Annotated[
        int, typer.Option(help="Seeds to train; the one that diverges least is named.")
    ] = 1,
    subspaces: Annotated[str | None, typer.Option(help="File of subspaces to keep off.")] = None,
    reference: Annotated[str | None, typer.Option(help="Unlabelled prompts, one a line.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting: --set rank=8")
    ] = None,
) -> None:
    """Fine-tune a LoRA, guarded by default; a killed run goes on where it was."""
    from grasp.study import finetune as pipeline
    from grasp.study.settings import settings_from

    given = {
        "model": model,
        "data": data,
        "out": out,
        "method": method,
        "steps": steps,
        "seed": seed,
        "subspaces": subspaces,
        "reference": reference,
    }
    options = options_from(config, given, set_)
    settings = settings_from(options)
    adapter = pipeline.run(settings) if best_of == 1 else pipeline.best_of(settings, best_of)
    certificate = adapter.parent / "grasp.json"
    console.print(f"Adapter: {adapter}")
    if certificate.exists():
        console.print(f"Certificate: {certificate}")
