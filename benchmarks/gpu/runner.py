"""Parts one after another, each in its own process group, whatever becomes of them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from . import picture, summary
from .inside import LEFT_OUT
from .lines import FILE, Lines, read
from .parts import ABOUT, PARTS, PICTURE, Part

ROOT = Path(__file__).resolve().parent.parent.parent
COMMAND = ROOT / "benchmarks" / "gpu_check.py"
LIBRARY = ROOT / "grasp_kernels" / "_native.so"
BURIED = 10.0  # seconds until a process that was killed is given up


def run(kind: str, out: Path, limit: float, chosen: list[Part] | None = None) -> int:
    """Every part, or those chosen; the exit status of the command.

    Args:
        kind: "cuda" or "cpu", as `Inside` has it.
        out: a folder; a whole run begins its file anew, chosen parts replace their own lines.
        limit: seconds, beyond which nothing is begun or goes on.
    """
    started = time.monotonic()
    path, passed = out / FILE, []

    def left() -> float:
        return limit - (time.monotonic() - started)

    with _ended_by_signals():
        about = _about(kind)
        if about is None:
            return 2
        out.mkdir(parents=True, exist_ok=True)
        if chosen is None:
            for old in (path, *map(path.with_suffix, (".log", ".md")), picture.beside(path)):
                old.unlink(missing_ok=True)
        lines = Lines(path)
        for line in about:
            lines.add(**line)
        for part in PARTS if chosen is None else chosen:
            room = max(0.0, left() - 2 * PICTURE.least)
            if room < part.begins_with:
                reason = f"{room:.0f} s were left of {limit:.0f}; it needs {part.begins_with:.0f}"
                lines.add(part=part.name, begins=False)
                lines.add(part=part.name, seconds=0.0, exit=None, reason=f"left out: {reason}")
                continue
            passed.append(_part(part, kind, lines, min(room, part.seconds)))
            if part.name == "build" and kind == "cuda" and not passed[-1]:
                _put_aside(lines)
            summary.write(path)
        passed.append(_part(PICTURE, kind, lines, max(PICTURE.least, min(left(), PICTURE.seconds))))
    _say(summary.write(path))
    return 0 if all(passed) else 1


def _about(kind: str) -> list[dict] | None:
    """What everything runs on, as lines; None where that is not there, and earlier results stay."""
    with TemporaryDirectory() as folder:
        lines = Lines(Path(folder) / FILE)
        passed = _part(ABOUT, kind, lines, ABOUT.seconds)
        found = [json.loads(line) for line in lines.path.read_text().splitlines()]
        if any("left_out" in f for f in found):
            print("no CUDA device: this command checks what needs one", file=sys.stderr)
            return None
        if not passed:
            print(lines.path.with_suffix(".log").read_text()[-2000:], file=sys.stderr)
        return found if passed else None


def _put_aside(lines: Lines) -> None:
    """The library, unless it said itself why it can't be loaded: it is an older one, or takes with
    it whatever asks for it. The rest goes on with Triton alone."""
    said = [f for f in lines.read() if f["part"] == "build" and "missing" in f]
    if not said and LIBRARY.exists():
        aside = lines.path.with_name("refused" + LIBRARY.name)
        shutil.move(LIBRARY, aside)
        lines.add(part="build", put_aside=aside.name)


def _part(part: Part, kind: str, lines: Lines, seconds: float) -> bool:
    """Run it and say how it ended; whether it did not fail."""
    _say(f"── {part.name}: {part.of}; at most {seconds:.0f} s")
    lines.add(part=part.name, begins=True)
    log = lines.path.with_suffix(".log")
    started = time.monotonic()
    with log.open("a") as said:
        said.write(f"\n── {part.name}\n")
        said.flush()
        begins = said.tell()
        command = [sys.executable, str(COMMAND), "--inside", part.name]
        command += ["--device", kind, "--out", str(lines.path), "--limit", f"{seconds:.1f}"]
        status = _ended(command, _environment(kind), said, seconds)
    reason = _reason(part, status, lines.path, log, begins, seconds)
    taken = round(time.monotonic() - started, 1)
    common = _common(lines)
    lines.add(part=part.name, seconds=taken, exit=status, reason=reason, **common)
    _say(f"   {taken:.0f} s, {reason or 'passed'}")
    return status in (0, LEFT_OUT)


def _say(text: str) -> None:
    """To whoever still listens."""
    try:
        print(text, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")


def _common(lines: Lines) -> dict:
    about = [f for f in lines.read() if f["part"] == "about" and "device" in f]
    return {k: about[0].get(k) for k in ("device", "capability", "torch")} if about else {}


def _environment(kind: str) -> dict[str, str]:
    found = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if kind == "cpu":
        found["TRITON_INTERPRET"] = "1"
    paths = [str(ROOT), str(ROOT / "benchmarks"), found.get("PYTHONPATH", "")]
    found["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    found["PYTHONUNBUFFERED"] = "1"
    # One small kernel a shape: the compiler's pool of processes would take longer to come up.
    found.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    found.setdefault("HF_HUB_OFFLINE", "1")
    return found


def _ended(command: list[str], env: dict, log, seconds: float) -> int | None:
    """The exit status, negative for a signal; None of what had to be ended. Nothing outlives it."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=env,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        in_time = _waited(process, seconds)
    finally:
        # Before the process is reaped, so that its number is still its group's.
        _kill_group(process.pid)
        gone = _waited(process, BURIED)
    if gone:
        process.wait()
    return process.returncode if in_time else None


def _waited(process: subprocess.Popen, seconds: float) -> bool:
    """Whether it ended in so many seconds; it is left to be reaped."""
    until = time.monotonic() + seconds
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # nothing is left of it but what is to be reaped


def _reason(
    part: Part, status: int | None, path: Path, log: Path, begins: int, seconds: float
) -> str | None:
    """Why it did not pass, in a line."""
    if status == 0:
        return None
    own = [f for f in read(path) if f["part"] == part.name]
    if status is None:
        return f"ended at its limit of {seconds:.0f} s"
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    if status == LEFT_OUT:
        return "left out: " + next(f["left_out"] for f in reversed(own) if "left_out" in f)
    failed = [f["failed"] for f in own if "failed" in f]
    failed += [
        f"{f.get('case') or f.get('what')} is not as it should be"
        for f in own
        if f.get("passed") is False
    ]
    if failed:
        return failed[-1] + (f" (and {len(failed) - 1} more)" if len(failed) > 1 else "")
    with log.open(errors="replace") as said:
        said.seek(begins)
        last = said.read().strip().splitlines()[-1:]
    return f"exit status {status}: {last[0][:300] if last else 'said nothing'}"


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """A part has a group of its own, so what ends this process must reach it through here."""

    def stop(number, frame):
        sys.exit(128 + number)

    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as `nohup` leaves it
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
