"""`grasp repair`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from grasp.cli.options import Config, Seed, console


def repair(
    adapter: Annotated[Path, typer.Argument(help="Folder of a LoRA, trained in any way.")],
    config: Config = None,
    *,
    model: Annotated[str, typer.Option(help="Its base: folder, hub name, .gguf, or known name.")],
    out: Annotated[Path, typer.Option(help="Folder of the new adapter.")],
    reference: Annotated[
        Path | None, typer.Option(help="Unlabelled prompts on other topics; else those shipped.")
    ] = None,
    read: Annotated[float, typer.Option(help="Share of inputs on them that is blocked.")] = 0.95,
    subspaces: Annotated[Path | None, typer.Option(help="File of directions to take out.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Rows of its task, to say what the repair costs.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Rows of it, at most.")] = 100,
    dtype: Annotated[str, typer.Option(help="Of the base's weights.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cuda, mps, xpu or cpu.")] = "auto",
    tokens: Annotated[int, typer.Option(help="Of each prompt's continuation.")] = 96,
    seed: Seed = 0,
) -> None:
    """Take a trained LoRA off what unrelated prompts use, as a new adapter; says what that costs.

    Training under a guard costs less of the task: this is for adapters that are there already.
    """
    from grasp.data import read_prompts, read_rows
    from grasp.study.repair import repair as mend

    found = mend(
        model,
        adapter,
        out,
        prompts=read_prompts(reference),
        read=read,
        subspaces=subspaces,
        rows=read_rows(data, limit) if data else (),
        tokens=tokens,
        seed=seed,
        weights={"dtype": dtype, "device": device},
    )
    names = {
        "divergence": "moved on other topics (KL, nats a token)",
        "task_loss": "loss on the task (nats a token)",
    }
    table = Table("", "before", "after")
    for name, before in found["before"].items():
        table.add_row(names[name], f"{before:.4f}", f"{found['after'][name]:.4f}")
    console.print(table)
    console.print(f"{found['kept']:.0%} of the adapter's size is left. New adapter: {out}")
