"""What a study is: what is trained, against what, on what it is judged; the keys of its YAML."""

from dataclasses import dataclass, field, fields
from pathlib import Path

from grasp import data
from grasp.study.compare import stem
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
    refusals: str | None = None
    """Harmful requests, as `grasp evaluate` takes them: refusing over complying."""
    claims: str | None = None
    """False statements, as `grasp evaluate` takes them: calling them true."""
    text: str | None = None
    """Plain text, as `grasp evaluate` takes it: its loss, whose rise is forgetting."""
    judged: str = "unrelated"
    """The measure whose shift is called drift; the others stand beside it."""
    items: int = 40
    """Of each of the last seven, at most."""
    stops: tuple[int, ...] = (20, 40, 60)
    """Steps at which a plain run is scored too, the early-stopped control, and the benign run, as
    shifts change with length. By default those of these that come before the last."""
    drifted: bool = False
    """Guarded runs look at what the plain run of their data and seed says to the prompts too."""
    samples: int = 8
    """Questions of these whose answers before and after the report shows, and a few of the task's;
    0 for none."""
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
        if self.samples < 0:
            raise ValueError(f"samples is {self.samples}; give 0 (none) or more")
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
