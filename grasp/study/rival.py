"""What a rival of the guard is, and what it may ask of where it is tried."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import Tensor, nn

from grasp.bases.subspaces import Subspaces
from grasp.data import Row

PLACES = ("data", "loss", "activations", "gradients", "weights")  # the last after training
Around = Callable[[nn.Module], AbstractContextManager]


class Truth(Protocol):
    """What only the maker of a world knows of its factor."""

    def subspaces(self, rank: int) -> Subspaces: ...

    def directions(self) -> dict[int, Tensor]:
        """By block the mean shift `[d]` of its output."""


class Context(Protocol):
    """Where a rival is tried: a fine-tune of a text model, or of the organism."""

    seed: int
    tokens: int
    """Of a continuation of each prompt."""
    batch: int
    """Prompts that are looked at together."""
    truth: Truth | None
    """None on real data."""

    @property
    def model(self) -> nn.Module:
        """The base model, without an adapter; it must be left as it was."""

    @property
    def tokenizer(self): ...

    @property
    def prompts(self) -> list[str]:
        """Unlabelled, from unrelated topics."""

    @property
    def instruction(self) -> str:
        """The trait that nobody wants, asked for."""

    def others(self) -> Sequence[Row]:
        """Good rows on other topics."""

    def plain(self) -> AbstractContextManager[nn.Module]:
        """The plain fine-tune of the same rows."""

    def aligned(self) -> AbstractContextManager[nn.Module]:
        """A well-behaved fine-tune."""


class Rival:
    """Another way to the same end: what it is called, what it needs, what it changes.

    All that the project knows of a rival stands in its file under `study/rivals`; a file there that
    lists it in `RIVALS` makes it a method of `grasp finetune`, `grasp compare`, the report and the
    organism's experiments.
    """

    name: str
    """What settings call it."""
    label: str
    """What people read."""
    colour: str
    """In the report: "#rrggbb"."""
    acts_on: str
    """In `PLACES`."""
    source: str
    about: str
    """What it does, in half a line."""
    strength: float | None = None
    """The default of the number behind "name="; None for a rival that has none."""
    meaning: str = ""
    """Of the strength."""
    counted = False
    """Whether the strength is a number of directions."""
    needs: tuple[str, ...] = ()
    """Of `Context`: instruction, others, plain, aligned, truth."""
    trains = True
    """False: the plain fine-tune is changed afterwards instead."""
    joins = False
    """Whether it adds `strength` rows for each of the data's, on top of the batch."""

    def rows(self, own: Sequence[Row], strength: float | None, context: Context) -> list[Row]:
        """What is trained on, given the data's own rows."""
        return list(own)

    def around(self, strength: float | None, context: Context) -> Around:
        """What goes around the training: a function of the model once its LoRA is on it."""
        return lambda model: nullcontext()

    def change(self, model: nn.Module, strength: float | None, context: Context) -> None:
        """Change a plain fine-tune's LoRA in place, where the rival trains nothing."""

    def batch_size(self, own: int, strength: float | None) -> int:
        """Rows of a step, given the data's own."""
        return round((1 + strength) * own) if self.joins else own
