"""What GRASP is compared with: a file for each rival, and this, which finds the files."""

from importlib import import_module
from pkgutil import iter_modules

from grasp.study.rival import PLACES, Rival


def _found() -> dict[str, Rival]:
    names = sorted(m.name for m in iter_modules(__path__) if not m.name.startswith("_"))
    modules = [import_module(f"{__name__}.{name}") for name in names]
    rivals = [rival for module in modules for rival in module.RIVALS]
    return {r.name: r for r in sorted(rivals, key=lambda r: PLACES.index(r.acts_on))}


RIVALS = _found()
"""By name."""


def listed() -> str:
    """A line of Markdown for each, as the documentation has them."""
    lines = []
    for r in RIVALS.values():
        strength = f"{r.strength:g}: {r.meaning}" if r.strength is not None else ""
        lines.append(f"| `{r.name}` | {r.acts_on} | {r.about} | {strength} | {r.source} |")
    head = ["| rival | acts on | what it does | strength | source |", "|---|---|---|---|---|"]
    return "\n".join([*head, *lines])
