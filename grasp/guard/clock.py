"""How long a guard's own work takes, of a training that goes on around it."""

import time
from collections.abc import Callable
from functools import wraps

import torch
from torch import nn

MOST = 1024  # events that are kept


class Clock:
    """Adds up what runs inside `with clock:`, once where it is entered inside itself.

    Where a model is on a CUDA device it notes events and waits for none until it is asked.
    """

    def __init__(self, model: nn.Module):
        self.cuda = next(model.parameters()).is_cuda
        self._seconds, self._depth = 0.0, 0
        self._began: float | torch.cuda.Event = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        self._depth += 1
        if self._depth == 1:
            self._began = self._now()

    def __exit__(self, *error) -> None:
        self._depth -= 1
        if self._depth:
            return
        if self.cuda:
            self._events.append((self._began, self._now()))
            if len(self._events) == MOST:
                self._add_up()
        else:
            self._seconds += self._now() - self._began

    @property
    def seconds(self) -> float:
        """So far."""
        self._add_up()
        return self._seconds

    def _add_up(self) -> None:
        if self._events:
            self._events[-1][1].synchronize()
            self._seconds += sum(a.elapsed_time(b) for a, b in self._events) / 1000
            self._events.clear()

    def _now(self) -> "float | torch.cuda.Event":
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def timed(method: Callable) -> Callable:
    """A method whose time is that of its object's `clock`."""

    @wraps(method)
    def call(self, *args, **kwargs):
        with self.clock:
            return method(self, *args, **kwargs)

    return call
