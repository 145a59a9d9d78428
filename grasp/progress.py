"""What long work says while it lasts: what is done, how far it is, how long it will still take.

A bar on a terminal and in a notebook; elsewhere, as in a log, a line now and then. Both go on while
the work itself is inside one long call, since a thread of their own shows them. Nothing here loads
torch, so that a command speaks before it does.
"""

import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar

PATIENCE = 5.0  # seconds of work that nobody is told of, where nothing else is chosen
MOVES = 0.5  # seconds between two looks at a bar
LINES = 10.0  # seconds between two lines
SOON = 0.02  # share of the work below which nothing is said of the time left
COUNTED = 1000  # so much work is counted, and of more the share is said
ROWS = 20  # of a terminal that does not say how many it has
SHORT = 1.0  # seconds of work whose end is worth no line

_after: ContextVar[float | None] = ContextVar("after", default=PATIENCE)
_shown: list["Stage"] = []  # the outermost first


@contextmanager
def speaking(after: float | None) -> Iterator[None]:
    """Inside, stages show after so many seconds, at once if 0; None keeps all of them silent."""
    silent = _after.get() is None  # and stays so, whatever is asked inside
    token = _after.set(None if silent else after)
    try:
        yield
    finally:
        _after.reset(token)


def tell(line: str) -> None:
    """Say a line, where stages show at once."""
    if _after.get() == 0 and _is_first():
        _write(line)


class Stage:
    """A part of the work that may take long: `with Stage("Reading", len(rows), "rows") as stage`.

    Args:
        what: is done, as a person would say it.
        total: how much there is of it; None where nobody knows.
        unit: of that, in the plural.
        done: how much of it was done before.
    """

    def __init__(self, what: str, total: int | None = None, unit: str = "", done: int = 0):
        self.what, self.total, self.unit = what, total or None, unit
        self.done = self._before = done
        self._began, self._over = time.monotonic(), threading.Event()
        self._view: _Bar | _Lines | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Stage":
        self._began, after = time.monotonic(), _after.get()
        if after is not None and _is_first():
            if after == 0:
                self._show()
            self._thread = threading.Thread(target=self._watch, args=(after,), daemon=True)
            self._thread.start()
        return self

    def __exit__(self, error, *_) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._view is not None:
            _shown.remove(self)
            with suppress(OSError, ValueError):  # of a stream that is closed
                self._view.end("done in" if error is None else "stopped after", self)
            self._view = None

    def update(self, more: int = 1) -> None:
        """So much more is done."""
        self.done += more

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def _watch(self, after: float) -> None:
        if self._over.wait(after):
            return  # before there was anything to say
        with suppress(OSError, ValueError):
            if self._view is None:
                self._show()
            while not self._over.wait(self._view.every):
                self._view.show(self._going_on(), self)

    def _show(self) -> None:
        self._view = _Bar(self) if _moves() else _Lines()
        _shown.append(self)
        with suppress(OSError, ValueError):
            self._view.show(f"{self.what} …", self)

    def _going_on(self) -> str:
        said, time_ = f"{self.what}: ", f"{spoken(self.seconds)} so far"
        if self.total is None:
            return said + time_
        fresh, left = self.done - self._before, self.total - self.done
        if left > 0 and fresh > SOON * (fresh + left):
            time_ = f"about {spoken(self.seconds * left / fresh)} left"
        if self.total < COUNTED:
            return f"{said}{self.done} of {self.total} {self.unit}, {time_}"
        return f"{said}{self.done / self.total:.0%}, {time_}"


class _Bar:
    """On a terminal, or in a notebook: tqdm's."""

    every = MOVES

    def __init__(self, stage: Stage):
        from tqdm.auto import tqdm

        form = "{desc} {bar}" if stage.total else "{desc}"
        options = {"bar_format": form, "ncols": _width(), "nrows": ROWS, "file": sys.stderr}
        text = _fitting(f"{stage.what} …")
        self.bar = tqdm(desc=text, total=stage.total, initial=stage.done, leave=True, **options)

    def show(self, text: str, stage: Stage) -> None:
        self.bar.n, self.bar.ncols = stage.done, _width()
        self.bar.set_description_str(_fitting(text))

    def end(self, how: str, stage: Stage) -> None:
        self.bar.bar_format = "{desc}"
        text = _fitting(f"{stage.what}: {how} {spoken(stage.seconds)}")
        self.bar.set_description_str(text, refresh=False)
        self.bar.close()


class _Lines:
    """In a file or a pipe: of stages inside each other the innermost speaks."""

    every = LINES

    def show(self, text: str, stage: Stage) -> None:
        if _shown[-1:] == [stage]:
            _write(text)

    def end(self, how: str, stage: Stage) -> None:
        if stage.seconds >= SHORT:
            _write(f"{stage.what}: {how} {spoken(stage.seconds)}")


def spoken(seconds: float) -> str:
    """A time as people say it."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _moves() -> bool:
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def _width() -> int | None:
    """Columns; none of a notebook."""
    return shutil.get_terminal_size().columns - 1 if sys.stderr.isatty() else None


def _fitting(text: str) -> str:
    """On one line: a bar can't be drawn anew on two."""
    width = _width()
    return text if width is None or len(text) <= width else f"{text[: width - 1]}…"


def _write(line: str) -> None:
    if any(isinstance(stage._view, _Bar) for stage in _shown):
        from tqdm.auto import tqdm

        tqdm.write(line, file=sys.stderr)  # above the bars
    else:
        print(line, file=sys.stderr, flush=True)


def _is_first() -> bool:
    """Whether this is the one of several processes that speaks."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"
