"""What the memory gives: a copy, a product in place, a list of small products; and the clocks."""

import bench_project as bench
import harness
import torch

from .inside import Inside

SIZES = (2**25, 2**27, 2**28, 2**29, 2**30)  # bytes


def measure(inside: Inside) -> None:
    inside.clocks()
    sizes = (2**16,) if inside.tiny else SIZES
    inside.each(sizes, lambda size: _size(inside, size), lambda size: f"copy of {size} bytes")
    model, blocks = ("tiny", 2) if inside.tiny else ("8B", None)
    Ts, _ = bench.factors(model, "B", 4, inside.device, blocks)
    one = torch.ones((), device=inside.device)
    kept = [T.clone() for T in Ts]
    runs = {
        "foreach_mul_": lambda: torch._foreach_mul_(Ts, one),
        "copy": lambda: torch._foreach_copy_(kept, Ts),
    }
    times = harness.timed(runs, inside.device)
    bytes_ = harness.nbytes(Ts)
    inside.add(what="list", tensors=len(Ts), bytes=bytes_, dtype="float32", ms=times)
    inside.clocks()


def _size(inside: Inside, size: int) -> None:
    source = torch.randn(size // 4, device=inside.device)
    target = torch.empty_like(source)
    taken = harness.samples(
        {"copy": lambda: target.copy_(source), "mul_": lambda: source.mul_(1.0)}, inside.device
    )
    times = {name: sorted(t)[len(t) // 2] for name, t in taken.items()}
    inside.add(
        what="copy",
        shape=[size // 4],
        dtype="float32",
        bytes=size,
        ms=times,
        GBps={name: 2 * size / t / 1e6 for name, t in times.items()},
        spread=harness.spread(taken["copy"]),
    )
