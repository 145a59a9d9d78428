"""Tables that kernels read, such as addresses: copied once, right on any stream and in a graph."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def on_device(device: torch.device):
    """Triton launches on the current device, whichever holds the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def capturing() -> bool:
    """Whether a CUDA graph is being recorded: what is copied now is copied at its replays alone."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


_recorded: list["Table"] = []  # a graph reads its tables at each replay, as long as it lives


class Table:
    """Numbers that kernels read, on the device of the matrices."""

    def __init__(self, rows: Sequence | Tensor, dtype: torch.dtype, device: torch.device):
        host = torch.as_tensor(rows, dtype=dtype)
        self.device, self.host = device, host
        if device.type != "cuda":
            self.tensor = host
            return
        self.host = host.pin_memory()
        self.tensor = self.host.to(device, non_blocking=True)
        self.stream, self.copied = torch.cuda.current_stream(device), None
        if not capturing():
            self.copied = self.stream.record_event()

    def here(self) -> Tensor:
        """The numbers, for a kernel of the current stream."""
        if self.device.type != "cuda":
            return self.tensor
        stream = torch.cuda.current_stream(self.device)
        if capturing():  # what was copied before a capture is there: it begins with all at rest
            _recorded.append(self)
        elif stream != self.stream:
            stream.wait_event(self.copied)
        if stream != self.stream:
            self.tensor.record_stream(stream)
        return self.tensor


class Kept:
    """What is made of addresses, kept for the next time: a list that stays costs no copy."""

    MOST = 256

    def __init__(self, make: Callable[[tuple[int, ...]], Any]):
        self._make, self._kept = make, lru_cache(self.MOST)(make)

    def __call__(self, pointers: tuple[int, ...]) -> Any:
        return (self._make if capturing() else self._kept)(pointers)
