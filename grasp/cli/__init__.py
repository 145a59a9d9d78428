"""The command line: each command takes a YAML config whose keys are its options."""

import logging
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from grasp.cli.compare import compare, report
from grasp.cli.demo import demo
from grasp.cli.discover import discover
from grasp.cli.doctor import doctor
from grasp.cli.evaluate import evaluate
from grasp.cli.finetune import finetune
from grasp.cli.repair import repair
from grasp.cli.screen import screen
from grasp.cli.verify import verify
from grasp.study.settings import METHODS, RIVALS
from grasp.versions import installed

CONTROLS = [m for m in METHODS if m not in ("grasp", *RIVALS)]
METHODS_HELP = f"Methods: grasp; {', '.join(CONTROLS)}; rivals {', '.join(RIVALS)}."

NAMES = {"token_normalize_func": lambda name: name.replace("-", "_")}  # --out_dir is --out-dir

app = typer.Typer(
    help="Fine-tune without picking up what nobody asked for.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.callback(invoke_without_command=True)
def about(
    version: Annotated[bool, typer.Option("--version", help="Say which version this is.")] = False,
) -> None:
    if version:
        print(f"grasp-kernels {installed('grasp-kernels')}")
        raise typer.Exit


for command in (
    demo,
    finetune,
    discover,
    evaluate,
    compare,
    screen,
    report,
    repair,
    verify,
    doctor,
):
    epilog = METHODS_HELP if command in (finetune, compare) else None
    app.command(epilog=epilog, context_settings=NAMES)(command)


def main() -> None:
    """Run the command line; a refusal is one clear line and exit code 1, a usage error 2."""
    # On a CPU it tells of a faster kernel that is not installed, whenever PEFT imports it.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        app(standalone_mode=True)
    except (ValueError, TypeError, OSError, RuntimeError, KeyError) as error:
        message = error.args[0] if isinstance(error, KeyError) else error
        # As it is: in markup ":train:" is a picture, and what stands in brackets is nothing.
        said = Text.assemble(("grasp:", "bold red"), f" {message}")
        Console(stderr=True).print(said, soft_wrap=True)
        sys.exit(1)
