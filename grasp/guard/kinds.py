"""Which kind a trained weight is of: the one place where that is chosen."""

from grasp.guard.weights import Whole
from grasp.guard.zero import Zero
from grasp.model import Trained


def weights_of(trained: list[Trained], zero: Zero | None) -> dict[int, Whole]:
    """The weights as this process holds them, by the ids of their parameters.

    Args:
        zero: what trains them, if that is DeepSpeed's.
    """
    distinct = list({id(t.parameter): t for t in trained}.values())
    found = [Whole(t) for t in distinct] if zero is None else zero.weights(distinct)
    return {id(w.trained.parameter): w for w in found}
