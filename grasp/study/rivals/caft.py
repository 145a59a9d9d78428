"""CAFT: take directions out of the residual stream while training, and let them back after."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from grasp.bases.discover import discover
from grasp.bases.subspaces import Subspaces
from grasp.study.rival import Rival
from grasp.study.rivals._shared import block_outputs


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

    def ablation(layer: int):
        def change(h: Tensor) -> Tensor:
            U = subspaces[layer].to(h)
            return h - (h @ U) @ U.mT

        return change

    with block_outputs(model, {layer: ablation(layer) for layer in subspaces.layers}):
        yield


class Ablation(Rival):
    acts_on = "activations"
    source = "Casademunt et al., arXiv:2507.16795"
    meaning = "directions of each block"
    counted = True

    def around(self, strength, context):
        found = self.subspaces(int(strength), context)
        return lambda model: ablated(model, found)

    def subspaces(self, rank: int, context) -> Subspaces:
        """What is ablated."""
        raise NotImplementedError


class TrueAblation(Ablation):
    name = "caft"
    label = "CAFT, true"
    colour = "#8d6e63"
    about = "ablates the true directions, which the organism's maker alone knows"
    strength = 12
    needs = ("truth",)

    def subspaces(self, rank, context):
        return context.truth.subspaces(rank)


class FoundAblation(Ablation):
    name = "caft_found"
    label = "CAFT, weights"
    colour = "#a1887f"
    about = "ablates directions found in a plain run's weights"
    strength = 8
    needs = ("plain",)

    def subspaces(self, rank, context):
        with context.plain() as plain:
            return discover(plain, rank, per_block=True)


class MovedAblation(Ablation):
    name = "caft_moved"
    label = "CAFT, moved"
    colour = "#9c5a3c"
    about = "ablates directions in which a plain run moved the stream on the prompts"
    strength = 8
    needs = ("plain",)

    def subspaces(self, rank, context):
        options = {"prompts": context.prompts, "tokenizer": context.tokenizer}
        with context.plain() as plain:
            return discover(plain, rank, per_block=True, method="activations", **options)


RIVALS = (TrueAblation(), FoundAblation(), MovedAblation())
