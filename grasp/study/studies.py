"""Plain, guarded and control fine-tunes of a text model, and what each did on unrelated topics.

Everything is kept as it is made: an adapter for each run, a file of scores for each adapter. A
study that was killed goes on where it was.
"""

import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from grasp.files import read_json, write_json
from grasp.guard.trainer import CERTIFICATE
from grasp.study import finetune
from grasp.study.compare import compare, stem
from grasp.study.design import BENIGN, STOPPED, Study
from grasp.study.ending import LOG
from grasp.study.evaluate import interval
from grasp.study.looks import name
from grasp.study.paired import paired, twin
from grasp.study.scoring import BESIDE, Measures

ANSWERS = "answers.json"
SHOWN = ("plain", "grasp")  # whose answers stand beside the base model's


def run(study: Study, tell: Callable[[str], None] | None = None) -> dict:
    """Do what is not done yet, and summarise: `runs`, `summary`, `paired`, `samples` and `about`.

    Args:
        tell: is told what is done next, a line each.
    """
    study.check()
    _tell_lengths(study)
    tell = tell or (lambda line: None)
    out, measures = Path(study.out), Measures(study)
    measures.names  # noqa: B018 (reads them: what is not there is told before the first run)
    tell("Scoring the base model.")
    base = measures.scored(out / "base.json")
    # Others start from these two.
    first = sorted(study.methods, key=lambda method: method not in ("plain", "benign"))
    jobs = [(method, seed) for seed in study.seeds for method in first]
    for n, (method, seed) in enumerate(jobs, 1):
        tell(f"Run {n} of {len(jobs)}: {name(method)}, seed {seed}.")
        _made(study, measures, method, seed)
    result = summarise(measures, base) | {"samples": _samples(study, measures)}
    write_json(out / "results.json", result)
    return result


def _made(study: Study, measures: Measures, method: str, seed: int) -> None:
    """One fine-tune, and the scores of its adapters."""
    settings = study.settings(method, seed)
    # A benign run may have fewer steps of its own.
    stops = [s for s in study.stops if s < study.steps(method)] if method in STOPPED else []
    same = settings.weights == study.weights
    base = (lambda: measures.base) if same else None
    adapter = finetune.run(settings, keep=tuple(stops), base=base)
    folder = Path(settings.output_dir)
    measures.scored(folder / "scores.json", adapter)
    for step in stops:
        measures.scored(folder / f"scores-{step}.json", folder / f"adapter-{step}")


def _samples(study: Study, measures: Measures) -> list[dict]:
    """Questions with the base model's answer, and those of the first seed's runs."""
    if not study.samples:
        return []
    out, seed = Path(study.out), study.seeds[0]
    said = {"base": measures.answers(out / ANSWERS)}
    for method in (m for m in SHOWN if m in study.methods):
        folder = out / f"{method}-{seed}"
        said[method] = measures.answers(folder / ANSWERS, folder / "adapter")
    return [
        sample | {"answers": {who: answers[i].strip() for who, answers in said.items()}}
        for i, sample in enumerate(measures.samples)
    ]


def summarise(measures: Measures, base: dict[str, list[float]]) -> dict:
    """Every scored adapter of the study as a run: shifts from the base model, in nats per token.

    Task: mean shift towards the trained answers on held-out questions. Drift: mean shift towards
    the bad answers to unrelated questions. What the benign run of the same seed shifted, after as
    many steps if it was scored there, is style: it stands as `base_drift`, so that drift less base
    is what bad answers added. A guard, and a rival, hold style back too, so each is set against its
    own benign run where there is one.
    """
    study, runs = measures.study, []
    for seed in study.seeds:
        for method in study.methods:
            folder = Path(study.out) / f"{method}-{seed}"
            about = {"task": study.task, "method": method, "seed": seed}
            found = [(about | _took(folder), folder / "scores.json")]
            for step in study.stops if method in STOPPED else ():
                early = {"method": f"{STOPPED[method]}={step}", "step": step}
                found.append((about | early, folder / f"scores-{step}.json"))
            runs += [
                about | _shifts(measures, base, read_json(path))
                for about, path in found
                if path.exists()
            ]
    by = {(r["method"], r["seed"]): r for r in runs}
    for run in runs:
        benign = by.get(("benign", run["seed"]), {"drift": 0.0, "topics": {}})
        own = by.get((twin(run["method"]), run["seed"]), benign)
        run["base_drift"] = own["drift"]
        run["base_topics"] = {k: v[0] for k, v in own["topics"].items()}
    runs = [r for r in runs if stem(r["method"]) != STOPPED["benign"]]
    return {
        "runs": runs,
        "summary": compare(runs),
        "paired": paired(runs),
        "unit": "nats",
        "about": asdict(study),
    }


def _tell_lengths(study: Study) -> None:
    for method in study.methods:
        name = stem(method)
        if name == "plain" or name in BENIGN:
            continue
        control = next((m for m in (twin(method), "benign") if m in study.methods), "plain")
        ours, theirs = (study.steps(m) for m in (method, control))
        if ours != theirs:
            warnings.warn(
                f"{method} takes {ours} steps and {control}, which it is set against, {theirs}: "
                "shifts change with length, of good answers too; give both as many steps, or add "
                "a benign run of its own and length (benign_guarded, benign_kl=1) to methods",
                stacklevel=2,
            )


def _shifts(measures: Measures, base: dict, scores: dict) -> dict:
    judged = measures.study.judged
    shift = {k: np.array(scores[k]) - np.array(base[k]) for k in measures.names}
    topics = {k: v for k, v in shift.items() if k not in ("task", judged, *BESIDE)}
    names = np.array([pair.topic for pair in measures.pairs[judged]])
    topics |= {str(n): shift[judged][names == n] for n in dict.fromkeys(names) if n}
    return {
        "task_score": float(shift["task"].mean()),
        "drift": float(shift[judged].mean()),
        "base_drift": 0.0,
        "task_interval": interval(shift["task"]),
        "drift_interval": interval(shift[judged]),
        "topics": {k: interval(v) for k, v in topics.items()},
        # Of political propositions the direction means nothing, the distance does.
        "moved": {k: interval(np.abs(v)) for k, v in shift.items() if k == "propositions"},
        "items": {k: np.round(v, 4).tolist() for k, v in shift.items()},
    }


def _took(folder: Path) -> dict:
    """Seconds of a run's training, and what its guard cost, where its files say it."""
    found = {}
    log = read_json(folder / LOG) if (folder / LOG).exists() else []
    if seconds := [line["train_runtime"] for line in log if "train_runtime" in line]:
        found["seconds"] = seconds[-1]
    certificate = folder / CERTIFICATE
    if certificate.exists() and (cost := read_json(certificate).get("cost")):
        found["cost"] = cost
    return found
