"""One part, in a process of its own."""

import faulthandler
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from functools import cached_property
from importlib import import_module
from pathlib import Path

from .lines import Lines
from .parts import NAMED

LEFT_OUT = 3  # the exit status of a part that lacked something
COMMON = ("device", "capability", "cuda", "torch", "triton", "python")
OURS = {"gpu", "grasp", "grasp_kernels", "harness", "bench_project", "bench_orthonormalize"}


class LeftOut(Exception):
    """What a part lacks; no failure."""


class Inside:
    """What a part is handed: where it runs, how long it may, and where to write what it finds.

    Args:
        kind: "cuda"; or "cpu", a rehearsal with tiny shapes, Triton's interpreter in place of the
            GPU and the reference in place of the CUDA library.
    """

    def __init__(self, name: str, kind: str, out: Path, seconds: float):
        self.name, self.kind, self.out = name, kind, out
        self.tiny = kind == "cpu"
        self.until = time.monotonic() + 0.9 * seconds
        self.lines = Lines(out, part=name)
        self.failed = False
        about = [line for line in self.lines.read() if line["part"] == "about"]
        self.about = {} if name == "about" or not about else about[0]
        self.lines.common |= {k: self.about[k] for k in COMMON if k in self.about}

    @cached_property
    def device(self):
        import torch

        return torch.device(self.kind)

    @cached_property
    def backends(self) -> list[str]:
        from grasp_kernels import native

        second = "reference" if self.tiny else None if native.missing() else "cuda"
        return ["triton", *([second] if second else [])]

    def left(self) -> float:
        """Seconds that what is begun now may take."""
        return max(1.0, self.until - time.monotonic())

    def add(self, **found) -> None:
        line = self.lines.add(**found)
        print(line, flush=True)

    def under(
        self, command: list[str], of: str, most: float = 1e9, **options
    ) -> subprocess.CompletedProcess | None:
        """What a command said and how it ended; None, and a line, where it took too long."""
        seconds = min(most, self.left())
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=seconds, **options
            )
        except subprocess.TimeoutExpired:
            self.add(left_out=f"{of}: no end in {seconds:.0f} s")
            return None
        print(done.stdout, done.stderr, flush=True)
        return done

    def clocks(self) -> None:
        """What the card ran at, for whoever compares figures of two parts or two days."""
        import harness

        if found := harness.clocks():
            self.add(what="clocks", **found)

    def check(self, passed: bool, **found) -> None:
        """A line that says whether it is as it should be; the part fails where it is not."""
        self.failed |= not passed
        self.add(**found, passed=passed)

    def each(
        self, cases: Iterable, measure: Callable, name: Callable = str, trial: bool = False
    ) -> None:
        """`measure` each case while the time lasts; a case that fails costs itself alone.

        Args:
            trial: a case may be one that can't run, and the part passes nonetheless.

        Raises:
            LeftOut: as a case says.
            Exception: the one after which the device answers no more.
        """
        longest = 0.0
        for case in cases:
            if time.monotonic() + longest > self.until:
                self.add(left_out=name(case))
                continue
            started = time.monotonic()
            try:
                measure(case)
            except LeftOut:
                raise
            except Exception as error:
                traceback.print_exc()
                self.failed |= not trial
                self.add(case=name(case), **{"refused" if trial else "failed": said(error)})
                self._still_there()
            longest = max(longest, time.monotonic() - started)

    def _still_there(self) -> None:
        if self.kind == "cuda":
            import torch

            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit, whose folder need not be on the PATH."""
    home = Path(os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda")
    places = (os.environ.get("PATH", ""), str(home / "bin"), str(home / "compute-sanitizer"))
    return shutil.which(name, path=os.pathsep.join(places))


def said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:400]


def run(name: str, kind: str, out: Path, seconds: float) -> int:
    """The exit status of the part's process."""
    faulthandler.enable()
    faulthandler.dump_traceback_later(max(1.0, seconds - 2))  # where it hung, for the log
    inside = Inside(name, kind, out, seconds)
    module, function = NAMED[name].function
    try:
        getattr(import_module(f"gpu.{module}"), function)(inside)
    except LeftOut as lacking:
        inside.add(left_out=str(lacking))
        return LEFT_OUT
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name.split(".")[0] not in OURS:
            inside.add(left_out=f"{error.name} is not installed")
            return LEFT_OUT
        traceback.print_exc()
        inside.add(failed=said(error))
        return 1
    finally:
        faulthandler.cancel_dump_traceback_later()
        sys.stdout.flush()
    return int(inside.failed)
