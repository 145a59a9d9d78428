"""`grasp discover`."""

from pathlib import Path
from typing import Annotated

import typer

from grasp.cli.options import Config, console


def discover(
    adapter: Annotated[
        list[Path] | None, typer.Argument(help="Folders of plain LoRA adapters, if there are any.")
    ] = None,
    config: Config = None,
    out: Annotated[Path, typer.Option(help="File or folder of the subspaces.")] = Path("subspaces"),
    rank: Annotated[int | None, typer.Option(help="k; default by the updates' energy.")] = None,
    per_block: Annotated[bool, typer.Option(help="One subspace for each block.")] = False,
    model: Annotated[str | None, typer.Option(help="Without adapters: train short runs.")] = None,
    data: Annotated[str | None, typer.Option(help="Of the short runs.")] = None,
    rounds: Annotated[int, typer.Option(help="Of short runs, each kept off what is known.")] = 4,
    seeds: Annotated[int, typer.Option(help="Short runs in a round.")] = 3,
    steps: Annotated[int, typer.Option(help="Of a short run.")] = 30,
    learning_rate: Annotated[float, typer.Option(help="Of a short run.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of the short runs.")] = 0,
) -> None:
    """Find the subspace that plain fine-tunes write to, from their weights alone."""
    from grasp import discover as find

    if bool(adapter) == bool(model and data):
        raise ValueError("give folders of adapters, or --model and --data for short runs")
    if adapter:
        found = find(adapter, rank, per_block=per_block)
    else:
        from grasp.bases.rounds import discover_in_rounds
        from grasp.study.settings import settings_from
        from grasp.study.short_runs import short_runs

        settings = settings_from(
            {"model": model, "data": data, "output_dir": str(out), "learning_rate": learning_rate}
        )
        found = discover_in_rounds(
            short_runs(settings, steps),
            rank=rank or 8,
            rounds=rounds,
            seeds=seeds,
            seed=seed,
            per_block=per_block,
            on_round=lambda n, s, share: console.print(
                f"round {n + 1}: rank {s.rank}, wrote {share:.2f} of the first round's norm"
            ),
        )
    path = found.save(out)
    console.print(f"rank {found.rank} in {len(found.layers)} blocks of width {found.width}: {path}")
