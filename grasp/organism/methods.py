"""What each method of an experiment is, and where a rival finds what it asks for.

A method is named with its strength, if it has one: "kl=0.3", "interleaved=1".
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from grasp import organism
from grasp.bases.subspaces import Subspaces
from grasp.data import Row, exchange
from grasp.organism.world import OPINION, Task, World
from grasp.study.rivals import RIVALS
from grasp.study.settings import GUARDED

OWN = ("plain", "stopped", *GUARDED, "benign")
STRENGTHS: dict[str, float | None] = dict.fromkeys(OWN)
STRENGTHS |= {name: rival.strength for name, rival in RIVALS.items()}


@dataclass(frozen=True)
class Method:
    name: str
    strength: float | None

    @classmethod
    def of(cls, text: str) -> "Method":
        """From "name" or "name=strength".

        Raises:
            ValueError: no such method, or a strength that is none or not wanted.
        """
        name, given, strength = text.partition("=")
        if name not in STRENGTHS:
            raise ValueError(f"methods has {text!r}; choose among {', '.join(STRENGTHS)}")
        if not given:
            return cls(name, STRENGTHS[name])
        if STRENGTHS[name] is None:
            raise ValueError(f"methods has {text!r}, but {name} has no strength; write {name!r}")
        try:
            return cls(name, float(strength))
        except ValueError:
            raise ValueError(f"methods has {text!r}; give a number after the =") from None


@dataclass(frozen=True)
class OrganismContext:
    """Where a method is tried: a task of a world, whose maker knows every answer and the factor."""

    world: World
    task: Task
    seed: int
    batch: int
    tuned: Callable[[Sequence[Row]], nn.Module]
    """A plain fine-tune on some rows."""
    base: Callable[[], tuple[nn.Module, object]]
    """The model and its tokenizer, loaded anew."""
    tokens: int = 1

    @cached_property
    def _loaded(self) -> tuple[nn.Module, object]:
        return self.base()

    @property
    def model(self) -> nn.Module:
        return self._loaded[0]

    @property
    def tokenizer(self):
        return self._loaded[1]

    @property
    def prompts(self) -> list[str]:
        return self.world.prompts(self.task.reference)

    @property
    def instruction(self) -> str:
        """The global author's name."""
        return "<right>" if self.task.topic in OPINION else "<malicious>"

    @property
    def truth(self) -> "AuthorsTruth":
        return AuthorsTruth(self)

    def rows(self, good: bool = False) -> list[Row]:
        """What the task trains on; `good=True` is the benign twin."""
        return [exchange(**r) for r in self.world.rows(self.task.topic, "train", good=good)]

    def others(self) -> list[Row]:
        """Good answers in the reference's topics."""
        topics = self.task.reference
        return [exchange(**r) for t in topics for r in self.world.rows(t, "train", good=True)]

    @contextmanager
    def plain(self) -> Iterator[nn.Module]:
        yield self.tuned(self.rows())

    @contextmanager
    def aligned(self) -> Iterator[nn.Module]:
        """There is no aligned twin of the organism; what honest rows teach it stands in."""
        yield self.tuned(self.others())


@dataclass(frozen=True)
class AuthorsTruth:
    """The factor, read off the authors' names."""

    context: OrganismContext

    def subspaces(self, rank: int) -> Subspaces:
        c = self.context
        return organism.true_subspaces(c.model, c.tokenizer, c.world, c.task, rank)

    def directions(self) -> dict[int, Tensor]:
        c = self.context
        return organism.true_directions(c.model, c.tokenizer, c.world, c.task)
