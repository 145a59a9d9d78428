"""Every LoRA factor of a large model at once: bound by its bases, or by launches."""

from statistics import median

import bench_project as bench
import harness
import torch

import grasp_kernels as gk

from .inside import Inside

TINY = [("tiny", "A", bench.WIDE), ("tiny", "B", 4)]
ALLOWED = 1e-4  # ‖ours − the formula's‖ / ‖the formula's‖ of a factor
CHUNK = 2**30  # bytes of the copy that tells what reading all bases would take


def measure(inside: Inside) -> None:
    cases = TINY if inside.tiny else bench.LISTS
    inside.each(cases, lambda case: _case(inside, *case), lambda case: "{} {} k {}".format(*case))
    inside.clocks()


def _case(inside: Inside, model: str, holds: str, k: int | None) -> None:
    device, side = inside.device, "right" if holds == "A" else "left"
    Ts, Us = bench.factors(model, holds, k, device, _blocks(inside, model) if k is None else None)
    ranks = sorted({U.shape[1] for U in Us})
    bases, moved = harness.nbytes(bench.distinct(Us)), 2 * harness.nbytes(Ts)
    runs = bench.list_runs(Ts, Us, side)
    Cs = [T @ U if side == "right" else U.mT @ T for T, U in zip(Ts, Us, strict=True)]
    exact = [
        T - (C @ U.mT if side == "right" else U @ C) for T, U, C in zip(Ts, Us, Cs, strict=True)
    ]
    runs["pinned, measured"] = gk.Projector(Ts, Us, Cs, side=side, measure=True)
    size = CHUNK if inside.device.type == "cuda" else 2**20
    source = torch.randn(size // 8, device=device)
    target = torch.empty_like(source)
    runs["copy"] = lambda: target.copy_(source)
    if inside.tiny:
        runs = {name: bench.by_backend("triton", run) for name, run in runs.items()}
    runs["ours"]()
    error = max(float(torch.dist(T, X) / X.norm()) for T, X in zip(Ts, exact, strict=True))
    taken = harness.samples(runs, device, 2 if inside.tiny else 20)
    times = {name: median(t) for name, t in taken.items()}
    # Written and read are alike to the memory, so a copy of half as much takes as long as a read.
    a_byte = times.pop("copy") / size
    inside.check(
        error <= ALLOWED,
        case=f"{model} {holds} k {k or 'wide'}",
        side=side,
        tensors=len(Ts),
        shape=sorted({tuple(T.shape) for T in Ts}),
        dtype="float32",
        k=ranks,
        chosen=sorted({bench.chosen(T, U, side) for T, U in zip(Ts, Us, strict=True)}),
        error=error,
        ms=times,
        basis_bytes=bases,
        bytes=moved,
        floor_ms=(bases + moved) * a_byte,
        share={name: (bases + moved) * a_byte / t for name, t in times.items()},
        host_us={
            name: harness.host_time(runs[name], 2 if inside.tiny else 10)
            for name in ("ours", "project_", "addmm_ loop", "foreach_mul_")
        },
        spread=harness.spread(taken["ours"]),
    )


def _blocks(inside: Inside, model: str) -> int | None:
    """As many as leave room for a second copy of the bases; None for all."""
    block, usual, wide = bench.MODELS[model]
    one = sum(4 * d * wide[d] for d in dict((t, d) for t, _, d in block).values())
    if inside.tiny or 2 * one * usual < inside.about["memory"]:
        return None
    return max(1, int(inside.about["memory"] // (2 * one)))
