"""A trained weight as this process holds it: the seam for weights that are split over processes.

`Guarded` asks these questions of every weight and knows no more of it. Of another kind (a DTensor's
shard, a fragment of a flat buffer) `local` is a part, `part` gives the rows of a basis that go with
it, `summed` adds what each process found for its own part, and `whole` puts the parts together.
Where the answer takes all processes, all must ask, and in one order.
"""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

import grasp_kernels as gk
from grasp.model import Trained
from grasp_kernels.arguments import Side


class Whole:
    """A weight that this process holds whole."""

    split = False
    """Whether other processes hold other parts, so that all of them must ask together."""

    def __init__(self, trained: Trained):
        self.trained = trained
        self.kept: Tensor | None = None
        """`local` when training began; None of a LoRA whose B began at 0, which needs none."""

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
        return self.trained.shape

    @property
    def stepped(self) -> Tensor:
        """What an optimizer holds for it."""
        return self.trained.parameter

    @property
    def moves(self) -> bool:
        """Whether it may be written now."""
        return True

    def of(self, T: Tensor) -> Tensor:
        """Of a tensor as long as `stepped` what lies as `local` does."""
        return T

    def kind(self, side: Side) -> Hashable:
        """Equal for weights that one `projector` can take together, on this side."""
        return Whole

    def part(self, basis: Tensor, side: Side) -> Tensor:
        """The rows of a basis `[d, k]` that multiply `local` from a side."""
        return basis

    def summed(self, coefficients: Sequence[Tensor], side: Side) -> Sequence[Tensor]:
        """Coefficients of every process's part, added up: of the weight where a basis cuts it."""
        return coefficients

    def whole(self, T: Tensor, side: Side | None = None) -> Tensor:
        """Of what lies as `local` does the whole: a tensor, or coefficients along a basis."""
        return T

    def now(self) -> Tensor:
        """The weight as a whole, as the model holds it and as it is saved."""
        return self.whole(self.local.detach())

    def laid(self, G: Tensor) -> Tensor:
        """Of a gradient as `sharding.gradients` gives it what lies as `local` does."""
        return G

    def times(self, T: Tensor, basis: Tensor, side: Side) -> Tensor:
        """Coefficients along a basis of the weight as a whole, of this process's part `T` alone."""
        return product(T, self.part(basis, side), side)

    def own(self, T: Tensor, side: Side | None = None) -> Tensor:
        """Of a whole the part that lies as `local` does: the way back from `whole`."""
        return T

    def put(self, T: Tensor) -> None:
        """Write the weight as a whole; every process gives the same."""
        self.local.copy_(self.own(T))

    @staticmethod
    def projector(
        weights: Sequence["Whole"],
        tensors: Sequence[Tensor] | None,
        bases: Sequence[Tensor],
        Cs: Sequence[Tensor] | None,
        side: Side,
        measure: bool = False,
    ) -> gk.Projector:
        """What projects weights of one kind, or `tensors` that lie as they do, as often as asked.

        Args:
            bases: of the weights as a whole.
            Cs: as `Guarded.coefficients` gives them.
            side, measure: as `grasp_kernels.Projector`.
        """
        bases = [w.part(basis, side) for w, basis in zip(weights, bases, strict=True)]
        tensors = [w.local for w in weights] if tensors is None else tensors
        return gk.Projector(tensors, bases, Cs, side=side, measure=measure)

    def remember(self) -> None:
        """Keep the present value as that of the start, on the CPU: bases may grow much later."""
        B = self.trained.zero_factor
        if B is None or self._any(B):
            self.kept = self.local.detach().to("cpu", copy=True)

    def start(self) -> Tensor:
        """`local` when training began.

        Of a LoRA whose B began at 0 both factors count as 0: A goes there along what is blocked,
        which changes no output while B is 0.
        """
        now = self.local.detach()
        return torch.zeros_like(now) if self.kept is None else self.kept.to(now)

    def _any(self, T: Tensor) -> bool:
        """Whether a parameter is other than 0 anywhere."""
        return bool(T.detach().any())


def product(T: Tensor, basis: Tensor, side: Side) -> Tensor:
    """Uᵀ T, or T U on the right side, in fp32 at least."""
    T = T.detach().to(torch.promote_types(T.dtype, torch.float32))
    basis = basis.to(T.device).to(T.dtype)  # in this order: MPS has no fp64
    return basis.mT @ T if side == "left" else T @ basis


def exact(T: Tensor) -> Tensor:
    """In fp64, which MPS has not: there on the CPU."""
    T = T.detach()
    return (T.cpu() if T.device.type == "mps" else T).double()
