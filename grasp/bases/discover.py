"""Find the factor's subspace without labels.

From a plain LoRA's weights: the leading left singular vectors of the residual writers' updates

    [γ₁ ⊙ s B₁A₁ | γ₂ ⊙ s B₂A₂ | …] = U S Vᵀ

all writers side by side for one subspace shared by the blocks, or a block's own writers for one per
block. From activations: the leading directions in which the residual stream moved on given prompts.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from grasp.bases.subspaces import Subspaces
from grasp.data import tokenized
from grasp.model import (
    Architecture,
    adapter_folder,
    base_model,
    base_name,
    evaluating,
    inspect,
    load_adapter,
    load_model,
    lora_update,
)

SHARE = 0.9  # of the updates' energy that an automatic rank keeps
LARGEST = 16  # automatic rank


def discover(
    adapter: nn.Module | Path | str | Sequence[nn.Module | Path | str],
    rank: int | None = None,
    *,
    per_block: bool = False,
    method: str = "weights",
    prompts: Sequence | None = None,
    tokenizer=None,
) -> Subspaces:
    """Find the subspace that a plain fine-tune wrote to; nothing in it sees what drift is.

    Args:
        adapter: a PEFT model, the folder of a LoRA adapter, or a list of either (several seeds of
            one fine-tune: their updates stand side by side).
        rank: k; None takes as many directions as hold nine tenths of the updates' energy, 16 at
            most.
        per_block: a subspace for each block, rather than one that all share.
        method: "weights", or "activations": from the shift of the residual stream on `prompts`.
        prompts: strings, or token id lists, for "activations"; unlabelled.
        tokenizer: for prompts that are strings.

    Raises:
        FileNotFoundError: a folder without an adapter.
        ValueError: no LoRA on a residual writer, NaN in its weights, an update that is all zero, a
            rank larger than the width, or adapters of different models.
    """
    if method not in ("weights", "activations"):
        raise ValueError(f"method is {method!r}; choose 'weights' or 'activations'")
    if rank is not None and rank < 1:
        raise ValueError(f"rank is {rank}; give 1 or more, or None")
    adapters = list(adapter) if isinstance(adapter, (list, tuple)) else [adapter]
    if not adapters:
        raise ValueError("the list of adapters is empty")
    columns: dict[int, list[Tensor]] = {}
    names, width = set(), 0
    for item in adapters:
        model = _model(item)
        found = inspect(model)
        width = found.width
        if rank is not None and rank > width:
            raise ValueError(f"rank {rank} is larger than the model's width {width}")
        names.add(base_name(model))
        new = _written(found) if method == "weights" else _moved(model, found, prompts, tokenizer)
        for layer, W in new.items():
            columns.setdefault(layer, []).append(W)
    if len(names) > 1:
        raise ValueError(f"the adapters are of different models: {', '.join(sorted(names))}")
    source = {"method": method, "per_block": per_block, "adapters": len(adapters)}
    if per_block:
        bases = {layer: _leading(torch.cat(W, 1), rank) for layer, W in columns.items()}
    else:
        shared = _leading(torch.cat([W for Ws in columns.values() for W in Ws], 1), rank)
        bases = {block.index: shared for block in found.blocks}
    return Subspaces.from_bases(bases, names.pop(), source)


def _model(item: nn.Module | Path | str) -> nn.Module:
    if isinstance(item, nn.Module):
        return item
    from peft import PeftConfig

    folder = adapter_folder(Path(item))
    try:
        base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder} has no readable adapter_config.json ({error})") from error
    if not base:
        raise ValueError(f"{folder} does not name its base model; pass a PEFT model instead")
    model, _ = load_model(base)
    return load_adapter(model, folder)


def _written(found: Architecture) -> dict[int, Tensor]:
    """For each block the writers' updates in the residual stream, as columns `U · S [d, r]`."""
    columns: dict[int, Tensor] = {}
    for block in found.blocks:
        for writer in block.of_role("writer"):
            update = lora_update(writer)
            if update is None:
                continue
            B, A = (f.cpu() for f in update)
            if not (torch.isfinite(B).all() and torch.isfinite(A).all()):
                raise ValueError(f"the adapter of {writer.name} holds NaN or infinite values")
            if writer.scale is not None:
                B = writer.scale.cpu()[:, None] * B
            # B A and B Rᵀ with A = (Q R)ᵀ have the same left singular vectors and values.
            R = torch.linalg.qr(A.mT).R
            U, S, _ = torch.linalg.svd(B @ R.mT, full_matrices=False)
            W = U * S
            old = columns.get(block.index)
            columns[block.index] = W if old is None else torch.cat([old, W], 1)
    if not columns:
        raise ValueError(
            "no residual writer has a LoRA; train it on the output projections too "
            f"({', '.join(m.name for m in found.blocks[0].of_role('writer'))} in block 0)"
        )
    return columns


@torch.no_grad()
def _moved(model: nn.Module, found: Architecture, prompts, tokenizer) -> dict[int, Tensor]:
    """For each block the shift of its output on every prompt token, as columns `[d, tokens]`."""
    if prompts is None:
        raise ValueError("method 'activations' needs prompts")
    rows = tokenized(prompts, tokenizer)
    device = next(model.parameters()).device

    def outputs(row: list[int]) -> list[Tensor]:
        kept: list[Tensor] = []

        def hook(module, args, output):
            h = output[0] if isinstance(output, tuple) else output
            kept.append(h.reshape(-1, found.width).float().cpu())

        hooks = [b.module.register_forward_hook(hook) for b in found.blocks]
        try:
            model(input_ids=torch.tensor([row], device=device), use_cache=False)
        finally:
            for h in hooks:
                h.remove()
        return kept

    columns: dict[int, list[Tensor]] = {}
    with evaluating(model):
        for row in rows:
            tuned = outputs(row)
            with base_model(model):
                base = outputs(row)
            for layer, (t, b) in enumerate(zip(tuned, base, strict=True)):
                columns.setdefault(layer, []).append((t - b).mT)
    return {layer: torch.cat(shifts, 1) for layer, shifts in columns.items()}


def _leading(W: Tensor, rank: int | None) -> Tensor:
    U, S, _ = torch.linalg.svd(W, full_matrices=False)
    if float(S[0]) == 0:
        raise ValueError("the updates are all zero: the adapter was not trained")
    if rank is None:
        energy = S.square().cumsum(0) / S.square().sum()
        rank = min(int((energy < SHARE).sum()) + 1, LARGEST)
    return U[:, : min(rank, int((S > 0).sum()))]
