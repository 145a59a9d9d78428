"""Gradients are projected once a backward pass, all in one call, when they are all there."""

from collections.abc import Sequence

import torch
from torch.utils.hooks import RemovableHandle

from grasp.guard.guarded import Guarded, Projections
from grasp.model import processes


class Gradients:
    """The gradients of guarded parameters, as backward passes bring them.

    Args:
        guarded: whose bases may be replaced; `forget` then.
    """

    def __init__(self, guarded: Sequence[Guarded]):
        self.guarded = guarded
        self.came = False
        """Whether a gradient came."""
        self.pending: list[Guarded] = []
        self._graph = -1
        self._laid: dict[tuple[int, ...], Projections] = {}  # by which came together

    def hook(self) -> list[RemovableHandle]:
        """Project from now on, until the handles are removed."""
        return [
            g.parameter.register_post_accumulate_grad_hook(lambda _, g=g: self._collect(g))
            for g in self.guarded
            if g.parameter.requires_grad
        ]

    def project(self) -> None:
        """Project the pending gradients."""
        self.came = True
        came = {id(g) for g in self.pending}
        self.pending = []
        held = [g for g in self.guarded if g.basis.shape[1] and id(g) in came]
        key = tuple(map(id, held))
        if key not in self._laid:
            self._laid[key] = Projections(held, gradients=True)
        self._laid[key]()

    def count(self) -> None:
        """Add what was blocked since the last time to each parameter's count."""
        for projections in self._laid.values():
            projections.count()

    def forget(self) -> None:
        """What was laid out: the bases are others now, or no longer needed."""
        self.count()
        self._laid.clear()

    def _collect(self, g: Guarded) -> None:
        graph = torch._C._current_graph_task_id()
        if graph != self._graph or not self.pending:
            self._graph, self.pending = graph, []
            torch.autograd.Variable._execution_engine.queue_callback(self._after_backward)
        self.pending.append(g)

    def _after_backward(self) -> None:
        # DDP averages in a callback that was queued after this one; what is queued now comes last.
        if processes.several():
            torch.autograd.Variable._execution_engine.queue_callback(self.project)
        else:
            self.project()
