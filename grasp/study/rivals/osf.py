"""Gradients off the leading singular directions of each pretrained weight."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import grasp_kernels as gk
from grasp.study.rival import Rival
from grasp.study.rivals._shared import loras


@contextmanager
def off_leading(model: nn.Module, rank: int) -> Iterator[None]:
    """Keep gradients off each pretrained weight's own leading singular vectors.

        W₀ = U S Vᵀ:   ∂B ← ∂B − U (Uᵀ ∂B)        ∂A ← ∂A − (∂A V) Vᵀ        U, V the first `rank`

    After PEFT's OSF (Nayak et al., arXiv:2504.07097), which trains whole weights; of a LoRA the
    gradients of both factors are projected. Like it, this pins nothing.

    Raises:
        ValueError: a rank that leaves nothing to train, or no LoRA.
    """
    found = loras(model)
    largest = max(min(t.matrix.out_features, t.partner.shape[1]) for t in found)
    if rank >= largest:
        raise ValueError(f"rank is {rank}, all there is of every weight; give less than {largest}")
    handles = []
    for t in found:
        W = t.matrix.back(torch.eye(t.matrix.out_features)).mT  # [d_out, d_in]
        U, _, Vh = torch.linalg.svd(W, full_matrices=False)
        handles += [
            t.parameter.register_post_accumulate_grad_hook(_off(U[:, :rank], "left")),
            t.partner.register_post_accumulate_grad_hook(_off(Vh[:rank].mT, "right")),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _off(basis: Tensor, side: str):
    basis = basis.contiguous()

    def hook(parameter: Tensor) -> None:
        gk.project_(parameter.grad, basis.to(parameter.device), side=side)

    return hook


class OSF(Rival):
    name = "osf"
    label = "OSF"
    colour = "#546e7a"
    acts_on = "gradients"
    source = "after Nayak et al., arXiv:2504.07097, as in PEFT"
    about = "keeps gradients off each weight's leading singular directions"
    strength = 16
    meaning = "directions of each weight"
    counted = True

    def around(self, strength, context):
        return lambda model: off_leading(model, int(strength))


RIVALS = (OSF(),)
