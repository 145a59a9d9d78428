"""When a step is done: what is called before and after it, whoever steps."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

Call = Callable[[Optimizer], Any]
AVERAGES = ("z", "ax", "slow_buffer", "slow_param", "slow_params")
"""State that holds weights to be shown or returned to: schedule-free's z, ASGD's mean, Lookahead's
slow weights."""


class Steps:
    """The steps of every torch optimizer that holds one of some parameters, nested ones too.

    Args:
        parameters: those whose move counts as a step; None counts all.
    """

    def __init__(self, parameters: Iterable[Tensor] | None = None):
        self.moved = None if parameters is None else {id(p) for p in parameters}

    def before(self, call: Call) -> RemovableHandle:
        """Call before each step; the handle takes the call away again."""
        return register_optimizer_step_pre_hook(lambda o, *_: call(o) if self.moves(o) else None)

    def after(self, call: Call) -> RemovableHandle:
        """Call after each step; the handle takes the call away again."""
        return register_optimizer_step_post_hook(lambda o, *_: call(o) if self.moves(o) else None)

    def moves(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer holds one of the parameters."""
        if self.moved is None:
            return True
        return any(id(p) in self.moved for group in optimizer.param_groups for p in group["params"])


def innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside accelerate's wrapper, which is none of its own.

    Another that holds an optimizer (Lookahead) moves weights itself, so it stays what it is.
    """
    while type(optimizer).__module__.startswith("accelerate."):
        optimizer = optimizer.optimizer
    return optimizer


def calls_hooks(optimizer: Optimizer) -> bool:
    """Whether torch calls hooks when it steps: not every class with a `step` is made as torch's."""
    return getattr(type(optimizer).step, "hooked", False) is True


def averages(optimizer: Optimizer, parameter: Tensor) -> list[Tensor]:
    """Weights that an optimizer keeps besides the parameter and shows or returns to later."""
    state = optimizer.state.get(parameter, {})
    return [
        T
        for key in AVERAGES
        if isinstance(T := state.get(key), Tensor) and T.shape == parameter.shape
    ]


def in_backward() -> bool:
    """Whether this thread is inside a backward pass."""
    return torch._C._current_graph_task_id() != -1
