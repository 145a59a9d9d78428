"""What a guard says of the weights that are kept: how much got through, and whether that holds."""

import math
from collections.abc import Mapping, Sequence

import torch

from grasp.guard.guarded import Change, Guarded

EXACT = 1e-6  # of ΔW that may lie in a basis
ROUNDINGS = 4  # of the weight that training began with, each ε/2 of its norm: measured 1 to 2


def bound(g: Guarded, change: Change) -> float:
    """What may get through: 1e-6, or what rounding to the weight's dtype adds, if that is more.

        max(1e-6, ε/2, 4 · ε/2 · ‖W₀‖ / ‖ΔW‖)      ε of the dtype

    A weight that training did not begin with 0 is rounded as a whole at each step, so what it does
    along a basis is kept to that rounding, however little it moves otherwise. A basis that fills
    its whole space leaves ΔW nothing but rounding, which is set against the weight beneath.
    """
    dtypes = [g.parameter.dtype] if g.partner else [g.parameter.dtype, g.weight.kept.dtype]
    half = min(torch.finfo(dtype).eps for dtype in dtypes) / 2  # of the training, of a whole weight
    start = change.start
    if g.basis.shape[1] == g.basis.shape[0]:
        start = max(start, g.trained.matrix.norm())
    return max(EXACT, half, ROUNDINGS * half * start / change.size if change.size > 0 else 0.0)


def certificate(guarded: Sequence[Guarded], uncovered: Sequence[str] = ()) -> dict:
    """Whether the guarantee holds for the weights as they are now, in total and by module.

    Args:
        guarded: all of a guard.
        uncovered: parameters that began to train after the guard was attached.

    Returns:
        `holds`: every weight is finite, nothing more got through than its `bound`, and nothing is
        uncovered. `through`: the most of any module; None if a weight is NaN or infinite.
        `finite`, `uncovered`, and `modules`: `Guarded.leak` with `bound`, `holds`, and of weights
        that training did not begin with 0 `moved`, ‖ΔW‖ / ‖W₀‖.
    """
    modules = {}
    for g in guarded:
        change = g.change()
        found = g.leak(change) | {"bound": bound(g, change)}
        found["holds"] = math.isfinite(change.through) and change.through <= found["bound"]
        if change.start > 0:
            found["moved"] = change.size / change.start
        modules[g.name] = {k: finite(v) for k, v in found.items()}
    through = [m["through"] for m in modules.values()]
    return {
        "holds": all(m["holds"] for m in modules.values()) and not uncovered,
        "through": None if None in through else max(through),
        "finite": None not in through,
        "uncovered": list(uncovered),
        "modules": modules,
    }


def why(found: Mapping) -> str:
    """The likely cause, in a sentence, of a certificate that does not hold."""
    if not found["finite"]:
        return "weights are NaN or infinite: training diverged; lower the learning rate"
    if not found["stepped"]:
        return (
            "no step of a torch optimizer was seen, so no basis could grow; train with one, or "
            "block inputs alone (rank=0)"
        )
    if found["uncovered"]:
        names = ", ".join(found["uncovered"][:4])
        return (
            f"{names} began to train, or was put in another's place, after the guard was attached; "
            "unfreeze and load before training"
        )
    return (
        "the weights were moved after the last guarded step: another model was loaded at the end, "
        "weights were averaged (hold the average too: guard.pin()) or cast, or something other "
        "than a torch optimizer changed them"
    )


def finite(value):
    """A value as JSON can hold it: None for NaN and infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
