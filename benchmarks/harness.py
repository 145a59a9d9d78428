"""Timings side by side in one run, and what they were of."""

import argparse
import math
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import Tensor

from grasp.files import write_json

Run = Callable[[], object]
ROOT = Path(__file__).resolve().parent.parent
CACHE = 2**28  # bytes: more than any second-level cache holds
LONGEST = 3.0  # seconds that repeats may take, when a handful are done
CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw")


def samples(
    runs: dict[str, Run], device: torch.device, repeats: int = 30, wall: bool = False
) -> dict[str, list[float]]:
    """Milliseconds of each, again and again; all take turns, so what slows one slows all.

    On a GPU each run finds a cache that holds none of its tensors, and the host far enough ahead
    that no launch is waited for: `host_time` tells what launching costs. The cache is emptied by
    reading, since lines written would have to go back to memory during the run. With `wall` it is
    the time of a clock on the wall, launches and all, and the cache is as it is.
    """
    waits = {name: _warmed_up(run, device) for name, run in runs.items()}
    taken: dict[str, list[float]] = {name: [] for name in runs}
    flushed = device.type == "cuda" and not wall
    if flushed:
        flush = torch.zeros(CACHE // 4, device=device)
        read = min(_once(flush.sum, device) for _ in range(3))
        waits = {name: 1 + min(200, math.ceil(1.5 * wait / read)) for name, wait in waits.items()}
    started = time.perf_counter()
    for repeat in range(repeats):
        if repeat >= 5 and time.perf_counter() - started > LONGEST:
            break
        for name, run in runs.items():
            for _ in range(waits[name] if flushed else 0):
                flush.sum()
            taken[name].append(_on_the_wall(run, device) if wall else _once(run, device))
    return taken


def timed(
    runs: dict[str, Run], device: torch.device, repeats: int = 30, wall: bool = False
) -> dict[str, float]:
    """Median milliseconds of each; see `samples`."""
    return {name: median(times) for name, times in samples(runs, device, repeats, wall).items()}


def spread(times: Sequence[float]) -> float:
    """From the first to the third quartile, as a share of the median: less is noise."""
    first, middle, third = quantiles(times, n=4)
    return (third - first) / middle if middle else math.inf


def _warmed_up(run: Run, device: torch.device) -> float:
    """Milliseconds until a call returns, when it has compiled and has its handles and caches."""
    for _ in range(3):
        _idle(device)
        start = time.perf_counter()
        run()
        waited = 1e3 * (time.perf_counter() - start)
    return waited


def _idle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _on_the_wall(run: Run, device: torch.device) -> float:
    _idle(device)
    start = time.perf_counter()
    run()
    _idle(device)
    return 1e3 * (time.perf_counter() - start)


def _once(run: Run, device: torch.device) -> float:
    if device.type != "cuda":
        return _on_the_wall(run, device)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def host_time(run: Run, repeats: int = 50) -> float:
    """Median microseconds until a call returns, with the device idle."""
    taken = []
    for _ in range(repeats):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        taken.append(1e6 * (time.perf_counter() - start))
    return median(taken)


def peak_extra(run: Run, device: torch.device) -> int:
    """Bytes allocated at most during a call beyond what was there."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    now = most = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def clocks() -> dict:
    """What the card runs at now, as its tool tells; nothing without the tool."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    command = [tool, f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return {}
    first = said.splitlines()[:1]
    return (
        dict(zip(CLOCKS, (v.strip() for v in first[0].split(",")), strict=False)) if first else {}
    )


def about(device: torch.device) -> dict:
    """What ran, where."""
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = None
    found = {
        "command": " ".join(["python", *sys.argv]),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version,
        "device": platform.machine() + f", {torch.get_num_threads()} threads",
        "date": time.strftime("%Y-%m-%d"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "cache": properties.L2_cache_size,
        }
    return found


def _commit() -> str | None:
    """None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def main(description: str, name: str, measure: Callable[..., Iterable[dict]]) -> None:
    """The command line of one benchmark: measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=description)
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=kind)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--quick", action="store_true", help="less of everything")
    parser.add_argument("--model", help="bench_finetune: of which one step is taken")
    options = parser.parse_args()
    device = torch.device(options.device)
    rows = []
    for row in measure(device, options.quick):
        rows.append(row)
        show([row])
    out = options.out or Path(f"benchmarks/results/{name}_{device.type}.json")
    write_json(out, {"about": about(device), "rows": rows})
    print(out)


def show(rows: Sequence[dict]) -> None:
    for row in rows:
        print("  ".join(f"{k} {_short(v)}" for k, v in row.items()), flush=True)


def _short(value) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} {_short(v)}" for k, v in value.items()) + "}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
