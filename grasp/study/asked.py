"""What a model is asked in one evaluation, by measure, and its scores."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from grasp.study import evaluation_files as files
from grasp.study import sets
from grasp.study.evaluate import Pair, evaluate, multiple_choice, text_ids


@dataclass
class Asked:
    """By the name of each measure its items, and which of `measures.MEASURES` it is."""

    pairs: dict[str, list[Pair]] = field(default_factory=dict)
    statements: dict[str, list[str]] = field(default_factory=dict)
    texts: dict[str, list[str]] = field(default_factory=dict)
    choices: list[dict[str, Any]] = field(default_factory=list)
    kinds: dict[str, str] = field(default_factory=dict)

    def name(self, name: str, kind: str) -> str:
        """The name, taken once.

        Raises:
            ValueError: another measure has it.
        """
        if name in self.kinds or name == "judged":
            raise ValueError(
                f"two measures are called {name!r}; give each file once, under a name of its own"
            )
        self.kinds[name] = kind
        return name

    def score(
        self, model: nn.Module, tokenizer, batch_size: int = 16, progress: str | None = None
    ) -> dict[str, list[float]]:
        """A number for each item of each measure; arguments as `evaluate`."""
        size = {"batch_size": batch_size, "progress": progress}
        found = evaluate(model, tokenizer, self.pairs, self.statements, self.texts, **size)
        if self.choices:
            size["progress"] = None if progress is None else f"{progress}: choices"
            found["choices"] = multiple_choice(model, tokenizer, self.choices, **size).tolist()
        return found

    def tokens(self, tokenizer) -> dict[str, list[int]]:
        """Of each text how many tokens its loss is the mean of."""
        return {n: [len(i) - 1 for i in text_ids(tokenizer, t)] for n, t in self.texts.items()}

    def samples(self, tokenizer) -> dict[str, list]:
        """What each number is of, in the order of the scores; texts as far as they are scored."""
        found: dict[str, list] = {n: [asdict(p) for p in items] for n, items in self.pairs.items()}
        found |= self.statements
        for name, texts in self.texts.items():
            found[name] = tokenizer.batch_decode(
                text_ids(tokenizer, texts), skip_special_tokens=True
            )
        return found | ({"choices": self.choices} if self.choices else {})


def gather(
    *,
    unrelated: Path | None = None,
    persona: Iterable[Path] = (),
    propositions: Path | None = None,
    choices: Path | None = None,
    refusals: Sequence[str] = (),
    claims: Sequence[str] = (),
    text: Sequence[str] = (),
    limit: int | None = None,
) -> Asked:
    """Read what is asked for; `limit` items of each measure at most.

    Raises:
        FileNotFoundError, ValueError: one is not there or of another form, or two have one name.
    """
    asked = Asked()
    asked.pairs[asked.name("unrelated", "unrelated")] = files.read_unrelated(unrelated)[:limit]
    for path in persona:
        name = asked.name(path.name.split(".")[0], "persona")
        asked.pairs[name] = files.read_persona(path, limit)
    if propositions is not None:
        name = asked.name("propositions", "propositions")
        asked.statements[name] = files.read_propositions(propositions)[:limit]
    for kind, sources, read in (
        ("refusals", refusals, sets.refusals),
        ("claims", claims, sets.claims),
    ):
        for source in sources:
            asked.pairs[asked.name(sets.name_of(source), kind)] = read(source, limit)
    for source in text:
        asked.texts[asked.name(sets.name_of(source), "text")] = sets.texts(source, limit)
    if choices is not None:
        asked.name("choices", "choices")
        asked.choices = files.read_choices(choices, limit)
    return asked
