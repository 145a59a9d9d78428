"""Take a trained LoRA off what is found in its own weights."""

import torch
from torch import nn

import grasp_kernels as gk
from grasp.bases.discover import discover
from grasp.bases.residual import matrix_bases
from grasp.bases.subspaces import Subspaces
from grasp.model import inspect
from grasp.study.rival import Rival
from grasp.study.rivals._shared import loras


@torch.no_grad()
def projected(model: nn.Module, subspaces: Subspaces) -> None:
    """Take a trained LoRA's updates off the subspace: B ← B − U (Uᵀ B), as a guard would have."""
    found = inspect(model)
    bases = matrix_bases(found, subspaces)
    for t in loras(model):
        if t.matrix.name in bases:
            gk.project_(t.parameter, bases[t.matrix.name].to(t.parameter.device), side="left")


class PostHoc(Rival):
    name = "posthoc"
    label = "projected after"
    colour = "#c5a3d9"
    acts_on = "weights"
    source = "GRASP's own projection, after training"
    about = "takes directions found in a plain run's weights out of them"
    strength = 8
    meaning = "directions"
    counted = True
    needs = ("plain",)
    trains = False

    def change(self, model, strength, context):
        projected(model, discover(model, int(strength)))


RIVALS = (PostHoc(),)
