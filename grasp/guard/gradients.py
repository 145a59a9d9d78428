"""Gradients are projected all in one call, when the last micro-batch of a step has brought them."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from grasp.guard.clock import Clock, timed
from grasp.guard.guarded import Guarded, Projections
from grasp.model import partitions, processes


class Gradients:
    """The gradients of guarded parameters, as backward passes bring them.

    Args:
        guarded: whose bases may be replaced; `forget` then.
        model: as it is called in training, in its wrapper if it has one.
        clock: of the guard.
    """

    def __init__(self, guarded: Sequence[Guarded], model: nn.Module, clock: Clock):
        self.guarded, self.model, self.clock = guarded, model, clock
        self.came = False
        """Whether a gradient came."""
        self.pending: list[Guarded] = []
        """Whose gradients came and are not projected yet."""
        self._deaf = False
        self._graph = -1
        self._streams: set[torch.Stream] = set()  # on which they came
        self._laid: dict[tuple[int, ...], Projections] = {}  # by which came together
        self._done: dict[int, tuple[int, int]] = {}  # of projected gradients where, which version

    def hook(self) -> list[RemovableHandle]:
        """Project from now on, until the handles are removed."""
        return [
            g.parameter.register_post_accumulate_grad_hook(lambda _, g=g: self._collect(g))
            for g in self.guarded
            if g.parameter.requires_grad
        ]

    @contextmanager
    def deaf(self) -> Iterator[None]:
        """For backward passes that are not training's."""
        self._deaf = True
        try:
            yield
        finally:
            self._deaf = False

    @timed
    def project(self) -> None:
        """Project the pending gradients."""
        for stream in self._streams:  # FSDP2 brings them on one of its own
            torch.accelerator.current_stream(stream.device).wait_stream(stream)
        self._streams.clear()
        self.came = self.came or bool(self.pending)
        came = {id(g) for g in self.pending}
        self.pending = []
        self._project([g for g in self.guarded if id(g) in came])

    @timed
    def before_step(self) -> None:
        """Project what no backward pass's end did, so that a step never sees it."""
        if self.pending:
            self.project()
        if processes.several():  # DDP may put its average over what was projected (checkpointing)
            marks = self._done.items()
            whole = [g for g in self.guarded if not g.weight.split]
            self._project([g for g in whole if (id(g), _mark(g)) not in marks], again=True)

    def count(self) -> None:
        """Add what was blocked since the last time to each parameter's count."""
        for projections in self._laid.values():
            projections.count()

    def forget(self) -> None:
        """What was laid out: the bases are others now, or no longer needed."""
        self.count()
        self._laid.clear()
        self._done.clear()

    def _project(self, came: Sequence[Guarded], again: bool = False) -> None:
        held = [g for g in came if g.basis.shape[1] and g.weight.gradient is not None]
        if not held:
            return
        key = again, *map(id, held)
        if key not in self._laid:
            self._laid[key] = Projections(held, gradients=True, again=again)
        self._laid[key]()
        if processes.several():
            self._done |= {id(g): _mark(g) for g in held}

    def _collect(self, g: Guarded) -> None:
        if self._deaf:
            return
        if g.weight.split and torch.accelerator.is_available():
            self._streams.add(torch.accelerator.current_stream())
        graph = torch._C._current_graph_task_id()
        if graph != self._graph:  # also of a pass inside another: reentrant checkpointing
            self._graph = graph
            torch.autograd.Variable._execution_engine.queue_callback(self._after_backward)
        self.pending.append(g)

    def _after_backward(self) -> None:
        self._graph = -1
        if any(partitions.partitioned(g.parameter) for g in self.pending):
            raise RuntimeError(
                "DeepSpeed took the model over after the guard was attached and moves copies of "
                "its weights that the guard does not know; attach it after deepspeed.initialize, "
                "or accelerator.prepare, to what that returned"
            )
        if not _last_micro_batch(self.model):
            return
        # DDP averages in a callback that was queued after this one; what is queued now comes last.
        if processes.several():
            torch.autograd.Variable._execution_engine.queue_callback(self.project)
        else:
            self.project()


def _mark(g: Guarded) -> tuple[int, int]:
    """Of a gradient where it lies, and how often it was written."""
    gradient = g.weight.gradient
    return (0, 0) if gradient is None else (gradient.data_ptr(), gradient._version)


def _last_micro_batch(model: nn.Module) -> bool:
    """Whether a step follows, where the loop says so: accelerate, or DDP's `no_sync`."""
    if not getattr(model, "require_backward_grad_sync", True):
        return False
    state = sys.modules.get("accelerate.state")
    return state is None or state.GradientState._shared_state.get("sync_gradients", True)
