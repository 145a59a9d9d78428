"""A trained weight as this process holds it: the seam for weights that are split over processes.

`Guarded` asks these questions of every weight and knows no more of it. Of another kind (a DTensor's
shard, a fragment of a flat buffer) `local` is a part, `part` gives the rows of a basis that go with
it, and `summed` adds what each process found for its own part.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from grasp.model import Trained


class Whole:
    """A weight that this process holds whole."""

    def __init__(self, trained: Trained):
        self.trained = trained

    @property
    def local(self) -> Tensor:
        """What this process holds of it, and what a projection writes to."""
        return self.trained.parameter

    @property
    def gradient(self) -> Tensor | None:
        """The gradient of `local`."""
        return self.trained.parameter.grad

    @property
    def shape(self) -> torch.Size:
        """Of the weight as a whole."""
        return self.trained.parameter.shape

    def part(self, basis: Tensor) -> Tensor:
        """The rows of a basis `[d, k]` that multiply `local`."""
        return basis

    def summed(self, coefficients: Sequence[Tensor]) -> Sequence[Tensor]:
        """Coefficients of every process's part, added up: those of the weight as a whole."""
        return coefficients

    def start(self) -> Tensor:
        """`local` when training began, as far as it is known.

        A LoRA's factors count as 0: B starts there, and A goes there along what is blocked, which
        changes no output while B is 0. Of a weight trained itself no copy is kept, so this is what
        it is now.
        """
        now = self.trained.parameter.detach()
        return now if self.trained.partner is None else torch.zeros_like(now)
