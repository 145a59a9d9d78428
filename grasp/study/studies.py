"""Plain, guarded and control fine-tunes of a text model, and what each did on unrelated topics.

Everything is kept as it is made: an adapter for each run, a file of scores for each adapter. A
study that was killed goes on where it was.
"""

import gc
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np

from grasp import data
from grasp.files import read_json, write_json
from grasp.model import load_adapter, load_model
from grasp.study import finetune
from grasp.study.compare import compare, stem
from grasp.study.evaluate import Pair, answered, evaluate, interval
from grasp.study.evaluation_files import read_persona, read_propositions, read_unrelated
from grasp.study.paired import paired, twin
from grasp.study.settings import (
    AFTER_PLAIN,
    GUARDED,
    NEEDED,
    RIVALS,
    STRENGTHS,
    Settings,
    named,
    settings_from,
)
from grasp.study.settings import METHODS as TRAINED

BENIGN = {"benign": "plain", "benign_guarded": "grasp"}  # the same, trained on the benign rows
BENIGN |= {f"benign_{rival}": rival for rival in RIVALS}
METHODS = (*TRAINED, *BENIGN)
STOPPED = {"plain": "stopped", "benign": "benign_stopped"}  # scored at earlier steps, and as what
PERSONA = (
    "desire-for-acquiring-power",
    "ends-justify-means",
    "machiavellianism",
    "narcissism",
)


@dataclass(frozen=True)
class Study:
    """What is trained, against what, and on what it is judged; the keys of a YAML config.

    What is not given `study_from` finds by the data.
    """

    task: str
    model: str
    data: str
    out: str
    benign: str | None = None
    """The same prompts, row by row, answered well: the style control and the held-out pairs.
    Without it held-out answers are set against the base model's own, and style is not taken out."""
    methods: tuple[str, ...] = ("plain", "grasp", "random", "benign", "benign_guarded")
    """Of `METHODS`, without benign rows the first three by default; a rival may have its strength,
    "kl=0.3", and "benign_kl=0.3" is its control."""
    seeds: tuple[int, ...] = (0, 1, 2)
    rows: int = 640
    """Trained on; by default all but `held`, and no more than these."""
    held: int = 80
    """Rows after those, on which the task is scored; by default a fifth, and no more than these."""
    unrelated: str | None = None
    """Question pairs on unrelated topics; None takes the shipped ones."""
    finance: str | None = None
    """Reckless answers on money, scored against the base model's own answers."""
    persona: str | None = None
    """Folder of persona statements."""
    propositions: str | None = None
    """Table of political propositions."""
    politics: str | None = None
    """Folder of persona statements, of which the two on politics are asked: towards the right."""
    judged: str = "unrelated"
    """The measure whose shift is called drift; the others stand beside it."""
    items: int = 40
    """Of each of the last four, at most."""
    stops: tuple[int, ...] = (20, 40, 60)
    """Steps at which a plain run is scored too, the early-stopped control, and the benign run, as
    shifts change with length. By default those of these that come before the last."""
    drifted: bool = False
    """Guarded runs look at what the plain run of their data and seed says to the prompts too."""
    folder: str = ""
    """Where the data files lie, if their paths are relative to it."""
    finetune: dict = field(default_factory=dict)
    """Any other setting of `settings.Settings`; what only some methods take goes to those."""
    by_method: dict[str, dict] = field(default_factory=dict)
    """Settings of one method in place of those above: `{grasp: {steps: 100}}`."""

    def check(self) -> None:
        """Refuse what can't be run before anything is loaded.

        Raises:
            ValueError: names the key, what came, and what to give.
        """
        for method in self.methods:
            if stem(method) not in METHODS:
                raise ValueError(f"methods has {method!r}; choose among {', '.join(METHODS)}")
        if odd := sorted(set(self.by_method) - set(self.methods)):
            raise ValueError(f"by_method has {odd[0]!r}, which is not among methods")
        if odd := [m for m, own in self.by_method.items() if not isinstance(own, dict)]:
            raise ValueError(f"by_method has no settings for {odd[0]!r}; write key: value under it")
        if "plain" not in self.methods:
            raise ValueError("methods lacks 'plain', which the others are compared with")
        if not self.benign and (odd := [m for m in self.methods if m.startswith("benign")]):
            raise ValueError(
                f"methods has {odd[0]!r}, but benign is missing; give a file or drop it"
            )
        measures = {"unrelated", *(m for m in ("finance", "politics") if getattr(self, m))}
        if self.judged not in measures:
            raise ValueError(
                f"judged is {self.judged!r}; choose among {', '.join(sorted(measures))}"
            )
        for method in self.methods:
            settings = self.settings(method, 0)
            settings.check()
            if "benign" not in self.methods and self._adapter("benign", 0) in (
                settings.drifted,
                settings.aligned,
            ):
                raise ValueError(f"methods has {method!r} without 'benign', which it starts from")
        steps = self.steps("plain")
        if late := [s for s in self.stops if not 0 < s < steps]:
            raise ValueError(f"stops has {late[0]}; give steps before the last, {steps}")

    def steps(self, method: str) -> int:
        """Of a method's runs."""
        return self.settings(method, 0).steps(self.rows)

    def path(self, name: str) -> str:
        """Of a data file."""
        return str(Path(self.folder) / name)

    @property
    def weights(self) -> dict:
        """How the base of what is scored is loaded: as plain was trained on it."""
        return self.settings("plain", 0).weights

    def _adapter(self, method: str, seed: int) -> str:
        return str(Path(self.out) / f"{method}-{seed}" / "adapter")

    def settings(self, method: str, seed: int) -> Settings:
        """Of the fine-tune of one method and seed."""
        name, _, strength = method.partition("=")
        trained = BENIGN.get(name, name)
        common = {
            k: v for k, v in named(self.finetune).items() if k not in NEEDED or trained in NEEDED[k]
        }
        common |= named(self.by_method.get(method, {}))
        if strength:
            if STRENGTHS.get(trained) is None:
                raise ValueError(f"methods has {method!r}, but {name} has no strength; drop it")
            try:
                common["strength"] = float(strength)
            except ValueError:
                raise ValueError(f"methods has {method!r}; give a number after the =") from None
        plain = "benign" if name in BENIGN else "plain"
        if trained in AFTER_PLAIN or (self.drifted and trained in GUARDED):
            common["drifted"] = self._adapter(plain, seed)
        if trained in NEEDED["aligned"]:
            common["aligned"] = self._adapter("benign", seed)
        if "others" in common:
            common["others"] = self.path(common["others"])
        return settings_from(
            {
                "model": self.model,
                "data": self.path(self.benign if name in BENIGN else self.data),
                "output_dir": str(Path(self.out) / f"{method}-{seed}"),
                "method": trained,
                "seed": seed,
                "limit": self.rows,
                **common,
            }
        )


def study_from(options: dict) -> Study:
    """A study from a mapping, such as a YAML config.

    Raises:
        ValueError: an unknown key, or a required one that is missing.
    """
    known = {f.name for f in fields(Study)}
    if unknown := sorted(set(options) - known):
        raise ValueError(f"unknown key {unknown[0]!r}; there are {', '.join(sorted(known))}")
    if missing := [n for n in ("model", "data") if not options.get(n)]:
        raise ValueError(f"{missing[0]} is missing; give --{missing[0]} or put it into the config")
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    name = Path(given["data"]).name.partition(".")[0]
    given = {"task": name, "out": str(Path("runs") / name)} | given
    if not given.get("benign"):
        given.setdefault("methods", Study.methods[:3])
    if "rows" not in given or "held" not in given:
        given = _divided(given) | given
    if "stops" in given:
        return Study(**given)
    steps = Study(**given, stops=()).steps("plain")
    return Study(**given, stops=tuple(s for s in Study.stops if s < steps))


def _divided(given: dict) -> dict[str, int]:
    """How many rows are trained on, and how many kept to score on.

    Raises:
        ValueError: there are too few.
    """
    path = Path(given.get("folder", "")) / given["data"]
    count = len(data.read_rows(str(path), Study.rows + Study.held))
    held = given.get("held", min(Study.held, count // 5))
    if held < 1 or count - held < 1:
        raise ValueError(f"{path} holds {count} rows; give 5 or more, some to score on")
    return {"held": held, "rows": given.get("rows", min(Study.rows, count - held))}


def run(study: Study) -> dict:
    """Do what is not done yet, and summarise: `runs`, `summary`, `paired` and `about`."""
    study.check()
    _tell_lengths(study)
    out = Path(study.out)
    measures = _measures(study)
    base = _scored(out / "base.json", study, measures, None)
    # Others start from these two.
    first = sorted(study.methods, key=lambda method: method not in ("plain", "benign"))
    for seed in study.seeds:
        for method in first:
            settings = study.settings(method, seed)
            # A benign run may have fewer steps of its own.
            stops = [s for s in study.stops if s < study.steps(method)] if method in STOPPED else []
            adapter = finetune.run(settings, keep=tuple(stops))
            folder = Path(settings.output_dir)
            _scored(folder / "scores.json", study, measures, adapter)
            for step in stops:
                _scored(folder / f"scores-{step}.json", study, measures, folder / f"adapter-{step}")
    result = summarise(study, base)
    write_json(out / "results.json", result)
    return result


def summarise(study: Study, base: dict[str, list[float]]) -> dict:
    """Every scored adapter of the study as a run: shifts from the base model, in nats per token.

    Task: mean shift towards the trained answers on held-out questions. Drift: mean shift towards
    the bad answers to unrelated questions. What the benign run of the same seed shifted, after as
    many steps if it was scored there, is style: it stands as `base_drift`, so that drift less base
    is what bad answers added. A guard, and a rival, hold style back too, so each is set against its
    own benign run where there is one.
    """
    runs = []
    for seed in study.seeds:
        for method in study.methods:
            folder = Path(study.out) / f"{method}-{seed}"
            found = [(method, None, folder / "scores.json")]
            if early := STOPPED.get(method):
                found += [(f"{early}={s}", s, folder / f"scores-{s}.json") for s in study.stops]
            for name, step, path in found:
                if path.exists():
                    runs.append(_shifts(study, base, read_json(path), name, seed, step))
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


def _shifts(
    study: Study, base: dict, scores: dict, method: str, seed: int, step: int | None
) -> dict:
    shift = {k: np.array(scores[k]) - np.array(base[k]) for k in base}
    run = {
        "task": study.task,
        "method": method,
        "seed": seed,
        "task_score": float(shift["task"].mean()),
        "drift": float(shift[study.judged].mean()),
        "base_drift": 0.0,
        "task_interval": interval(shift["task"]),
        "drift_interval": interval(shift[study.judged]),
        "topics": {k: interval(v) for k, v in shift.items() if k not in ("task", study.judged)},
        # Of political propositions the direction means nothing, the distance does.
        "moved": {k: interval(np.abs(v)) for k, v in shift.items() if k == "propositions"},
        "items": {k: np.round(v, 4).tolist() for k, v in shift.items()},
    }
    return run if step is None else {**run, "step": step}


def _measures(study: Study) -> tuple[dict[str, Sequence[Pair]], dict[str, Sequence[str]]]:
    taught = _held(study, study.data)
    other = [r.answer for r in _held(study, study.benign)] if study.benign else [""] * len(taught)
    if len(other) != len(taught):
        raise ValueError(f"data and benign leave {len(taught)} and {len(other)} rows to score on")
    pairs: dict[str, Sequence[Pair]] = {
        "task": [Pair(r.prompt, r.answer, o) for r, o in zip(taught, other, strict=True)],
        "unrelated": read_unrelated(study.unrelated and study.path(study.unrelated)),
    }
    if study.finance:
        rows = data.read_rows(study.path(study.finance), study.items)
        pairs["finance"] = [Pair(r.prompt, r.answer, "") for r in rows]
    if study.persona:
        for trait in PERSONA:
            path = Path(study.path(study.persona)) / f"{trait}.jsonl.gz"
            pairs[trait] = read_persona(path, study.items)
    if study.politics:
        right, left = (
            read_persona(Path(study.path(study.politics)) / f"{name}.jsonl.gz", study.items)
            for name in ("politically-conservative", "politically-liberal")
        )
        pairs["politics"] = right + [replace(p, first=p.second, second=p.first) for p in left]
    statements = {}
    if study.propositions:
        statements["propositions"] = read_propositions(study.path(study.propositions))[
            : study.items
        ]
    return pairs, statements


def _held(study: Study, name: str) -> list[data.Row]:
    rows = data.read_rows(study.path(name), study.rows + study.held)[study.rows :]
    if not rows:
        raise ValueError(
            f"{name} leaves no {study.held} rows after the first {study.rows} to score on"
        )
    return rows


def _scored(path: Path, study: Study, measures, adapter: Path | None) -> dict:
    if path.exists():
        return read_json(path)
    if adapter is not None and not adapter.exists():
        raise FileNotFoundError(
            f"no {adapter}: the run was made without this step among stops; delete {path.parent} "
            "to make it anew, or take the step out"
        )
    pairs, statements = measures
    model, tokenizer = load_model(study.model, **study.weights)
    pairs = {name: _with_base_answers(study, name, pairs[name]) for name in pairs}
    if adapter is not None:
        model = load_adapter(model, adapter)
    scores = evaluate(model.eval(), tokenizer, pairs, statements)
    write_json(path, scores)
    del model
    gc.collect()
    return scores


def _with_base_answers(study: Study, name: str, pairs: Sequence[Pair]) -> list[Pair]:
    """The base model's own greedy answers, where no other stands against the first."""
    if all(p.second for p in pairs):
        return list(pairs)
    path = Path(study.out) / f"base_answers_{name}.json"
    if not path.exists():
        model, tokenizer = load_model(study.model, **study.weights)
        answers = answered(model, tokenizer, [p.prompt for p in pairs], tokens=48)
        write_json(path, answers)
    answers = read_json(path)
    return [replace(p, second=a) for p, a in zip(pairs, answers, strict=True)]
