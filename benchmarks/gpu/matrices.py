"""One matrix: ours by every backend, `addmm_` and `torch.compile`, each as a share of a copy."""

from statistics import median

import bench_project as bench
import harness
import torch

import grasp_kernels as gk

from .inside import Inside, said

TINY = [
    bench.Matrix("right", 40, 96, torch.bfloat16, 16),
    bench.Matrix("left", 96, 40, torch.float32, 7),
]


def measure(inside: Inside) -> None:
    cases = TINY if inside.tiny else bench.GPU_MATRICES
    inside.each(cases, lambda case: _case(inside, case))
    inside.clocks()


def _case(inside: Inside, case: bench.Matrix) -> None:
    T, U = case.made(inside.device)
    reasons = {name: bench.refused(name, T, U, case.side) for name in inside.backends}
    ours = [name for name, reason in reasons.items() if reason is None]
    errors = {name: _error(T, U, case.side, name) for name in ours}
    runs = bench.matrix_runs(T, U, case.side, ours)
    del runs["naive"]
    try:
        runs["compile"] = bench.compiled(T, U, case.side, "eager" if inside.tiny else "inductor")
        runs["compile"]()
    except Exception as error:
        reasons["compile"] = said(error)
        runs.pop("compile", None)
    taken = harness.samples(runs, inside.device, 2 if inside.tiny else 30)
    times = {name: median(t) for name, t in taken.items()}
    inside.check(
        all(error <= _allowed(case.dtype) for error in errors.values()),
        case=str(case),
        **case.about(),
        chosen=bench.chosen(T, U, case.side),
        ms=times,
        share={name: times["copy"] / t for name, t in times.items() if name != "copy"},
        spread=max(map(harness.spread, taken.values())),
        error=errors,
        refused={name: reason for name, reason in reasons.items() if reason},
    )


def _error(T: torch.Tensor, U: torch.Tensor, side: str, name: str) -> float:
    """‖ours − the formula's‖ / ‖the formula's‖: a figure of something wrong is worth nothing."""
    results = []
    for backend in ("reference", name):
        X = T.clone()
        bench.by_backend(backend, lambda X=X: gk.project_(X, U, side=side))()
        results.append(X)
    exact, ours = results
    return float(torch.dist(ours.float(), exact.float()) / exact.float().norm())


def _allowed(dtype: torch.dtype) -> float:
    """What two ways of rounding may differ by; `leak` looks closer."""
    return max(torch.finfo(dtype).eps, 1e-4)
