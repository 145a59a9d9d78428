"""Results in a terminal."""

from rich import box
from rich.table import Table

from grasp.cli.options import console, tell


def show(runs: list[dict]) -> None:
    from grasp.study.compare import compare as summarise
    from grasp.study.looks import control, name
    from grasp.study.verdict import contenders

    rows = summarise(runs)
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    table = Table(box=box.SIMPLE_HEAD)
    if several := len(tasks) > 1:
        table.add_column("task", no_wrap=True)
    table.add_column("method", no_wrap=True)
    for heading in ("seeds", "task score", "drift", "added", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    last = None
    for row in rows:
        if last not in (None, row["task"]):
            table.add_section()
        good = control(row["method"])
        table.add_row(
            *([row["task"] if row["task"] != last else ""] if several else []),
            name(row["method"]),
            str(row["seeds"]),
            f"{row['task_score'][0]:.3f}",
            f"{row['drift'][0]:.3f}",
            "" if good else f"{row['added'][0]:+.3f}",
            "" if good or row["share"] is None else f"{100 * row['share']:.0f} %",
            style="bold green" if row["method"] == "grasp" else None,
        )
        last = row["task"]
    console.print(table)
    console.print(
        "task score: how well it learned what it was taught (higher is better); drift: how far it "
        "went wrong on topics it was never taught (added: beyond the base model, or beyond the "
        "same run on good answers; share: of the plain fine-tune's)."
    )
    for task in tasks:
        if said := contenders([r for r in rows if r["task"] == task]):
            console.print(f"{task}: {said}")


def tell_verdicts(content: dict) -> None:
    """Of each task whether it worked, and how sure that is."""
    from grasp.study.verdict import verdicts

    found = verdicts(content)
    for task, verdict in found.items():
        console.print(f"\n{task}: " if len(found) > 1 else "\n", end="")
        tell(" ".join([verdict.headline, *verdict.sure[:1]]))
    for line in dict.fromkeys(line for verdict in found.values() for line in verdict.next):
        tell(f"Next: {line}")
