"""When a step is done: what is called before and after it, whoever steps."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

Call = Callable[[], Any]


class Steps:
    """The steps of a torch optimizer, or of any that moves some parameters.

    Args:
        optimizer: whose steps; None takes every optimizer's that holds one of `parameters`.
        parameters: those whose move counts as a step; None counts all.
    """

    def __init__(self, optimizer: torch.optim.Optimizer | None = None, parameters=None):
        self.optimizer = optimizer
        self.moved = None if parameters is None else {id(p) for p in parameters}

    def before(self, call: Call) -> RemovableHandle:
        """Call before each step; the handle takes the call away again."""
        if self.optimizer is not None:
            return self.optimizer.register_step_pre_hook(lambda *_: call())
        return register_optimizer_step_pre_hook(lambda o, *_: call() if self.moves(o) else None)

    def after(self, call: Call) -> RemovableHandle:
        """Call after each step; the handle takes the call away again."""
        if self.optimizer is not None:
            return self.optimizer.register_step_post_hook(lambda *_: call())
        return register_optimizer_step_post_hook(lambda o, *_: call() if self.moves(o) else None)

    def moves(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether an optimizer holds one of the parameters."""
        if self.moved is None:
            return True
        return any(id(p) in self.moved for group in optimizer.param_groups for p in group["params"])
