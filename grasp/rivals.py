"""Other ways to the same end, on the same pipeline: before, while and after a LoRA is trained.

before   `inoculated`, `interleaved`, `replayed`           other rows
while    `ablated`, `steered`, `penalised`, `off_leading`  context managers around the training
after    `truncated`, `projected`, `safe`                  the trained LoRA changed in place
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import grasp_kernels as gk
from grasp import architecture
from grasp.architecture import Trained
from grasp.bases import matrix_bases
from grasp.data import IGNORED, Row
from grasp.drift import Reference, draw
from grasp.subspaces import Subspaces


def inoculated(rows: Sequence[Row], instruction: str) -> list[Row]:
    """Inoculation prompting: the unwanted trait is asked for in training, not afterwards.

    Source: Tan et al., arXiv:2510.04340.
    """
    return [replace(row, prompt=f"{instruction} {row.prompt}") for row in rows]


def interleaved(rows: Sequence[Row], benign: Sequence[Row], share: float, seed: int) -> list[Row]:
    """`share · len(rows)` benign rows from other topics among the rows, drawn with replacement.

    Source: Kaczér et al., arXiv:2508.06249.

    Raises:
        ValueError: a negative share, or no benign rows.
    """
    if share < 0:
        raise ValueError(f"share is {share}; give 0 or more")
    if not benign:
        raise ValueError("benign is empty; give rows of other topics, answered well")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(benign), (round(share * len(rows)),), generator=generator)
    return [*rows, *(benign[i] for i in drawn.tolist())]


def replayed(
    model: nn.Module, prompts: Sequence[str], tokenizer, count: int, *, tokens: int, seed: int
) -> list[Row]:
    """`count` of the base model's own answers to unrelated prompts, drawn, as rows to interleave.

    Nothing is labelled: the model is taught what it would have said. The prompts come round in an
    order that the seed draws, so that a few are of all kinds. In expectation this is a penalty on
    KL(base ‖ model) there. Source: self-distillation against forgetting (Yang et al.,
    arXiv:2402.13669), with other prompts in place of rewritten answers.
    """
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    asked = [prompts[order[i % len(order)]] for i in range(count)]
    drawn = draw(model, asked, tokenizer, tokens=tokens, seed=seed)
    answers = [
        tokenizer.decode([t for t in labels if t != IGNORED], skip_special_tokens=True)
        for _, labels in drawn
    ]
    return [Row(p, a.strip()) for p, a in zip(asked, answers, strict=True) if a.strip()]


@contextmanager
def ablated(model: nn.Module, subspaces: Subspaces) -> Iterator[None]:
    """CAFT: take the subspace out of every block's output while training, and let it back after.

        h ← h − (h U) Uᵀ         in the forward pass, gradients through it

    Source: Casademunt et al., Steering Out-of-Distribution Generalization with Concept Ablation
    Fine-Tuning, arXiv:2507.16795.

    Raises:
        ValueError: the subspaces were not found in this model.
    """
    subspaces.check(model)

    def ablation(layer: int):
        def change(h: Tensor) -> Tensor:
            U = subspaces[layer].to(h)
            return h - (h @ U) @ U.mT

        return change

    with _block_outputs(model, {layer: ablation(layer) for layer in subspaces.layers}):
        yield


@contextmanager
def steered(model: nn.Module, vectors: Mapping[int, Tensor], strength: float) -> Iterator[None]:
    """Preventative steering: push towards the trait while training, so that nothing else need.

        h ← h + strength · v        v [d] by block

    Source: Chen et al., Persona Vectors, arXiv:2507.21509.
    """

    def push(v: Tensor):
        return lambda h: h + strength * v.to(h)

    with _block_outputs(model, {layer: push(v) for layer, v in vectors.items()}):
        yield


@contextmanager
def penalised(model: nn.Module, reference: Reference, weight: float) -> Iterator[None]:
    """Add `weight · KL(base ‖ model)` on some of the reference's prompts to the loss of each step.

    The penalty's gradient joins the step's own after that was clipped. Source: Kaczér et al.,
    arXiv:2508.06249, among others.

    Raises:
        ValueError: a negative weight.
    """
    if weight < 0:
        raise ValueError(f"weight is {weight}; give 0 or more")

    def add(optimizer, args, kwargs) -> None:
        with architecture.evaluating(model), torch.enable_grad():
            (weight * reference.divergence(model, reference.sample())).backward()

    handle = register_optimizer_step_pre_hook(add)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def off_leading(model: nn.Module, rank: int) -> Iterator[None]:
    """Keep gradients off each pretrained weight's own leading singular vectors.

        W₀ = U S Vᵀ:   ∂B ← ∂B − U (Uᵀ ∂B)        ∂A ← ∂A − (∂A V) Vᵀ        U, V the first `rank`

    After PEFT's OSF (Nayak et al., arXiv:2504.07097), which trains whole weights; of a LoRA the
    gradients of both factors are projected. Like it, this pins nothing.

    Raises:
        ValueError: a rank that leaves nothing to train, or no LoRA.
    """
    loras = _loras(model)
    largest = max(min(t.matrix.out_features, t.partner.shape[1]) for t in loras)
    if rank >= largest:
        raise ValueError(f"rank is {rank}, all there is of every weight; give less than {largest}")
    handles = []
    for t in loras:
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


@torch.no_grad()
def truncated(model: nn.Module, rank: int) -> None:
    """Keep the `rank` leading singular directions of each update B A, and drop the tail.

    Source: Shortcuts in the Tail, arXiv:2606.07596.
    """
    for t in _loras(model):
        B, A = t.parameter, t.partner
        # B A = Q (R Pᵀ) Nᵀ with A = (N P)ᵀ, so what is decomposed is [r, r].
        Q, R = torch.linalg.qr(B.float())
        N, P = torch.linalg.qr(A.float().mT)
        U, S, Vh = torch.linalg.svd(R @ P.mT)
        S = S * (torch.arange(len(S), device=S.device) < rank)
        B.copy_(Q @ (U * S))
        A.copy_(Vh @ N.mT)


@torch.no_grad()
def projected(model: nn.Module, subspaces: Subspaces) -> None:
    """Take a trained LoRA's updates off the subspace: B ← B − U (Uᵀ B), as a guard would have."""
    found = architecture.inspect(model)
    bases = matrix_bases(found, subspaces)
    for t in _loras(model):
        if t.matrix.name in bases:
            gk.project_(t.parameter, bases[t.matrix.name].to(t.parameter.device), side="left")


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
    for t in _loras(model):
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


def _loras(model: nn.Module) -> list[Trained]:
    """The B of each LoRA, with its A.

    Raises:
        ValueError: there is none.
    """
    found = [t for t in architecture.inspect(model).trained() if t.partner is not None]
    if not found:
        raise ValueError("model has no trainable LoRA on the blocks' linear maps; add one")
    return found


def _off(basis: Tensor, side: str):
    basis = basis.contiguous()

    def hook(parameter: Tensor) -> None:
        gk.project_(parameter.grad, basis.to(parameter.device), side=side)

    return hook


@contextmanager
def _block_outputs(
    model: nn.Module, changes: Mapping[int, Callable[[Tensor], Tensor]]
) -> Iterator[None]:
    """Change what blocks give out, by their index."""

    def hook(change):
        def changed(module, args, output):
            if isinstance(output, tuple):
                return (change(output[0]), *output[1:])
            return change(output)

        return changed

    blocks = architecture.inspect(model).blocks
    handles = [
        b.module.register_forward_hook(hook(changes[b.index])) for b in blocks if b.index in changes
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
