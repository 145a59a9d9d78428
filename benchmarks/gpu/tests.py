"""The kernels' tests, a process for each file: an illegal access ends one file's, no more."""

import re
import sys
from pathlib import Path

from .inside import Inside

ROOT = Path(__file__).resolve().parent.parent.parent
KINDS = ("project", "orthonormalize", "projector", "autograd", "factors", "dispatch", "native")
REHEARSED = ["tests/test_dispatch.py"]


def measure(inside: Inside) -> None:
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401

    found = [
        str(f.relative_to(ROOT)) for k in KINDS for f in sorted(ROOT.glob(f"tests/test_{k}*.py"))
    ]
    inside.each(REHEARSED if inside.tiny else dict.fromkeys(found), lambda f: _file(inside, f))


def _file(inside: Inside, file: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    done = inside.under(command, file, cwd=ROOT)
    if done is None:
        return
    lines = done.stdout.splitlines()
    last = [x for x in lines if re.search(r"\d+ (passed|failed|error|skipped)", x)]
    inside.check(
        done.returncode in (0, 5),  # 5: all of it was left out
        case=file,
        summary=last[-1].strip("= ") if last else f"exit status {done.returncode}",
        failures=[x[:200] for x in lines if x.startswith(("FAILED", "ERROR"))][:20],
    )
