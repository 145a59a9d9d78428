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
        self._inside: list[Optimizer] = []
        self._counted: Optimizer | None = None
        self._since: list[Optimizer] = []  # others that stepped since the counted one

    def begin(self, optimizer: Optimizer) -> None:
        """A step begins, perhaps inside another's (Lookahead steps what it is around)."""
        if optimizer in self._inside:  # the last one failed
            del self._inside[self._inside.index(optimizer) :]
        self._inside.append(optimizer)

    def end(self, optimizer: Optimizer) -> bool:
        """A step ends; whether it is one of the run's, of which others make a part.

        Counted are the steps of the optimizer that is first to step inside no other, whatever
        optimizers there are besides; of another, once it steps twice and that one not at all.
        """
        if optimizer in self._inside:
            del self._inside[self._inside.index(optimizer) :]
        if self._inside:
            return False
        if self._counted is None or optimizer in self._since:
            self._counted = optimizer
        if optimizer is self._counted:
            self._since.clear()
            return True
        self._since.append(optimizer)
        return False

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
