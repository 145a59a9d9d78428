"""What the guard holds under DeepSpeed, and what it costs there, for `bench_engines.py`'s list."""

import statistics
from pathlib import Path

from tests.test_processes import together
from tests.zero import SPLIT, Run, alone, distance, measured, train

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
CONFIGURATIONS = {
    "DeepSpeed ZeRO-1": Run(1),
    "DeepSpeed ZeRO-2": Run(2),
    "DeepSpeed ZeRO-2, offloaded": Run(2, OFFLOAD),
    "DeepSpeed ZeRO-3": Run(3, SPLIT),
    "DeepSpeed ZeRO-3, offloaded": Run(3, {**SPLIT, **OFFLOAD}),
    "DeepSpeed ZeRO-3, all weights": Run(3, SPLIT, full=True),
    "DeepSpeed ZeRO-2, bf16": Run(2, about={"bf16": {"enabled": True}}),
}


def _both(rank: int, folder: Path, run: Run) -> list[dict]:
    return [train(run), train(run, guarded=False)]


def measure(run: Run, folder: Path) -> dict[str, float]:
    """One configuration in two processes.

    Args:
        run: of `CONFIGURATIONS`.
        folder: for what the processes hand back.

    Returns:
        `U` and `V`, the largest ‖UᵀΔW‖ / ‖ΔW‖ and ‖ΔW V‖ / ‖ΔW‖ of the fp32 masters; `saved`, the
        larger of both for the weights as they are saved; `distance` from one process without
        DeepSpeed; seconds of a step, `guarded` and `unguarded`.
    """
    both = together(_both, folder, run)
    guarded, free = both[0]
    start = {n: w.to(guarded["saved"][n].dtype) for n, w in guarded["start"].items()}
    U, V = measured(guarded["bases"], guarded["start"], guarded["weights"])
    return {
        "U": U,
        "V": V,
        "saved": max(measured(guarded["bases"], start, guarded["saved"])),
        "distance": distance(guarded["weights"], alone(run)),
        "guarded": statistics.mean(found[0]["seconds"] for found in both),
        "unguarded": statistics.mean(found[1]["seconds"] for found in both),
    }
