"""What a guard says of the weights that are kept: how much got through, and whether that holds."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from grasp.guard.frozen import Frozen
from grasp.guard.guarded import Change, Guarded

EXACT = 1e-6  # of ΔW that may lie in a basis
ROUNDINGS = 4  # of the weight that training began with, each ε/2 of its norm: measured 1 to 2


class Judged(NamedTuple):
    """A change, and what there is to judge it by."""

    change: Change
    half: float  # ε/2 of the dtype: that of the training, or of a whole weight if it is finer
    start: float  # ‖W₀‖ of what rounding goes by

    @classmethod
    def of(cls, g: Guarded) -> "Judged":
        dtypes = [g.parameter.dtype] if g.partner else [g.parameter.dtype, g.weight.kept.dtype]
        change = g.change()
        start = change.start
        if g.basis.shape[1] == g.basis.shape[0] and not g.inside:
            start = max(start, g.trained.matrix.norm())
        return cls(change, min(torch.finfo(dtype).eps for dtype in dtypes) / 2, start)

    @property
    def rounding(self) -> float:
        """How far a weight may go by rounding alone: 4 · ε/2 · ‖W₀‖, 0 of one that began with 0."""
        return ROUNDINGS * self.half * self.start

    @property
    def still(self) -> bool:
        """Whether it did not move beyond rounding, so that no share of ΔW says anything."""
        return self.change.size <= self.rounding

    def verdict(self) -> dict:
        """What may get through is 1e-6, or what rounding to the weight's dtype adds, if more.

            through = ‖UᵀΔW‖ / ‖ΔW‖  ≤  max(1e-6, ε/2, rounding / ‖ΔW‖)  <  1

        A weight that training did not begin with 0 is rounded as a whole at each step, so what it
        does along a basis is kept to that rounding, however little it moves otherwise. A basis that
        fills its whole space leaves ΔW nothing but rounding, which is set against the weight
        beneath. What is all rounding has neither share nor bound, and holds: ‖UᵀΔW‖ is no more.
        """
        change = self.change
        if change.size > 0 and self.still:
            found = {"through": None, "bound": None, "holds": change.inside <= self.rounding}
        else:
            bound = max(EXACT, self.half, self.rounding / change.size if change.size > 0 else 0.0)
            found = {"through": change.through, "bound": bound, "holds": change.through <= bound}
        return found | ({"moved": change.size / self.start} if self.start > 0 else {})


def certificate(
    guarded: Sequence[Guarded], frozen: Sequence[Frozen] = (), uncovered: Sequence[str] = ()
) -> dict:
    """Whether the guarantee holds for the weights as they are now, in total and by module.

    Args:
        guarded, frozen: all of a guard.
        uncovered: parameters that began to train after the guard was attached.

    Returns:
        `holds`: every weight is finite, nothing more got through than its `bound`, and nothing is
        uncovered. `through`: the most of any module that moved; None if a weight is NaN or
        infinite. `unmoved`: modules that did not move beyond rounding, whose `through` and `bound`
        are None. `share`: of the energy of inputs on held-out prompts, the least that any module's
        basis of inputs holds; None without such. `finite`, `uncovered`, and `modules`: `rank`,
        `blocked`, `through`, `bound`, `holds`; `share`, of inputs; `moved`, ‖ΔW‖ / ‖W₀‖, of weights
        that training did not begin with 0; of frozen inputs `frozen`, whether A is bit for bit what
        it was when it was put off V, and `before`, ‖A V‖ / ‖A‖ until then.
    """
    modules, through, unmoved = {}, [0.0], []
    for f in frozen:
        modules[f.name] = {k: finite(v) for k, v in judged_frozen(f).items()}
        through.append(modules[f.name]["through"] or f.through())
    for g in guarded:
        judged = Judged.of(g)
        found = g.leak(judged.change) | judged.verdict()
        found |= {} if g.share is None else {"share": g.share}
        modules[g.name] = {k: finite(v) for k, v in found.items()}
        if judged.still:
            unmoved.append(g.name)
        else:
            through.append(judged.change.through)
    all_finite = all(map(math.isfinite, through))
    shares = [m["share"] for m in modules.values() if "share" in m]
    return {
        "holds": all(m["holds"] for m in modules.values()) and all_finite and not uncovered,
        "through": max(through) if all_finite else None,
        "share": min(shares) if shares else None,
        "finite": all_finite,
        "unmoved": unmoved,
        "uncovered": list(uncovered),
        "modules": modules,
    }


def judged_frozen(f: Frozen) -> dict:
    """Of a LoRA whose A is frozen: as a module stands in `certificate`."""
    found, still = f.leak(), f.still
    bound = max(EXACT, torch.finfo(f.parameter.dtype).eps / 2)
    return found | {
        "bound": bound,
        "holds": still and found["through"] <= bound,
        "share": f.share,
        "frozen": still,
        "before": f.size,
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
    if moved := [name for name, m in found["modules"].items() if m.get("frozen") is False]:
        return (
            f"{moved[0]} was frozen and is not what it was: something trained, loaded or cast it; "
            "train B alone, in the dtype of the start"
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
