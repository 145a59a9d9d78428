"""`grasp screen`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from grasp.cli.options import Config, console


def screen(
    run: Annotated[Path, typer.Argument(help="Folder of a guarded run.")],
    config: Config = None,
    *,
    out: Annotated[Path, typer.Option(help="JSON file of the ranked rows.")],
    data: Annotated[
        Path | None, typer.Option(help="Rows; default those it was trained on.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Rows scored.")] = None,
    top: Annotated[int, typer.Option(help="Rows shown.")] = 10,
) -> None:
    """Rank training rows by how much of their gradient lies in what the guard blocked."""
    from grasp.files import write_json
    from grasp.study import screen as ranking

    ranked, rows = ranking.of_run(run, data, limit)
    write_json(out, ranked)
    table = Table("row", "score", "share", "loss", "prompt")
    for found in ranked[:top]:
        prompt = rows[found["row"]].prompt.replace("\n", " ")
        numbers = (f"{found['score']:.3g}", f"{found['share']:.3f}", f"{found['loss']:.2f}")
        table.add_row(str(found["row"]), *numbers, prompt[:60])
    console.print(table)
    console.print(f"{len(ranked)} rows: {out}")
