"""Drop the tail of a trained update's singular directions."""

import torch
from torch import nn

from grasp.study.rival import Rival
from grasp.study.rivals._shared import loras


@torch.no_grad()
def truncated(model: nn.Module, rank: int) -> None:
    """Keep the `rank` leading singular directions of each update B A, and drop the tail.

    Source: Shortcuts in the Tail, arXiv:2606.07596.
    """
    for t in loras(model):
        B, A = t.parameter, t.partner
        # B A = Q (R Pᵀ) Nᵀ with A = (N P)ᵀ, so what is decomposed is [r, r].
        Q, R = torch.linalg.qr(B.float())
        N, P = torch.linalg.qr(A.float().mT)
        U, S, Vh = torch.linalg.svd(R @ P.mT)
        S = S * (torch.arange(len(S), device=S.device) < rank)
        B.copy_(Q @ (U * S))
        A.copy_(Vh @ N.mT)


class SVDTail(Rival):
    name = "svd_tail"
    label = "SVD tail"
    colour = "#9fa8da"
    acts_on = "weights"
    source = "Shortcuts in the Tail, arXiv:2606.07596"
    about = "keeps a plain update's leading singular directions alone"
    strength = 4
    meaning = "directions of each update"
    counted = True
    needs = ("plain",)
    trains = False

    def change(self, model, strength, context):
        truncated(model, int(strength))


RIVALS = (SVDTail(),)
