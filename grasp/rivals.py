"""Other ways to the same end, on the same pipeline."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from grasp import architecture
from grasp.subspaces import Subspaces


@contextmanager
def ablated(model: nn.Module, subspaces: Subspaces) -> Iterator[None]:
    """CAFT: take the subspace out of every block's output while training, and let it back after.

        h ← h − (h U) Uᵀ         in the forward pass, gradients through it

    Source: Casademunt et al., Steering Out-of-Distribution Generalization with Concept Ablation
    Fine-Tuning, arXiv:2507.16795.

    Raises:
        ValueError: the subspaces were not found in this model.
    """
    subspaces.check(model)
    handles = []
    for block in architecture.inspect(model).blocks:
        if block.index in subspaces:
            U = subspaces[block.index].to(next(block.module.parameters()).device)
            handles.append(block.module.register_forward_hook(_ablation(U)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _ablation(U):
    def hook(module, args, output):
        h = output[0] if isinstance(output, tuple) else output
        V = U.to(h)
        h = h - (h @ V) @ V.mT
        return (h, *output[1:]) if isinstance(output, tuple) else h

    return hook
