"""A penalty on the divergence from the base model on unrelated prompts."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from grasp.data import Reference
from grasp.guard.steps import Steps
from grasp.model import evaluating
from grasp.study.rival import Rival


@contextmanager
def penalised(model: nn.Module, reference: Reference, weight: float) -> Iterator[None]:
    """Add `weight · KL(base ‖ model)` on some of the reference's prompts to the loss of each step.

    The penalty's gradient joins the step's own after that was clipped. Source: Kaczér et al.,
    arXiv:2508.06249, among others.

    Raises:
        ValueError: a negative weight.
    """
    if weight < 0:
        raise ValueError(f"weight is {weight}; give 0 or more")

    def add(optimizer) -> None:
        with evaluating(model), torch.enable_grad():
            (weight * reference.divergence(model, reference.sample())).backward()

    handle = Steps().before(add)
    try:
        yield
    finally:
        handle.remove()


class KL(Rival):
    name = "kl"
    label = "KL penalty"
    colour = "#c2a05b"
    acts_on = "loss"
    source = "Kaczér et al., arXiv:2508.06249, among others"
    about = "adds KL(base ‖ model) on unrelated prompts to the loss of each step"
    strength = 1.0
    meaning = "times the divergence"

    def around(self, strength, context):
        reference = Reference(
            context.model,
            context.prompts,
            context.tokenizer,
            tokens=context.tokens,
            batch=context.batch,
            seed=context.seed,
        )
        return lambda model: penalised(model, reference, strength)


RIVALS = (KL(),)
