"""Which kind a trained weight is of: the one place where that is chosen."""

from grasp.guard.weights import Whole
from grasp.model import Trained


def weight_of(trained: Trained) -> Whole:
    """The weight as this process holds it."""
    if hasattr(trained.parameter, "to_local"):
        from grasp.guard.sharded import Sharded  # DTensors are slow to import

        return Sharded(trained)
    return Whole(trained)
