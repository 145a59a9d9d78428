"""Autocast is set aside: a projection rounded to 16 bits before its products is none."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

DEVICES = ("cpu", "cuda", "xpu", "mps")


@contextmanager
def set_aside() -> Iterator[None]:
    """Without autocast, on any device that has it on."""
    with ExitStack() as stack:
        for device in DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
