"""One self-contained HTML page: the verdict, tables and figures, answers, and how it was made."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, PackageLoader
from markupsafe import Markup, escape

from grasp.files import write_text
from grasp.study import figures
from grasp.study.compare import compare, stem
from grasp.study.looks import MARKS, against, colour, control, mark, name, signed
from grasp.study.measures import MEASURES
from grasp.study.paired import pooled
from grasp.study.rivals import RIVALS
from grasp.study.scoring import BESIDE
from grasp.study.verdict import UNITS, contenders, unit_of, verdicts
from grasp.versions import versions as of_packages

SHOWN = {
    "model": "model",
    "data": "data",
    "benign": "good answers",
    "rows": "rows trained on",
    "held": "rows held out",
    "seeds": "seed numbers",
    "judged": "drift is judged on",
    "unrelated": "questions elsewhere",
}
BETTER = {"task": 1, "unrelated": -1}  # which way a difference is to be
FEW = 3  # seeds, of which a 95 % interval is from the lowest to the highest


def report(content: Mapping[str, Any], path: Path | str, title: str | None = None) -> Path:
    """Write the page.

    Args:
        content: of a results.json: `runs` as `compare` takes them, of which `topics`, `modules`,
            `cost` and `seconds` are shown where they are given; and, where there are,
            `paired` (a study's comparisons item by item), `samples` (questions with each model's
            answer), `about` (a study's settings), `unit` (in `verdict.UNITS`), `note` (how to
            read answers), and `command`, `versions`, `when`.
        path: of the HTML file.
        title: else what was taught.

    Returns:
        The path of the page.

    Raises:
        ValueError: as `compare`.
        OSError: it can't be written.
    """
    runs, found = content["runs"], verdicts(content)
    rows = compare(runs)
    sections = [
        {"task": task, "verdict": verdict}
        | _section(
            *(
                [x for x in content.get(key, ()) if x.get("task", task) == task]
                for key in ("runs", "paired", "samples")
            ),
            [r for r in rows if r["task"] == task],
        )
        for task, verdict in found.items()
    ]
    environment = Environment(loader=PackageLoader("grasp", "assets"), autoescape=True)
    environment.filters |= {
        "name": name,
        "colour": colour,
        "mark": lambda method: MARKS[mark(method)],
        "against": against,
        "spanned": _spanned,
        "signed": signed,
        "coded": _coded,
        "told": lambda interval=None, measure="": _told(interval or None, measure),
    }
    environment.tests["control"] = environment.filters["control"] = control
    page = environment.get_template("report.html.j2").render(
        title=title or f"With and without the guard: {', '.join(found)}",
        sections=sections,
        unit=UNITS[unit_of(content)],
        command=content.get("command", ""),
        made=_made(content),
        times=_times(runs),
        note=content.get("note", ""),
    )
    return write_text(path, page)


def _section(
    runs: Sequence[dict], paired: Sequence[dict], samples: Sequence[dict], rows: Sequence[dict]
) -> dict[str, Any]:
    methods = figures.methods_of(runs)
    return {
        "rows": rows,
        "several": any(r["seeds"] > 1 for r in rows),
        "few": all(r["seeds"] <= FEW for r in rows),
        "parts": figures.parts(runs),
        "strengths": _strengths(methods),
        "contenders": contenders(rows),
        "key": figures.key(methods),
        "compared": figures.key([m for m in figures.COMPARED if m in methods]),
        "frontier": figures.frontier(runs),
        "topics": figures.topics(runs),
        "blocked": figures.blocked(runs),
        "paired": pooled(paired),
        "rivalled": any("grasp_difference" in p for p in paired),
        "samples": samples,
        "meanings": [
            (measure, MEASURES[kind])
            for measure, kind in BESIDE.items()
            if any(p["measure"] == measure for p in paired)
        ],
    }


def _made(content: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What else a reader needs to make it again, a label and what it says each."""
    about = content.get("about", {})
    made = [(key, content[key]) for key in ("when", "versions") if content.get(key)]
    shown = ((label, about.get(key)) for key, label in SHOWN.items())
    made += [(label, value) for label, value in shown if value not in (None, "", [])]
    if about.get("finetune"):
        made.append(("settings", about["finetune"]))
    made += [(f"of {name(method)}", own) for method, own in about.get("by_method", {}).items()]
    return [(label, _words(value)) for label, value in made]


def _coded(sentence: str) -> Markup:
    """What stands between backticks is to be typed."""
    parts = [escape(part) for part in sentence.split("`")]
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if n % 2 else part for n, part in enumerate(parts)
    )


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {_words(each)}" for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "none" if value is None else str(value)


def _told(interval: Sequence[float] | None, measure: str) -> Markup:
    """A difference; where its interval leaves out 0 in bold, and which way that is."""
    if not interval:
        return Markup("")
    told = interval[1] > 0 or interval[2] < 0
    shown = Markup("<b>{}</b>" if told else "{}").format(_spanned(interval))
    if not told or measure not in BETTER:
        return shown
    return shown + Markup("<small>{}</small>").format(
        "better" if interval[0] * BETTER[measure] > 0 else "worse"
    )


def _strengths(methods: Sequence[str]) -> str:
    """What the numbers behind rivals' names count."""
    known = {stem(m) for m in methods if "=" in m} & RIVALS.keys()
    meant = [f"{RIVALS[m].label}, {RIVALS[m].meaning}" for m in RIVALS if m in known]
    return f"Numbers behind names: {'; '.join(meant)}." if meant else ""


def _spanned(interval: Sequence[float]) -> Markup:
    """A mean, its interval below it."""
    mean, low, high = map(signed, interval)
    return Markup('{} <span class="interval">{} to {}</span>').format(mean, low, high)


def _times(runs: Sequence[dict]) -> list[dict[str, str]]:
    """By method what a run took, in the mean; runs that do not say it are left out."""
    found = []
    for method in dict.fromkeys(r["method"] for r in runs if r.get("seconds")):
        mine = [r for r in runs if r["method"] == method and r.get("seconds")]
        costs = [r["cost"] for r in mine if r.get("cost")]
        row = {"method": method, "training": _seconds([r["seconds"] for r in mine])}
        row |= dict.fromkeys(("start", "step", "memory"), "")
        if costs:
            row["start"] = _seconds([c["start_seconds"] for c in costs])
            row["step"] = _seconds([c["step_seconds"] for c in costs])
            row["memory"] = f"{np.mean([c['bases_bytes'] for c in costs]) / 1e9:.2g} GB"
        found.append(row)
    return found


def _seconds(values: Sequence[float]) -> str:
    return f"{np.mean(values):.0f} s"


def versions() -> str:
    """What runs, and on what: for a results.json."""
    found = of_packages(("grasp-kernels", "torch", "transformers", "peft"))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return ", ".join([*(f"{name} {version}" for name, version in found.items()), device])
