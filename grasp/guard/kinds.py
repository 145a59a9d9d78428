"""Which kind a trained weight is of: the one place where that is chosen."""

from grasp.guard.fragments import Fragment, Place
from grasp.guard.weights import Whole
from grasp.guard.zero import Zero
from grasp.model import Trained


def weights_of(trained: list[Trained], zero: Zero | None) -> dict[tuple, Whole]:
    """The weights as this process holds them, by their keys.

    Args:
        zero: what trains them, if that is DeepSpeed's.

    Raises:
        ValueError: names a weight that DeepSpeed trains elsewhere than it says, or experts that
            are split over processes.
    """
    distinct = list({t.key: t for t in trained}.values())
    for t in distinct:
        if t.matrix.index is not None and (zero or hasattr(t.parameter, "to_local")):
            raise ValueError(
                f"{t.name} is one of a mixture's experts, which can't be guarded where weights are "
                "split over processes (FSDP2, DeepSpeed); train with DDP, or the attention alone"
            )
    if zero is None:
        return {t.key: _weight(t) for t in distinct}
    places = zero.places([t.parameter for t in distinct])
    found = [_weight(t, zero, at) for t, at in zip(distinct, places, strict=True)]
    zero.refuse_elsewhere([w for w in found if isinstance(w, Fragment)])
    return {w.trained.key: w for w in found}


def _weight(t: Trained, zero: Zero | None = None, at: list[Place] | None = None) -> Whole:
    if zero is not None and at is not None:
        return Fragment(t, zero, at, zero.process)
    if hasattr(t.parameter, "to_local"):
        from grasp.guard.sharded import Sharded  # DTensors are slow to import

        return Sharded(t)
    return Whole(t)
