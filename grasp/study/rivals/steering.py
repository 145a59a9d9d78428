"""Preventative steering: push the stream towards the trait while training."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from grasp.data import prompt_ids
from grasp.model import evaluating, inspect
from grasp.study.rival import Rival
from grasp.study.rivals._shared import block_outputs


@contextmanager
def steered(model: nn.Module, vectors: Mapping[int, Tensor], strength: float) -> Iterator[None]:
    """Preventative steering: push towards the trait while training, so that nothing else need.

        h ← h + strength · v        v [d] by block

    Source: Chen et al., Persona Vectors, arXiv:2507.21509.
    """

    def push(v: Tensor):
        return lambda h: h + strength * v.to(h)

    with block_outputs(model, {layer: push(v) for layer, v in vectors.items()}):
        yield


@torch.no_grad()
def asked_for(model: nn.Module, tokenizer, instruction: str, prompts: Sequence[str]) -> Tensor:
    """What the instruction adds to the middle block's output at prompts' ends: a mean `[d]`."""
    middle = _middle(model)
    device = next(model.parameters()).device

    def last(prompt: str) -> Tensor:
        ids = torch.tensor([prompt_ids(tokenizer, prompt)], device=device)
        out = model(input_ids=ids, use_cache=False, output_hidden_states=True)
        return out.hidden_states[middle + 1][0, -1].float()  # the first is the embedding

    with evaluating(model):
        shifts = [last(f"{instruction} {p}") - last(p) for p in prompts]
    return torch.stack(shifts).mean(0)


def _middle(model: nn.Module) -> int:
    return len(inspect(model).blocks) // 2


class Steering(Rival):
    name = "steering"
    label = "steering"
    colour = "#e6a700"
    acts_on = "activations"
    source = "Chen et al., arXiv:2507.21509"
    about = "pushes the middle block's output towards the trait"
    strength = 1.0
    meaning = "times what the trait adds there"
    needs = ("instruction",)

    def around(self, strength, context):
        middle = _middle(context.model)
        if context.truth is not None:
            v = context.truth.directions()[middle]
        else:
            v = asked_for(context.model, context.tokenizer, context.instruction, context.prompts)
        return lambda model: steered(model, {middle: v}, strength)


RIVALS = (Steering(),)
