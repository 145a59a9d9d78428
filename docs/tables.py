"""Tables of the documentation, made from what they are about; `python docs/tables.py` writes them.

In a page a table stands between `<!-- table: NAME -->` and `<!-- end -->`.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # tests and results are in a checkout alone

PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.S)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def result(name: str) -> list[dict]:
    return json.loads((ROOT / "benchmarks/results" / name).read_text())["rows"]


def settings() -> str:
    from grasp.study.settings import Settings

    parts: dict[str, list] = {}
    for f in fields(Settings):
        aliases = ", ".join(f"`{a}`" for a in f.metadata["aliases"])
        default = "" if f.default is MISSING else f"`{f.default}`"
        meaning = f.metadata["meaning"].replace("|", "\\|")
        row = [f"`{f.name}`", default, meaning, aliases]
        parts.setdefault(f.metadata["group"], []).append(row)
    head = ("setting", "default", "meaning", "also")
    return "\n".join(f"**{group}**\n\n{table(head, rows)}" for group, rows in parts.items())


def rivals() -> str:
    from grasp.study.rivals import listed

    return listed() + "\n"


def families() -> str:
    from tests import families as found

    kinds = {
        "dense": found.DENSE,
        "older forms": found.OLDER,
        "mixtures of experts": found.MIXTURES,
        "attention over compressed keys and values": found.COMPRESSING,
        "with states or convolutions": found.WITH_STATES,
        "with images": found.SEEING,
    }
    rows = [(kind, str(len(of)), ", ".join(f"`{n}`" for n in of)) for kind, of in kinds.items()]
    rows.append(("all", str(len(found.FAMILIES)), ""))
    return table(("kind", "", "families, by `model_type` or test"), rows)


def quantised() -> str:
    from tests.test_quantised import ABOUT

    return table(("quantised by", "tried"), ABOUT.values())


def optimizers() -> str:
    rows = []
    for r in result("leak_cpu.json"):
        if r["trained"] == "lora" and "certified" in r:
            found, alone, said = r["guarded"], r["gradients_only"], r["certified"]
            worst = [_short(max(x["outputs"], x["inputs"])) for x in (found, alone)]
            rows.append((r["optimizer"], f"{r['rate']:g}", worst[0], _yes(said["holds"]), worst[1]))
    return table(("optimizer", "rate", "through", "certified to hold", "gradients alone"), rows)


def engines() -> str:
    found: dict[str, dict[str, str]] = {}
    for r in result("engines.json"):
        well = r["holds"] and r["resumed"]
        said = _short(max(r["outputs"], r["inputs"])) if well else "**fails**"
        found.setdefault(r["engine"], {})[r["weights"]] = said
    kinds = ("LoRA", "LoRA, few free", "LoRA, frozen", "full")
    rows = [(engine, *(of.get(k, "") for k in kinds)) for engine, of in sorted(found.items())]
    return table(("engine", "LoRA", "64 free directions", "frozen inputs", "whole weights"), rows)


def _short(value: float) -> str:
    return f"{value:.1g}"


def _yes(value: bool) -> str:
    return "yes" if value else "**no**"


TABLES: dict[str, Callable[[], str]] = {
    made.__name__: made for made in (settings, rivals, families, quantised, optimizers, engines)
}


def written(page: str) -> str:
    """A page with its tables as they are now."""
    return PLACE.sub(lambda m: f"{m[1]}\n{TABLES[m[2]]()}\n{m[3]}", page)


if __name__ == "__main__":
    for file in sorted(DOCS.glob("*.md")):
        page = file.read_text()
        if (new := written(page)) != page:
            file.write_text(new)
            print(file.relative_to(ROOT))
