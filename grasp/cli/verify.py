"""`grasp verify`."""

from pathlib import Path
from typing import Annotated

import typer

from grasp.cli.options import Config, console


def verify(
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter, or of a run.")],
    config: Config = None,
    guard: Annotated[
        Path | None, typer.Option(help="File of bases that the run left; else beside the adapter.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file of what was found.")] = None,
) -> None:
    """Recompute an adapter's certificate from its files; no model is loaded."""
    from grasp.files import write_json
    from grasp.study.verify import verify as recompute

    found = recompute(adapter, guard)
    if out is not None:
        write_json(out, found)
    console.print(
        f"{found['matrices']} matrices recomputed: at most {found['through']:.2g} of any change "
        f"lies in what was blocked (the certificate says {found['stated']}).",
        highlight=False,
        soft_wrap=True,
    )
    if found["unchecked"]:
        console.print(
            f"{len(found['unchecked'])} are not looked at: no basis of them is kept, as where "
            "inputs are frozen."
        )
    if not found["holds"]:
        names = list(found["odd"])
        which = f": {names[0]} and {len(names) - 1} more are not as stated" if names else ""
        raise RuntimeError(f"the guarantee does not hold for {adapter}{which}")
    console.print("The guarantee holds.")
