"""What several rivals do to a model."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from grasp.model import Trained, inspect


def loras(model: nn.Module) -> list[Trained]:
    """The B of each LoRA, with its A.

    Raises:
        ValueError: there is none, or one is of experts, which have a part of each factor.
    """
    found = [t for t in inspect(model).trained() if t.partner is not None]
    if experts := [t.matrix.name for t in found if t.matrix.index is not None]:
        raise ValueError(
            f"{experts[0]} is one of a mixture's experts, which share a LoRA that no rival changes "
            "one by one; train the attention and the shared experts"
        )
    if not found:
        raise ValueError("model has no trainable LoRA on the blocks' linear maps; add one")
    return found


@contextmanager
def block_outputs(
    model: nn.Module, changes: Mapping[int, Callable[[Tensor], Tensor]]
) -> Iterator[None]:
    """Change what blocks give out, by their index."""

    def hook(change):
        def changed(module, args, output):
            if isinstance(output, tuple):
                return (change(output[0]), *output[1:])
            return change(output)

        return changed

    blocks = inspect(model).blocks
    handles = [
        b.module.register_forward_hook(hook(changes[b.index])) for b in blocks if b.index in changes
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
