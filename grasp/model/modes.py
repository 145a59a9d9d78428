"""States that a model is put into for a while, and what its modules are given."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn


@contextmanager
def base_model(model: nn.Module) -> Iterator[None]:
    """Run the model without its adapters, where it has any."""
    with model.disable_adapter() if hasattr(model, "disable_adapter") else ExitStack():
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout; afterwards every module is in the mode it was in, which may be mixed."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def given(args: tuple, kwargs: dict) -> Tensor:
    """What a linear map was called with, by position or by whatever name."""
    return args[0] if args else next(iter(kwargs.values()))
