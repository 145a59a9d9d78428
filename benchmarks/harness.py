"""Timings side by side in one run, and what they were of."""

import argparse
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from grasp.files import write_json

Run = Callable[[], object]


def timed(runs: dict[str, Run], device: torch.device, repeats: int = 30) -> dict[str, float]:
    """Median milliseconds of each; all take turns, so that what slows the machine slows all."""
    for run in runs.values():  # compilation, handles, caches
        for _ in range(3):
            run()
    taken: dict[str, list[float]] = {name: [] for name in runs}
    flush = torch.empty(1 << 28, dtype=torch.int8, device=device) if device.type == "cuda" else None
    for _ in range(repeats):
        for name, run in runs.items():
            if flush is not None:
                flush.zero_()  # 256 MiB through a second-level cache of at most 128
            taken[name].append(_once(run, device))
    return {name: median(times) for name, times in taken.items()}


def _once(run: Run, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
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


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written in a second by the best plain copy of 1 GiB (256 MiB on a CPU)."""
    size = 1 << (30 if device.type == "cuda" else 28)
    source = torch.randint(127, (size,), dtype=torch.int8, device=device).view(torch.float32)
    target = torch.empty_like(source)
    best = min(timed({"copy": lambda: target.copy_(source)}, device).values())
    return 2 * size / (best / 1e3)


def about(device: torch.device) -> dict:
    """What ran, where."""
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = None
    found = {
        "command": " ".join(["python", *sys.argv]),
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
        }
    return found


def main(description: str, name: str, measure: Callable[[torch.device, bool], list[dict]]) -> None:
    """The command line of one benchmark: measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=description)
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=kind)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--quick", action="store_true", help="less of everything")
    parser.add_argument("--model", help="bench_finetune: of which one step is taken")
    options = parser.parse_args()
    device = torch.device(options.device)
    rows = measure(device, options.quick)
    show(rows)
    out = options.out or Path(f"benchmarks/results/{name}_{device.type}.json")
    write_json(out, {"about": about(device), "rows": rows})
    print(out)


def show(rows: Sequence[dict]) -> None:
    for row in rows:
        print("  ".join(f"{k} {_short(v)}" for k, v in row.items()))


def _short(value) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} {_short(v)}" for k, v in value.items()) + "}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def nbytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
