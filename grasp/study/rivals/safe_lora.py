"""Safe LoRA: project updates that point away from an alignment's onto it."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from grasp.model import inspect, lora_update
from grasp.study.rival import Rival
from grasp.study.rivals._shared import loras


@torch.no_grad()
def safe(model: nn.Module, alignment: Mapping[str, Tensor], threshold: float) -> int:
    """Safe LoRA: project the updates that point away from an alignment's onto it.

        C = V Vᵀ / ‖V‖        B ← C B   where cos(C B A, B A) ≤ threshold

    Args:
        model: with a trained LoRA.
        alignment: by the names of the matrices, V = W_aligned − W_unaligned `[d_out, d_in]`.
        threshold: cosine from which on an update stays as it is.

    Returns:
        How many updates were projected. Source: Hsu et al., arXiv:2405.16833.
    """
    count = 0
    for t in loras(model):
        if t.matrix.name not in alignment:
            continue
        V = alignment[t.matrix.name].to(t.parameter)
        new = V @ (V.mT @ t.parameter) / V.norm()
        cosine = torch.cosine_similarity(
            (new @ t.partner).flatten(), (t.parameter @ t.partner).flatten(), dim=0
        )
        if float(cosine) <= threshold:
            t.parameter.copy_(new)
            count += 1
    return count


def updates(model: nn.Module) -> dict[str, Tensor]:
    """ΔW = B A of each matrix with a LoRA, scaled as the model applies it, by its name."""
    matrices = (m for b in inspect(model).blocks for m in b.matrices)
    factors = {m.name: lora_update(m) for m in matrices}
    return {name: B @ A for name, found in factors.items() if found for B, A in [found]}


class SafeLoRA(Rival):
    name = "safe_lora"
    label = "Safe LoRA"
    colour = "#a5b96b"
    acts_on = "weights"
    source = "Hsu et al., arXiv:2405.16833"
    about = "projects a plain run's updates onto a well-behaved run's where they point away"
    strength = 0.5
    meaning = "cosine below which an update is projected"
    needs = ("plain", "aligned")
    trains = False

    def change(self, model, strength, context):
        with context.aligned() as aligned:
            safe(model, updates(aligned), strength)


RIVALS = (SafeLoRA(),)
