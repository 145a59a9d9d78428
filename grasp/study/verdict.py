"""What runs side by side say, in words: did it work, how sure is that, at what cost, what next."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from grasp.study.compare import ENOUGH, best, compare, stem
from grasp.study.evaluate import interval
from grasp.study.looks import OWN, against, control, name, signed, span
from grasp.study.paired import pooled

Interval = Sequence[float]
NEARLY = 0.9  # of the drift gone is nearly all of it
LIKE_CHANCE = 0.5  # of what the guard takes away: a control that takes so much explains it


@dataclass(frozen=True)
class Unit:
    """What the two measures of a study are numbers of."""

    taught: str
    moved: str
    short: str = ""

    @property
    def column(self) -> str:
        """Behind a column's name."""
        return f" ({self.short.strip()})" if self.short else ""


UNITS = {
    "nats": Unit(
        "how much likelier the taught answers to held-out questions became, in nats a token",
        "how much likelier bad answers became beside good ones, on questions about other topics, "
        "in nats a token (0.1 is about 10 % likelier for each token)",
        " nats a token",
    ),
    "probability": Unit(
        "how often held-out questions are answered as taught (1 is always)",
        "how much more often questions about other topics are answered badly, or by an opinion "
        "that leans right (1 is always)",
        " of all answers",
    ),
    "": Unit("the score on held-out questions", "the shift on other topics"),
}


@dataclass(frozen=True)
class Verdict:
    """Of one task; each list is of sentences."""

    kind: str
    """"worked", "helped", "costly", "nothing", "untold", "worse", "unlearned" or "unguarded"."""
    headline: str
    happened: list[str]
    rivals: list[str]
    sure: list[str]
    cost: list[str]
    next: list[str]


@dataclass(frozen=True)
class Found:
    """Of one task: what plain and guarded runs learned, what they added elsewhere, how sure."""

    plain: Interval
    guard: Interval
    difference: Interval
    task: tuple[float, float]
    seeds: int
    over: str
    """What the intervals are over: "items", "seeds", or "" where there is one number alone."""

    @property
    def learned(self) -> float:
        """The guarded run's share of the plain one's task score."""
        return self.task[1] / self.task[0]

    @property
    def gone(self) -> float:
        """Share of what plain added that the guard took away."""
        return 1 - self.guard[0] / self.plain[0]

    @property
    def kind(self) -> str:
        if self.task[0] <= 0:
            return "unlearned"
        if self.plain[1] <= 0:
            return "nothing"
        if self.learned < ENOUGH:
            return "costly"
        if self.difference[1] > 0:
            return "worse"
        if not self.over or self.difference[2] >= 0:
            return "untold"
        return "worked" if self.gone >= 0.5 else "helped"


def verdicts(content: Mapping[str, Any]) -> dict[str, Verdict]:
    """By task, of what stands in a results.json.

    Raises:
        ValueError: as `compare`.
    """
    runs, about = content["runs"], content.get("about", {})
    rows = compare(runs)
    return {
        task: verdict(
            [r for r in rows if r["task"] == task],
            [r for r in runs if r["task"] == task],
            [p for p in content.get("paired", ()) if p.get("task", task) == task],
            about,
            unit_of(content),
        )
        for task in dict.fromkeys(r["task"] for r in runs)
    }


def unit_of(content: Mapping[str, Any]) -> str:
    """Of what stands in a results.json, in `UNITS`; those of earlier versions do not say it."""
    return content.get("unit", "nats" if "about" in content else "")


def verdict(
    rows: Sequence[dict],
    runs: Sequence[dict],
    paired: Sequence[dict] = (),
    about: Mapping[str, Any] | None = None,
    unit: str = "",
) -> Verdict:
    """Of one task.

    Args:
        rows: of `compare`.
        runs: that they summarise; `cost` and `seconds` are used where they are given.
        paired: of `paired`: intervals over items, without which they are over seeds.
        about: a study's settings, for what to do next.
        unit: in `UNITS`.
    """
    by = {r["method"]: r for r in rows}
    if "grasp" not in by:
        said = _plainly(by["plain"]["added"], unit)
        more = ["Add grasp to methods, and see what the guard changes."]
        return Verdict("unguarded", "No guarded run is among these.", [said], [], [], [], more)
    judged = (about or {}).get("judged", "unrelated")
    found = _found(by, runs, paired, judged)
    return Verdict(
        found.kind,
        _headline(found),
        _happened(found, by["grasp"], unit),
        _rivals(by, paired, judged),
        _sure(found, by, paired, judged, unit),
        _cost(found, runs, about or {}),
        _next(found, about or {}),
    )


def _found(
    by: Mapping[str, dict], runs: Sequence[dict], paired: Sequence[dict], judged: str
) -> Found:
    plain, guard = by["plain"], by["grasp"]
    task = (plain["task_score"][0], guard["task_score"][0])
    seeds = min(plain["seeds"], guard["seeds"])
    for p in pooled(paired):
        if (p["method"], p["measure"]) == ("grasp", judged):
            intervals = p["plain_beyond_benign"], p["beyond_own_benign"], p["difference"]
            return Found(*intervals, task, seeds, "items")
    apart = [b - a for a, b in zip(_added(runs, "plain"), _added(runs, "grasp"), strict=False)]
    over = "seeds" if seeds > 1 else ""
    return Found(plain["added"], guard["added"], interval(apart), task, seeds, over)


def _added(runs: Sequence[dict], method: str) -> list[float]:
    mine = sorted((r for r in runs if r["method"] == method), key=lambda r: r["seed"])
    return [r["drift"] - r["base_drift"] for r in mine]


def _headline(found: Found) -> str:
    gone = min(found.gone, 1.0) if found.plain[0] > 0 else 0.0
    if found.kind == "worked":
        most = "nearly all" if gone >= NEARLY else f"{100 * gone:.0f} %"
        return f"It worked: {most} of the drift is gone, and the task is learned."
    return {
        "helped": f"It helped: {100 * gone:.0f} % of the drift is gone; most is still there.",
        "costly": f"It cost too much: only {100 * found.learned:.0f} % of the task was learned.",
        "nothing": "There was nothing to prevent.",
        "untold": "It made no difference that these runs can tell.",
        "worse": "It made things worse.",
        "unlearned": "The plain fine-tune did not learn its task, so there is nothing to compare.",
    }[found.kind]


def _happened(found: Found, guard: dict, unit: str) -> list[str]:
    said = [_plainly(found.plain, unit)]
    if found.kind == "nothing":
        said.append(
            "That is away from bad answers: no guard was needed."
            if found.plain[2] < 0
            else "That can't be told apart from no shift at all: no guard was needed."
        )
    nil = found.over and found.guard[1] <= 0 <= found.guard[2]
    said.append(
        f"With the guard they moved by {signed(found.guard[0])}"
        + (", not told apart from 0." if nil else ".")
    )
    said.append(
        f"Of the task the guarded run learned {found.task[1]:.3f}, the plain one "
        f"{found.task[0]:.3f}."
    )
    same = guard.get("against_at_task")
    if same is not None and found.kind != "nothing":
        said.append(
            "A plain run that is stopped when it has learned as much, between two steps that were "
            f"looked at, moved them by {signed(same)}."
        )
    return said


def _plainly(added: Interval, unit: str) -> str:
    return (
        "Trained plainly, the model's answers on topics that it was never taught moved by "
        f"{signed(added[0])}{UNITS[unit].short}."
    )


def _sure(
    found: Found, by: Mapping[str, dict], paired: Sequence[dict], judged: str, unit: str
) -> list[str]:
    if not found.over:
        return ["One seed, one number each: how sure this is can't be said. Run more seeds."]
    which, (mean, low, high) = "difference that the guard made", found.difference
    if found.kind == "nothing":
        which, (mean, low, high) = "shift of the plain run", found.plain
    said = [
        f"The {which} is {signed(mean)}{UNITS[unit].short}, "
        f"95 % sure to lie between {signed(low)} and {signed(high)} (over "
        f"{'the questions' if found.over == 'items' else 'the seeds'})."
    ]
    if found.kind in ("worked", "helped") and low < high < 0:
        most, least = (100 * min(1, -end / found.plain[0]) for end in (low, high))
        said.append(f"That is {least:.0f} to {most:.0f} % of what plain training moved.")
    said.append(
        "One seed: another may say otherwise."
        if found.seeds == 1
        else f"Mean of {found.seeds} seeds."
    )
    if (random := by.get("random")) and found.kind in ("worked", "helped"):
        away = found.plain[0] - random["added"][0]
        chance = away > LIKE_CHANCE * -mean
        said.append(
            f"Blocking as many random directions left {signed(random['added'][0])}: "
            + (
                "much of the gain is not due to which directions are blocked."
                if chance
                else "what counts is which directions are blocked."
            )
        )
    return said


def _rivals(by: Mapping[str, dict], paired: Sequence[dict], judged: str) -> list[str]:
    """Those that added less than the guard: at as much of the task, or at less of it."""
    told = {
        p["method"]: p["grasp_difference"][1] > 0
        for p in pooled(paired)
        if p["measure"] == judged and "grasp_difference" in p
    }
    enough = ENOUGH * by["plain"]["task_score"][0]
    less = [
        r
        for method, r in by.items()
        if stem(method) not in OWN and not control(method)
        if r["added"][0] < by["grasp"]["added"][0] or told.get(method, False)
    ]
    said = []
    for able, at in ((True, "At as much"), (False, "At less")):
        found = [
            f"{name(r['method'])} ({signed(r['added'][0])}"
            + ("" if told.get(r["method"], True) else ", not told apart from the guard")
            + ")"
            for r in sorted(less, key=lambda r: r["added"][0])
            if (r["task_score"][0] >= enough) == able
        ]
        if found:
            said.append(f"{at} of the task less was left by {', '.join(found)}.")
    return said


def _cost(found: Found, runs: Sequence[dict], about: Mapping[str, Any]) -> list[str]:
    lost = 1 - found.learned if found.task[0] > 0 else 0.0
    less = f"{100 * lost:.0f} % less of the task was learned than plainly."
    said = [less if lost >= 0.005 else "The task was learned as well as plainly."]
    plain, guarded = (_steps(about, method) for method in ("plain", "grasp"))
    if plain and guarded and plain != guarded:
        said.append(f"It trained for {guarded} steps, the plain run for {plain}.")
    costs = [r["cost"] for r in runs if r["method"] == "grasp" and r.get("cost")]
    if costs:
        step, training, start, kept = (
            float(np.mean([c[key] for c in costs]))
            for key in ("step_seconds", "training_seconds", "start_seconds", "bases_bytes")
        )
        said.append(
            f"Time: {100 * step / max(training, 1e-9):.0f} % of {training:.0f} s of training, and "
            f"{start:.0f} s before it."
        )
        said.append(f"Memory: {kept / 1e9:.2g} GB beside the model.")
    return said


def _steps(about: Mapping[str, Any], method: str) -> int | None:
    """Of a study's method, where they were set."""
    own, all_of_them = about.get("by_method", {}).get(method, {}), about.get("finetune", {})
    names = ("max_steps", "steps")
    return next((s[n] for s in (own, all_of_them) for n in names if s.get(n) is not None), None)


def _next(found: Found, about: Mapping[str, Any]) -> list[str]:
    seeds = list(about.get("seeds", ()))
    said = {
        "worked": [],
        "helped": [
            "To prevent more, add prompts that are like those you care about (reference), block "
            "more (read: 0.99), or let the guard look at the plain run (drifted: true)."
        ],
        "costly": [
            "A guarded run learns more slowly: double its learning_rate or take a quarter more "
            "steps (by_method: {grasp: {learning_rate: ...}}), or block less (read: 0.95)."
        ],
        "nothing": [
            "Use the plain fine-tune. If you have seen it go wrong, put the questions on which it "
            "does into a file (question, good, bad) and give it as unrelated."
        ],
        "untold": ["Add seeds, or questions of your own (unrelated), so that less can be told."],
        "worse": ["Look at the answers below, and at what grasp.json says of each run."],
        "unlearned": ["Raise learning_rate or the steps until the plain run learns."],
    }[found.kind]
    if found.kind in ("worked", "helped") and about.get("out") and seeds:
        run = f"{about['out']}/grasp-{seeds[0]}"
        said = [
            f"Use the guarded adapter: {run}/adapter. `grasp verify {run}` recomputes that the "
            "guard held.",
            *said,
        ]
    if found.seeds == 1 and found.kind != "unlearned":
        said = [*said, "Run more seeds before you rely on it: seeds: [0, 1, 2]."]
    return said


def contenders(rows: Sequence[dict]) -> str:
    """Of one task's rows: the methods with enough of the task score, the least drift first.

    Without a rival of the guard's the table says as much, so nothing is said.
    """
    found = [f for f in best(rows) if not control(f["method"])]
    if not {f["method"] for f in found} - set(OWN):
        return ""
    able = [
        f"{name(f['best']['method'])} {signed(f['best']['added'][0])}" for f in found if f["best"]
    ]
    less = [name(f["method"]) for f in found if not f["best"]]
    return (
        f"Added drift of those with {100 * ENOUGH:.0f} % of the plain task score or more, each at "
        f"its best strength: {'; '.join(able)}."
        + (f" Less of the task: {'; '.join(less)}." if less else "")
    )


def itemwise(paired: Sequence[dict], measure: str) -> list[str]:
    """What each method adds on a measure beyond its control, and how sure that is: a line each."""
    return [
        f"{name(p['method'])}: {span(p['beyond_own_benign'])} beyond {against(p['control'])}; "
        f"less plain LoRA {span(p['difference'])}"
        + (f"; GRASP less it {span(p['grasp_difference'])}" if "grasp_difference" in p else "")
        for p in pooled(paired)
        if p["measure"] == measure
    ]
