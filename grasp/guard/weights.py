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
        self.kept: Tensor | None = None
        """Its value when training began; None of a LoRA whose B began at 0, which needs none."""

    @property
    def local(self) -> Tensor:
        """What this process holds of it, and what a projection writes to."""
        parameter = self.trained.parameter
        return self.trained.of(parameter.detach()) if self.is_part else parameter

    @property
    def is_part(self) -> bool:
        """Whether `local` is a view of a parameter, which has to be taken anew at each use."""
        return self.trained.matrix.index is not None

    @property
    def trains(self) -> bool:
        """Whether training moves it."""
        return self.trained.parameter.requires_grad

    @property
    def gradient(self) -> Tensor | None:
        """The gradient of `local`."""
        gradient = self.trained.parameter.grad
        return None if gradient is None else self.trained.of(gradient)

    @property
    def shape(self) -> torch.Size:
        """Of the weight as a whole."""
        return self.local.shape

    def part(self, basis: Tensor) -> Tensor:
        """The rows of a basis `[d, k]` that multiply `local`."""
        return basis

    def summed(self, coefficients: Sequence[Tensor]) -> Sequence[Tensor]:
        """Coefficients of every process's part, added up: those of the weight as a whole."""
        return coefficients

    def remember(self) -> None:
        """Keep the present value as that of the start, on the CPU: bases may grow much later."""
        B = self.trained.zero_factor
        if B is None or bool(B.detach().any()):
            self.kept = self.local.detach().to("cpu", copy=True)

    def start(self) -> Tensor:
        """`local` when training began.

        Of a LoRA whose B began at 0 both factors count as 0: A goes there along what is blocked,
        which changes no output while B is 0.
        """
        now = self.local.detach()
        return torch.zeros_like(now) if self.kept is None else self.kept.to(now)
