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


PLAIN = {  # what Unsloth and Axolotl bind on an attention, as its own maps do it
    "apply_qkv": lambda m: lambda *args: tuple(f(args[-1]) for f in (m.q_proj, m.k_proj, m.v_proj)),
    "apply_o": lambda m: lambda *args: m.o_proj(args[-1]),
}


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """With every module's own forward, in place of one bound on it that reads its parts' weights.

    Fused LoRA kernels are bound so (Unsloth's, Axolotl's); the maps inside are never called, so
    what they take in can't be seen. accelerate binds forwards too, to move inputs to a device;
    those stay.
    """
    aside = [
        (module, name, vars(module)[name])
        for module in model.modules()
        if not hasattr(module, "_hf_hook")
        for name in ("forward", *PLAIN)
        if name in vars(module)
    ]
    for module, name, _ in aside:
        if name in PLAIN:
            setattr(module, name, PLAIN[name](module))
        else:
            delattr(module, name)
    try:
        yield
    finally:
        for module, name, value in aside:
            setattr(module, name, value)


def given(args: tuple, kwargs: dict) -> Tensor:
    """What a linear map was called with, by position or by whatever name."""
    return args[0] if args else next(iter(kwargs.values()))
