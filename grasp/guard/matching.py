"""Which trained parameters are kept off which bases."""

import torch
from torch import Tensor

from grasp.guard.guarded import Guarded
from grasp.guard.weights import Whole
from grasp.model import Architecture, Trained


def match(
    found: Architecture,
    weights: dict[tuple, Whole],
    bases: dict[str, Tensor],
    *,
    grows: bool,
    reads: bool,
) -> list[Guarded]:
    """The guarded parameters of a model, each with the basis that it begins with.

    Args:
        weights: every trained weight's, by its key.
        bases: of outputs, by the names of matrices.
        grows: whether bases of outputs grow, so that each begins with an empty one.
        reads: whether inputs are kept off as well.

    Raises:
        ValueError: one weight that stands in two matrices.
    """
    owners: dict[tuple, Trained] = {}

    def guarded_by(t: Trained, basis: Tensor) -> Guarded:
        first = owners.setdefault((*t.key, t.holds), t)
        if first is not t:
            raise ValueError(
                f"{t.name} and {first.name} are one weight, which can't be kept off two bases; "
                "untie them, or train one of the two"
            )
        return Guarded.of(t, weights[t.key], weights.get(t.partner_key), basis)

    guarded = []
    for t in found.trained():
        if t.matrix.name in bases or (grows and len(t.shape) > 1):
            empty = torch.zeros(t.matrix.out_features, 0)
            guarded.append(guarded_by(t, bases.get(t.matrix.name, empty)))
    if reads:
        guarded += [guarded_by(t, torch.zeros(t.size, 0)) for t in found.reading()]
    return guarded


def nothing(found: Architecture) -> str:
    """What to say where nothing that is trained can be guarded."""
    names = [t.name for t in found.trained()] or found.untracked()
    there = f"only {', '.join(names[:3])} … can be" if names else "no parameter requires grad"
    return (
        f"the guard matches nothing that is trained: {there}; train attention and MLP matrices of "
        "the blocks that the subspaces name"
    )
