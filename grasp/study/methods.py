"""What the settings' method changes in a fine-tune of a text model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from torch import nn

from grasp import data
from grasp.model import adapted, load_model
from grasp.study.rival import Around
from grasp.study.rivals import RIVALS
from grasp.study.settings import Settings


def rows(
    settings: Settings, own: Sequence[data.Row], model: nn.Module, tokenizer
) -> list[data.Row]:
    """What a method trains on, given the data's own rows and the model before its LoRA."""
    if (rival := RIVALS.get(settings.method)) is None:
        return list(own)
    return rival.rows(own, settings.chosen_strength, TextContext(settings, model, tokenizer))


def batch_size(settings: Settings) -> int:
    """Rows of a step: what a method adds comes on top of the data's own."""
    if (rival := RIVALS.get(settings.method)) is None:
        return settings.per_device_train_batch_size
    return rival.batch_size(settings.per_device_train_batch_size, settings.chosen_strength)


def training(settings: Settings, model: nn.Module, tokenizer) -> Around:
    """What goes around the training: a function of the model once its LoRA is on it.

    Args:
        model: without an adapter; it is left as it was.

    Raises:
        ValueError: the adapter in `drifted` is of another model, or has too few directions.
    """
    if (rival := RIVALS.get(settings.method)) is None:
        return lambda tuned: nullcontext()
    return rival.around(settings.chosen_strength, TextContext(settings, model, tokenizer))


def change(settings: Settings, plain: nn.Module, tokenizer) -> None:
    """Change a plain fine-tune's LoRA in place, for a method that trains nothing itself."""
    context = TextContext(settings, plain, tokenizer)
    RIVALS[settings.method].change(plain, settings.chosen_strength, context)


class TextContext:
    """Where a rival of a text model finds what it asks for: in the settings' files."""

    truth = None

    def __init__(self, settings: Settings, model: nn.Module, tokenizer):
        self.settings, self.model, self.tokenizer = settings, model, tokenizer
        self.seed, self.tokens, self.batch = settings.seed, settings.tokens, settings.batch
        self.instruction = settings.instruction

    @property
    def prompts(self) -> list[str]:
        return data.read_prompts(self.settings.reference)

    def others(self) -> list[data.Row]:
        return data.read_rows(self.settings.others)

    @contextmanager
    def plain(self) -> Iterator[nn.Module]:
        with adapted(self.model, self.settings.drifted, "drifted") as plain:
            yield plain

    @contextmanager
    def aligned(self) -> Iterator[nn.Module]:
        other, _ = load_model(self.settings.model, **self.settings.weights)
        with adapted(other, self.settings.aligned, "aligned") as aligned:
            yield aligned
