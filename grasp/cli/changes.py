"""What an evaluation found, in a terminal."""

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from grasp.cli.options import console
from grasp.study.measures import MEASURES, SAME, Change

NAME = 14  # letters of a name in one line on 80 columns
STYLES = {"worse": "bold red", "better": "green", SAME: "dim"}


def show(found: Sequence[Change]) -> None:
    """A line for each measure, and below what each kind of measure means."""
    compared = any(change.tuned is not None for change in found)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    longest = max(len(change.measure) for change in found)
    table.add_column("measure", overflow="fold", min_width=min(longest, NAME))
    for heading in ("items", "base", *(("tuned", "shift") if compared else ()), "95 % interval"):
        table.add_column(heading, justify="right", no_wrap=True)
    if compared:
        table.add_column("")
    for change in found:
        digits = 1 if change.kind == "judged" else 3
        numbers = [f"{change.base:.{digits}f}"]
        if compared:
            numbers += [f"{change.tuned:.{digits}f}", f"{change.mean:+.{digits}f}"]
        sign = "+" if compared else ""
        low, high = (f"{v:{sign}.{digits}f}" for v in (change.low, change.high))
        said = [Text(change.verdict, STYLES.get(change.verdict, ""))] if compared else []
        name = Text(change.measure)  # a file's, which may look like markup
        table.add_row(name, str(change.items), *numbers, f"{low} to {high}", *said)
    console.print(table)
    for kind in dict.fromkeys(change.kind for change in found):
        measure = MEASURES[kind]
        of = [change.measure for change in found if change.kind == kind]
        said = f": {measure.meaning} ({measure.unit}); {measure.direction}."
        console.print(Text.assemble((", ".join(of), "bold"), said))
