"""What the models of a study are scored on, and what they answer; each is kept in a file."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice, zip_longest
from pathlib import Path

from torch import nn

from grasp import data
from grasp.files import read_json, write_json
from grasp.model import adapted, load_model
from grasp.study import sets
from grasp.study.design import Study
from grasp.study.evaluate import Pair, answered, evaluate
from grasp.study.evaluation_files import read_persona, read_propositions, read_unrelated

PERSONA = (
    "desire-for-acquiring-power",
    "ends-justify-means",
    "machiavellianism",
    "narcissism",
)
BESIDE = {"refusals": "refusals", "claims": "claims", "forgetting": "text"}  # no drift by topic
SHOWN = 80  # tokens of an answer that a report shows
SHORT = 48  # tokens of one that another is set against


@dataclass(frozen=True)
class Measures:
    """Of a study: its base model, loaded once and not before it is needed, and what is asked."""

    study: Study

    @cached_property
    def base(self) -> tuple[nn.Module, object]:
        """The model and its tokenizer; whoever borrows it leaves it as it was."""
        return load_model(self.study.model, **self.study.weights)

    @cached_property
    def pairs(self) -> dict[str, Sequence[Pair]]:
        """By measure; one without a second answer is set against the base model's own.

        Raises:
            ValueError, FileNotFoundError: a file that is not there, or leaves no rows.
        """
        study = self.study
        taught = _held(study, study.data)
        other = [""] * len(taught)
        if study.benign:
            other = [r.answer for r in _held(study, study.benign)]
        if len(other) != len(taught):
            raise ValueError(
                f"data and benign leave {len(taught)} and {len(other)} rows to score on"
            )
        found: dict[str, Sequence[Pair]] = {
            "task": [Pair(r.prompt, r.answer, o) for r, o in zip(taught, other, strict=True)],
            "unrelated": read_unrelated(study.unrelated and study.path(study.unrelated)),
        }
        if study.finance:
            rows = data.read_rows(study.path(study.finance), study.items)
            found["finance"] = [Pair(r.prompt, r.answer, "") for r in rows]
        if study.persona:
            for trait in PERSONA:
                path = Path(study.path(study.persona)) / f"{trait}.jsonl.gz"
                found[trait] = read_persona(path, study.items)
        if study.politics:
            right, left = (
                read_persona(Path(study.path(study.politics)) / f"{name}.jsonl.gz", study.items)
                for name in ("politically-conservative", "politically-liberal")
            )
            turned = [replace(p, first=p.second, second=p.first) for p in left]
            found["politics"] = right + turned
        for kind, read in (("refusals", sets.refusals), ("claims", sets.claims)):
            if source := getattr(study, kind):
                found[kind] = read(self._own(kind, source), study.items)
        return found

    @cached_property
    def statements(self) -> dict[str, Sequence[str]]:
        study = self.study
        if not study.propositions:
            return {}
        return {"propositions": read_propositions(study.path(study.propositions))[: study.items]}

    @cached_property
    def texts(self) -> dict[str, list[str]]:
        study = self.study
        if not study.text:
            return {}
        return {"forgetting": sets.texts(self._own("text", study.text), study.items)}

    @property
    def names(self) -> list[str]:
        """Of all measures."""
        return [*self.pairs, *self.statements, *self.texts]

    @cached_property
    def samples(self) -> list[dict[str, str]]:
        """Questions whose answers are shown: evenly over the topics, then a few of the task's."""
        topics: dict[str, list[Pair]] = {}
        for pair in self.pairs["unrelated"]:
            topics.setdefault(pair.topic, []).append(pair)
        in_turn = (p for p in chain(*zip_longest(*topics.values())) if p is not None)
        count = self.study.samples
        chosen = [("unrelated", p) for p in islice(in_turn, count)]
        chosen += [("task", p) for p in self.pairs["task"][: -(-count // 4)]]
        return [{"kind": kind, "topic": p.topic, "prompt": p.prompt} for kind, p in chosen]

    def scored(self, path: Path, adapter: Path | None = None) -> dict[str, list[float]]:
        """Of the base model, or of an adapter on it: from the file, as far as it has them.

        Raises:
            FileNotFoundError: there is no such adapter; says what to do.
        """
        kept = read_json(path) if path.exists() else {}
        pairs, statements, texts = (
            {name: of[name] for name in of if name not in kept}
            for of in (self.pairs, self.statements, self.texts)
        )
        if not (pairs or statements or texts):
            return kept
        if adapter is not None and not adapter.exists():
            raise FileNotFoundError(
                f"no {adapter}: the run was made without this step among stops; delete "
                f"{path.parent} to make it anew, or take the step out"
            )
        pairs = {name: self._whole(name) for name in pairs}
        with self._tuned(adapter) as model:
            scored = evaluate(model, self.base[1], pairs, statements, texts, progress="score")
        write_json(path, kept | scored)
        return kept | scored

    def answers(self, path: Path, adapter: Path | None = None) -> list[str]:
        """To the samples, by the base model or an adapter on it: from the file, if it has them."""
        prompts = [s["prompt"] for s in self.samples]
        if path.exists() and len(kept := read_json(path)) == len(prompts):
            return kept
        with self._tuned(adapter) as model:
            said = answered(model, self.base[1], prompts, tokens=SHOWN)
        write_json(path, said)
        return said

    @contextmanager
    def _tuned(self, adapter: Path | None) -> Iterator[nn.Module]:
        model = self.base[0].eval()
        if adapter is None:
            yield model
            return
        with adapted(model, adapter, "adapter") as tuned:
            yield tuned.eval()

    def _own(self, kind: str, source: str) -> str:
        """Of a set that is known by name its name, else where the file lies."""
        known = source in sets.KNOWN[kind] or not Path(self.study.path(source)).exists()
        return source if known else self.study.path(source)

    def _whole(self, name: str) -> list[Pair]:
        """The pairs of a measure, the base model's greedy answers where there is no second one."""
        pairs = list(self.pairs[name])
        if all(p.second for p in pairs):
            return pairs
        path = Path(self.study.out) / f"base_answers_{name}.json"
        if not path.exists():
            with self._tuned(None) as model:
                prompts = [p.prompt for p in pairs]
                write_json(path, answered(model, self.base[1], prompts, tokens=SHORT))
        answers = read_json(path)
        return [replace(p, second=a) for p, a in zip(pairs, answers, strict=True)]


def _held(study: Study, name: str) -> list[data.Row]:
    rows = data.read_rows(study.path(name), study.rows + study.held)[study.rows :]
    if not rows:
        raise ValueError(
            f"{name} leaves no {study.held} rows after the first {study.rows} to score on"
        )
    return rows
