"""What begins to train after a guard was attached, which then covers less than all."""

import warnings

from torch import nn
from torch.optim import Optimizer


class Watch:
    """Which parameters of a model train, from now on.

    Args:
        model: without its wrapper.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.uncovered: list[str] = []
        """Parameters that began to train since."""
        self._parameters = list(model.parameters())
        self._asked = [p.requires_grad for p in self._parameters]
        self._seen: dict[int, tuple] = {}  # at each optimizer's last step

    def look(self, optimizer: Optimizer) -> None:
        """After a step: tell at once of what began to train."""
        held = sum(len(group["params"]) for group in optimizer.param_groups)
        now = [p.requires_grad for p in self._parameters], held
        if now == self._seen.setdefault(id(optimizer), now) == (self._asked, held):
            return
        known = {id(p) for p, asked in zip(self._parameters, self._asked, strict=True) if asked}
        named = dict(self.model.named_parameters())
        new = [n for n, p in named.items() if p.requires_grad and id(p) not in known]
        self._parameters = list(named.values())
        self._asked = [p.requires_grad for p in self._parameters]
        self._seen = {id(optimizer): (self._asked, held)}
        if new:
            self.uncovered += new
            warnings.warn(
                f"{', '.join(new[:4])}{' …' if len(new) > 4 else ''} began to train after the "
                "guard was attached and is not covered, so the certificate will not hold; unfreeze "
                "or switch on all that trains before attaching",
                stacklevel=6,
            )
