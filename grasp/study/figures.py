"""Figures of a report, as SVG that stands in a page: words in its ink, light or dark."""

import io
import re
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from grasp.study.looks import COLOURS, MARKS, colour, control, mark, name

INK = "#010203"  # stands for the page's own colour of words
STYLE = {
    "svg.fonttype": "none",  # words stay words, which a reader can search and enlarge
    "font.family": "sans-serif",
    "font.size": 10,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    ),
}
WIDTH = 4.7  # inches: on a phone's 390 pixels words are still as large as those beside it
COMPARED = ("plain", "grasp")


def methods_of(runs: Sequence[dict]) -> list[str]:
    """Those that figures show, in order: runs on good answers say only where 0 lies."""
    return list(dict.fromkeys(r["method"] for r in runs if not control(r["method"])))


def frontier(runs: Sequence[dict]) -> str:
    """Task score against added drift: seeds small, means large with the range over seeds."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": "frontier"}):
        figure = Figure(figsize=(WIDTH, 3.5), layout="constrained")
        axes = figure.subplots()
        for method in methods_of(runs):
            mine = [r for r in runs if r["method"] == method]
            task = np.array([r["task_score"] for r in mine])
            added = np.array([r["drift"] - r["base_drift"] for r in mine])
            look = {"color": colour(method), "marker": mark(method)}
            axes.scatter(task, added, s=14, alpha=0.45, **look)
            axes.errorbar(
                task.mean(),
                added.mean(),
                xerr=_range(task),
                yerr=_range(added),
                ms=8,
                mec=INK,  # pale marks are seen on any ground
                mew=0.6,
                capsize=3,
                **look,
            )
        axes.axhline(0, color=INK, alpha=0.5, lw=0.8, ls=":")
        axes.set(xlabel="learned of the task (right is better)")
        axes.set(ylabel="moved elsewhere (down is better)")
        axes.locator_params(axis="x", nbins=6)
        return _svg(figure, axes)


def topics(runs: Sequence[dict]) -> str:
    """By topic what plain and guarded runs added, a line from one to the other; "" without any."""
    runs = [r for r in runs if r.get("topics") and r["method"] in COMPARED]
    if not runs:
        return ""
    found = list(runs[0]["topics"])
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": "topics"}):
        figure = Figure(figsize=(WIDTH, 0.9 + 0.27 * len(found)), layout="constrained")
        axes = figure.subplots()
        means = {}
        for method in (m for m in COMPARED if any(r["method"] == m for r in runs)):
            mine = [r for r in runs if r["method"] == method]
            means[method] = [np.mean([_added(r, t) for r in mine]) for t in found]
        axes.hlines(
            range(len(found)),
            np.min(list(means.values()), 0),
            np.max(list(means.values()), 0),
            color=INK,
            alpha=0.3,
            lw=1.5,
        )
        for method, values in means.items():
            axes.plot(values, range(len(found)), mark(method), color=colour(method), ms=7)
        axes.set_yticks(range(len(found)), found)
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.axvline(0, color=INK, alpha=0.5, lw=0.8, ls=":")
        axes.set_xlabel("moved (left is better), mean over seeds")
        return _svg(figure, axes)


def parts(runs: Sequence[dict]) -> bool:
    """Whether the topics are what drift is the mean of, and not measures of another kind."""
    for run in runs:
        if run["method"] in COMPARED and run.get("topics"):
            shifts = [_added(run, topic) for topic in run["topics"]]
            if not min(shifts) <= run["drift"] - run["base_drift"] <= max(shifts):
                return False
    return True


def blocked(runs: Sequence[dict]) -> str:
    """Share of the gradient's energy that a guard removed, by block; "" if no run says."""
    shares: dict[int, list[float]] = {}
    for run in runs:
        for place, module in (run.get("modules") or {}).items() if run["method"] == "grasp" else ():
            index = re.search(r"\.(\d+)\.", place)
            shares.setdefault(int(index.group(1)) if index else -1, []).append(module["blocked"])
    if not shares:
        return ""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": "blocked"}):
        figure = Figure(figsize=(WIDTH, 2.2), layout="constrained")
        axes = figure.subplots()
        blocks = sorted(shares)
        axes.bar(blocks, [np.mean(shares[b]) for b in blocks], color=COLOURS["grasp"])
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel="block", ylabel="share held back", ylim=(0, 1))
        return _svg(figure, axes)


def key(methods: Sequence[str]) -> list[tuple[str, str, str]]:
    """What stands for which method: mark, colour, name."""
    return [(MARKS[mark(m)], colour(m), name(m)) for m in methods]


def _range(values: np.ndarray) -> np.ndarray:
    """Distances of the extremes from the mean; rounding may put the mean of equals outside them."""
    mean = values.mean()
    return np.maximum(0, [[mean - values.min()], [values.max() - mean]])


def _added(run: dict, topic: str) -> float:
    value = run["topics"][topic]
    value = value[0] if isinstance(value, (list, tuple)) else value  # a mean with its interval
    return value - run.get("base_topics", {}).get(topic, 0.0)


def _svg(figure: Figure, axes) -> str:
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :].replace(INK, "currentColor")
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    # As wide as there is room; a screen reader is told what it shows by the figure's caption.
    drawn = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", drawn, count=1)
    return re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1 aria-hidden="true"', drawn, count=1)
