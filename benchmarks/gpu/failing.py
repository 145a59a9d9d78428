"""Parts that fail, each in its way: what the command does about them is tested with these."""

import os
import signal
import subprocess
import sys

from .inside import Inside


def crashes(inside: Inside) -> None:
    inside.add(value=1)
    inside.add(value=2)
    os.write(os.open(inside.lines.path, os.O_WRONLY | os.O_APPEND), b'{"part": "crashes", "val')
    os.abort()


def hangs(inside: Inside) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", code])
    inside.add(pids=[os.getpid(), child.pid])
    child.wait()


def raises(inside: Inside) -> None:
    inside.add(value=1)
    inside.each([0, 1, 2], lambda case: inside.add(case=case, inverse=1 / (case - 1)))
    raise RuntimeError("as it was asked to")


def lacks(inside: Inside) -> None:
    inside.add(value=1)
    import no_such_package_anywhere  # noqa: F401


def odd(inside: Inside) -> None:
    inside.add(values=[float("inf"), -float("inf"), float("nan"), 0.5], of={"ratio": float("nan")})
