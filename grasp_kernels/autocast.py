"""Autocast and faster fp32 products are set aside: a projection rounded to 16 bits is none."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

DEVICES = ("cpu", "cuda", "xpu", "mps")
BAR = "TMonitor"  # the thread of a progress bar, which multiplies nothing


@contextmanager
def set_aside() -> Iterator[None]:
    """Without autocast on any device that has it on, and with fp32 products in fp32."""
    with ExitStack() as stack:
        for device in DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if _exact.holders or not _is_exact():
            stack.enter_context(_exact)
        yield


@contextmanager
def in_bf16() -> Iterator[None]:
    """fp32 products, of numbers that bf16 can hold, by a CPU's bf16 units: none is rounded.

    Sums are fp32. PyTorch keeps the setting for the whole process, so it is made for no thread but
    this one, and not where others run.
    """
    running = {t for t in threading.enumerate() if type(t).__name__ != BAR}
    if running != {threading.current_thread()}:
        yield
        return
    matmul, above = torch.backends.mkldnn.matmul, torch.backends.mkldnn
    with _exact.lock:
        own = "none" if matmul.fp32_precision == above.fp32_precision else matmul.fp32_precision
        matmul.fp32_precision = "bf16"
        try:
            yield
        finally:
            matmul.fp32_precision = own


def _is_exact() -> bool:
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # a backend's own setting, which this one older function can't express
        return False


class _Exact:
    """fp32 products in fp32, in place of TF32 or bf16.

    PyTorch keeps this for the whole process and not for a thread, so the first to come sets it and
    the last to leave puts back what was.
    """

    def __init__(self) -> None:
        self.lock, self.holders = threading.Lock(), 0

    def __enter__(self) -> None:
        with self.lock:
            if not self.holders:
                self._set()
            self.holders += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.holders -= 1
            if not self.holders:
                self._put_back()

    def _set(self) -> None:
        backends = torch.backends
        self.own = []
        for settings, above in ((backends.cuda, backends.cudnn), (backends.mkldnn,) * 2):
            own = settings.matmul.fp32_precision
            # Set by itself it would no longer follow the setting above it.
            self.own.append((settings.matmul, "none" if own == above.fp32_precision else own))
        try:
            self.older = torch.get_float32_matmul_precision()
        except RuntimeError:
            self.older = "highest"
        if self.older != "highest":  # both interfaces, or PyTorch refuses to mix them
            torch.set_float32_matmul_precision("highest")
        for matmul, _ in self.own:
            matmul.fp32_precision = "ieee"

    def _put_back(self) -> None:
        if self.older != "highest":
            torch.set_float32_matmul_precision(self.older)
        for matmul, own in self.own:
            matmul.fp32_precision = own


_exact = _Exact()
