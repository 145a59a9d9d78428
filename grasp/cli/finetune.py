"""`grasp finetune`."""

import inspect
from dataclasses import MISSING, fields
from typing import Annotated, Any, get_args, get_type_hints

import typer
from rich.text import Text

from grasp import progress
from grasp.cli.config import options_from
from grasp.cli.options import Pipeline, console, tell
from grasp.study.settings import Settings, named, settings_from


def finetune(config, best_of: int, show: bool, set_: list[str] | None, **given: Any) -> None:
    """Fine-tune a LoRA, guarded by default; a killed run goes on where it was."""
    with progress.speaking(0), progress.Stage("Loading transformers"):
        from grasp.study import finetune as pipeline
        from grasp.study.ending import ending

    known = {name: value for name, value in given.items() if value is not None}
    # Each by its own names, so that an option takes the place of a config's, whatever it is called.
    settings = settings_from(
        named(options_from(config, {})) | known | named(options_from(None, {}, set_))
    )
    if show:
        said, row = pipeline.first_example(settings)
        tell("\n".join([*said, "", "The first row; what is learned is green:"]))
        styled = ((text, "green" if learned else "") for text, learned in row)
        console.print(Text.assemble(*styled), soft_wrap=True)
        return
    try:
        if best_of == 1:
            adapter = pipeline.run(settings, tell=tell)
        else:
            adapter = pipeline.best_of(settings, best_of)
    except KeyboardInterrupt:
        tell("\nStopped. The same command goes on from the last checkpoint.")
        tell("Before there is one it begins with what was prepared, and trains anew.")
        raise typer.Exit(130) from None
    tell(f"Adapter: {adapter}")
    if (certificate := adapter.parent / "grasp.json").exists():
        tell(f"Certificate: {certificate}")
    for line in ending(adapter.parent):
        tell(line)


def _settings_as_options() -> list[inspect.Parameter]:
    """An option for each setting, by all of its names, with its meaning and default in help."""
    found = []
    hints = get_type_hints(Settings)
    for f in fields(Settings):
        kind = next(k for k in (*get_args(hints[f.name]), hints[f.name]) if k is not type(None))
        flags = [f"--{name}" for name in (f.name, *f.metadata["aliases"])]
        if kind is bool:
            flags[0] = f"--{f.name}/--no_{f.name}"
        known = f.default is not MISSING and f.default is not None
        told = (
            f" (default {str(f.default).lower() if kind is bool else f.default})" if known else ""
        )
        option = typer.Option(
            *flags, help=f"{f.metadata['meaning']}{told}", rich_help_panel=f.metadata["group"]
        )
        found.append(_parameter(f.name, Annotated[kind | None, option], None))
    return found


def _parameter(name: str, hint, default) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)


OWN = [
    _parameter("config", Pipeline, None),
    _parameter(
        "best_of",
        Annotated[int, typer.Option(help="Seeds to train; the one that diverges least is named.")],
        1,
    ),
    _parameter(
        "show",
        Annotated[
            bool,
            typer.Option("--show", help="Show the first row as the model sees it; train nothing."),
        ],
        False,
    ),
    _parameter(
        "set_",
        Annotated[list[str] | None, typer.Option("--set", help="A setting: --set rank=8")],
        None,
    ),
]
_options = [*OWN, *_settings_as_options()]
finetune.__signature__ = inspect.Signature(_options)
finetune.__annotations__ = {p.name: p.annotation for p in _options}
