"""One self-contained HTML page: the verdict, the frontier, drift by topic, what was blocked."""

import base64
import io
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure

from grasp.files import write_text
from grasp.study.compare import ENOUGH, best, compare, stem
from grasp.study.paired import pooled
from grasp.study.rivals import RIVALS
from grasp.versions import versions as of_packages

OWN = {  # what is no rival: for people, and in which colour
    "plain": ("plain LoRA", "#c0392b"),
    "stopped": ("stopped early", "#e08e45"),
    "random": ("random directions", "#7f8c8d"),
    "shuffled": ("another block's", "#b4bcbc"),
    "bottom": ("bottom directions", "#d5dada"),
    "grasp": ("GRASP", "#1f7a4d"),
}
BENIGN = {"benign": ("good answers", "#3b6fb6"), "benign_guarded": ("good, guarded", "#7aa6dd")}
LOOKS = OWN | BENIGN | {rival.name: (rival.label, rival.colour) for rival in RIVALS.values()}
NAMES = {method: label for method, (label, _) in LOOKS.items()}
COLOURS = {method: colour for method, (_, colour) in LOOKS.items()}
MANY = 8  # methods, above which the legend stands beside the figure


def report(
    runs: Sequence[dict],
    path: Path | str,
    title: str = "GRASP",
    notes: str = "",
    paired: Sequence[dict] = (),
) -> Path:
    """Write the page.

    Args:
        runs: as `compare` takes them; `topics` and `modules` are drawn where they are given.
        path: of the HTML file.
        notes: a line under the title: what was run, where, and when.
        paired: a study's comparisons item by item, where the runs are of one task.

    Returns:
        The path of the page.

    Raises:
        ValueError: as `compare`.
        OSError: it can't be written.
    """
    rows = compare(runs)
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    sections = [
        {
            "task": task,
            "rows": [r for r in rows if r["task"] == task],
            "verdict": _verdict([r for r in rows if r["task"] == task]),
            "contenders": contenders([r for r in rows if r["task"] == task]),
            "wide": len({r["method"] for r in rows if r["task"] == task}) > MANY,
            "frontier": _frontier([r for r in runs if r["task"] == task]),
            "topics": _topics([r for r in runs if r["task"] == task]),
            "blocked": _blocked([r for r in runs if r["task"] == task]),
            "paired": pooled(paired) if len(tasks) == 1 else [],
        }
        for task in tasks
    ]
    environment = Environment(loader=PackageLoader("grasp", "assets"), autoescape=True)
    environment.filters |= {
        "name": name,
        "colour": _colour,
        "control": control,
        "against": against,
        "span": span,
    }
    page = environment.get_template("report.html.j2").render(
        title=title, notes=notes, sections=sections, colours=COLOURS
    )
    return write_text(path, page)


def name(method: str) -> str:
    """Of a method for people, with its strength, or the step that it was stopped at: "kl=0.3"."""
    which, _, strength = method.partition("=")
    if which not in NAMES and which.startswith("benign_"):
        return f"good, {name(method.removeprefix('benign_'))}"
    return NAMES.get(which, which) + (f", {strength}" if strength else "")


def control(method: str) -> bool:
    """Whether it is a run on good answers, which says where another's 0 lies."""
    return method.startswith("benign")


def span(interval: Sequence[float]) -> str:
    """A mean with its interval: "+0.030 (+0.013 to +0.048)"."""
    return "{:+.3f} ({:+.3f} to {:+.3f})".format(*interval)


def itemwise(paired: Sequence[dict], measure: str) -> list[str]:
    """What each method adds on a measure beyond its control, and how sure that is: a line each."""
    return [
        f"{name(p['method'])}: {span(p['beyond_own_benign'])} beyond {against(p['control'])}; "
        f"less plain LoRA {span(p['difference'])}"
        + (f"; GRASP less it {span(p['grasp_difference'])}" if "grasp_difference" in p else "")
        for p in pooled(paired)
        if p["measure"] == measure
    ]


def against(benign: str) -> str:
    """The control of a comparison for people; without a benign run it is the base model."""
    return "the base model" if benign == "base" else name(benign)


def _colour(method: str) -> str:
    return COLOURS.get(stem(method), "#555555")


def _verdict(rows: list[dict]) -> str:
    by = {r["method"]: r for r in rows}
    if "grasp" not in by or by["plain"]["added"][0] <= 0:
        return ""
    grasp, plain = by["grasp"], by["plain"]
    same = grasp["against_at_task"]
    stopped = (
        "" if same is None else f" A plain run stopped at that score moved them by {same:.2f}."
    )
    return (
        f"The plain fine-tune moved unrelated topics by {plain['added'][0]:.2f}; with the guard it "
        f"was {grasp['added'][0]:.2f}, {100 * grasp['share']:.0f} % of that, at a task score of "
        f"{grasp['task_score'][0]:.2f} against {plain['task_score'][0]:.2f}." + stopped
    )


def contenders(rows: Sequence[dict]) -> str:
    """Of one task's rows: the methods with enough of the task score, the least drift first.

    Without a rival of the guard's the table says as much, so nothing is said.
    """
    found = [f for f in best(rows) if not control(f["method"])]
    if not {f["method"] for f in found} - set(OWN):
        return ""
    able = [f"{name(f['best']['method'])} {f['best']['added'][0]:+.3f}" for f in found if f["best"]]
    less = [name(f["method"]) for f in found if not f["best"]]
    return (
        f"Added drift of those with {100 * ENOUGH:.0f} % of the plain task score or more, each at "
        f"its best strength: {'; '.join(able)}."
        + (f" Less of the task: {'; '.join(less)}." if less else "")
    )


def _frontier(runs: list[dict]) -> str:
    methods = dict.fromkeys(m for r in runs if not control(m := r["method"]))
    wide = len({r["method"] for r in runs}) > MANY
    figure = Figure(figsize=(7.4 if wide else 5.2, 3.8), layout="constrained")
    axes = figure.subplots()
    for method in methods:
        mine = [r for r in runs if r["method"] == method]
        task = np.array([r["task_score"] for r in mine])
        added = np.array([r["drift"] - r["base_drift"] for r in mine])
        colour = _colour(method)
        axes.scatter(task, added, s=16, alpha=0.45, color=colour)
        axes.errorbar(
            task.mean(),
            added.mean(),
            xerr=_range(task),
            yerr=_range(added),
            fmt="o",
            ms=8,
            capsize=3,
            color=colour,
            label=name(method),
        )
    axes.axhline(0, color="#999999", lw=0.8, ls=":")
    axes.set(xlabel="task score (right is better)", ylabel="added drift (down is better)")
    axes.locator_params(axis="x", nbins=6)
    beside = {"bbox_to_anchor": (1.01, 1), "loc": "upper left"} if wide else {}
    axes.legend(frameon=False, fontsize=8, **beside)
    _bare(axes)
    return _inline(figure)


def _range(values: np.ndarray) -> np.ndarray:
    """Distances of the extremes from the mean; rounding may put the mean of equals outside them."""
    mean = values.mean()
    return np.maximum(0, [[mean - values.min()], [values.max() - mean]])


def _topics(runs: list[dict]) -> str:
    runs = [r for r in runs if r.get("topics")]
    if not runs:
        return ""
    topics = list(runs[0]["topics"])
    methods = list(dict.fromkeys(r["method"] for r in runs))
    figure = Figure(
        figsize=(5.2, 0.5 + 0.16 * (len(methods) + 1) * len(topics)), layout="constrained"
    )
    axes = figure.subplots()
    height = 0.8 / len(methods)
    for n, method in enumerate(methods):
        mine = [r for r in runs if r["method"] == method]
        values = [np.mean([_added(r, t) for r in mine]) for t in topics]
        places = np.arange(len(topics)) + n * height
        colour = _colour(method)
        axes.barh(places, values, height * 0.9, color=colour, label=name(method))
    axes.set_yticks(np.arange(len(topics)) + 0.4 - height / 2, topics)
    axes.invert_yaxis()
    axes.axvline(0, color="#999999", lw=0.8)
    axes.set_xlabel("added drift, mean over seeds")
    _bare(axes)
    return _inline(figure)


def _added(run: dict, topic: str) -> float:
    value = run["topics"][topic]
    value = value[0] if isinstance(value, (list, tuple)) else value  # a mean with its interval
    return value - run.get("base_topics", {}).get(topic, 0.0)


def _blocked(runs: list[dict]) -> str:
    runs = [r for r in runs if r["method"] == "grasp" and r.get("modules")]
    shares: dict[int, list[float]] = {}
    for run in runs:
        for name, module in run["modules"].items():
            index = re.search(r"\.(\d+)\.", name)
            shares.setdefault(int(index.group(1)) if index else -1, []).append(module["blocked"])
    if not shares:
        return ""
    figure = Figure(figsize=(5.2, 2.4), layout="constrained")
    axes = figure.subplots()
    blocks = sorted(shares)
    axes.bar([str(b) for b in blocks], [np.mean(shares[b]) for b in blocks], color=COLOURS["grasp"])
    axes.set(xlabel="block", ylabel="gradient energy blocked", ylim=(0, 1))
    _bare(axes)
    return _inline(figure)


def _bare(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _inline(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    return base64.b64encode(buffer.getvalue()).decode()


def versions() -> str:
    """What ran: for the notes of a report."""
    found = of_packages(("torch", "transformers", "peft"))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return ", ".join([*(f"{name} {version}" for name, version in found.items()), device])
