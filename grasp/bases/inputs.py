"""What each matrix takes in on unrelated prompts: inputs on which a fine-tune may not act.

    X̂ [t, d_in]   inputs at the reference's tokens, each of length 1
    V [d_in, k]   leading right singular vectors of X̂, k the least with ‖X̂ V‖² ≥ energy · ‖X̂‖²,
                  or the largest allowed

A change ΔW with ΔW V = 0 leaves the matrix as it was on such inputs, whatever it does on others:
the null space of old inputs as in continual learning (Wang et al. 2021, arXiv:2103.07113; Saha et
al. 2021, arXiv:2103.09762), with unlabelled prompts in place of old tasks.
"""

import warnings
from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from grasp.data import Reference
from grasp.model import Matrix, evaluating, unfused
from grasp_kernels.matrices import in_vectors

TOKENS = 8192  # of the reference are looked at, drawn at random, where it has more
FEW = 32  # tokens: an expert that fewer are routed to is looked at as if it got all
BUDGET = 2**32  # bytes of inputs held at a time; the forward passes are done again for the rest
LARGE = 2**30  # bytes of bases above which their size is told, before memory runs out


def input_bases(
    model: nn.Module,
    matrices: Sequence[Matrix],
    reference: Reference,
    energy: float,
    rank: int | None = None,
    bottom: bool = False,
) -> dict[str, Tensor]:
    """Bases `[d_in, k]`, fp32, by the names of the matrices; those with one input share one.

    Args:
        model: as it is before the fine-tune.
        matrices: of that model.
        reference: its prompts and continuations are the tokens looked at.
        energy: share of the inputs' energy that the bases hold, above 0 and below 1.
        rank: largest k; None sets no limit.
        bottom: as many directions, but those of the least energy: a control.
    """
    inputs = _Inputs(model, matrices, reference)
    bases: dict[str, Tensor] = {}
    taken = 0
    waiting = list(inputs.owners)
    while waiting:
        size = inputs.count * 4
        fits, used = [], 0
        while waiting and (not fits or used + size * inputs.width[waiting[0]] <= BUDGET):
            used += size * inputs.width[waiting[0]]
            fits.append(waiting.pop(0))
        for name, X in inputs.collect(fits).items():
            bases[name] = _leading(X, energy, rank, bottom)
            before, taken = taken, taken + bases[name].nbytes
            if before <= LARGE < taken:
                _tell(taken, len(bases), len(inputs.owners))
    _tell_few(inputs.few)
    return {m.name: bases[inputs.owner[m.name]] for m in matrices}


def _tell(taken: int, done: int, total: int) -> None:
    warnings.warn(
        f"the bases of inputs take {taken / 2**30:.1f} GiB for {done} of {total} distinct inputs "
        f"already, about {taken * total / done / 2**30:.1f} GiB in all; if that is too much give "
        "read_rank, the most directions of each, or a smaller read",
        stacklevel=2,
    )


def _tell_few(names: Sequence[str]) -> None:
    if names:
        warnings.warn(
            f"fewer than {FEW} tokens of the reference reach {len(names)} matrices of experts "
            f"({', '.join(names[:4])}{', …' if len(names) > 4 else ''}), so these are kept off "
            "what they would take in if all tokens reached them; give more prompts, or longer "
            "continuations (tokens)",
            stacklevel=2,
        )


def _leading(X: Tensor, energy: float, rank: int | None, bottom: bool = False) -> Tensor:
    """The leading right singular vectors `[d, k]` of `X [t, d]` that hold a share of its energy."""
    tall = bottom or X.shape[0] >= X.shape[1]  # no token has some of the bottom directions
    gram = (X.mT @ X if tall else X @ X.mT).double()
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    k = int((values.cumsum(0) < energy * values.sum()).sum()) + 1
    k = k if rank is None else min(k, rank)
    V = vectors[:, -k:] if bottom else vectors[:, :k]
    if not tall:
        V = torch.linalg.qr(X.mT.double() @ V).Q
    return in_vectors(V.float())


class _Inputs:
    """Inputs of matrices at sampled tokens of the reference, unit length."""

    def __init__(self, model: nn.Module, matrices: Sequence[Matrix], reference: Reference):
        self.model, self.matrices, self.reference = model, matrices, reference
        total = int(reference.mask.sum())
        self.count = min(total, TOKENS)
        order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
        self.sampled = torch.zeros(total, dtype=torch.bool)
        self.sampled[order[: self.count]] = True
        self.owner: dict[str, str] = {}
        """The first matrix that took in the same tensor."""
        self.width: dict[str, int] = {}
        self.few: list[str] = []
        """Experts that were looked at as if all tokens reached them."""
        self._last: tuple[Tensor, str] | None = None
        self._run({m.name: self._own(m.name) for m in matrices}, batches=1)
        self.owners = list(dict.fromkeys(self.owner.values()))

    def collect(self, names: Sequence[str]) -> dict[str, Tensor]:
        """`[tokens, d_in]` of each, fp32, on the model's device."""
        kept = self._kept(names, routed=True)
        experts = {m.name for m in self.matrices if m.index is not None}
        few = [name for name in names if name in experts and len(kept[name]) < FEW]
        self.few += few
        return kept | (self._kept(few, routed=False) if few else {})

    def _kept(self, names: Sequence[str], routed: bool) -> dict[str, Tensor]:
        kept: dict[str, list[Tensor]] = {name: [] for name in names}

        def keep(name: str):
            def hear(x: Tensor, tokens: Tensor | None) -> None:
                x = x.detach().reshape(-1, x.shape[-1])  # some flatten tokens, some see a few
                if tokens is not None:
                    x = x[self._chosen[tokens]]
                elif len(x) == len(self._chosen):
                    x = x[self._chosen]
                kept[name].append(nn.functional.normalize(x.float(), dim=1))

            return hear

        self._run({name: keep(name) for name in names}, routed=routed)
        return {name: torch.cat(rows) for name, rows in kept.items()}

    def _own(self, name: str):
        def hear(x: Tensor, tokens: Tensor | None) -> None:
            if self._last is None or x is not self._last[0]:
                self._last = x, name
            self.owner[name] = self._last[1]
            self.width[name] = x.shape[-1]

        return hear

    def _run(self, hooks: dict, batches: int | None = None, routed: bool = True) -> None:
        handles = [m.watch(hooks[m.name], routed) for m in self.matrices if m.name in hooks]
        device = next(self.model.parameters()).device
        seen = 0
        try:
            with evaluating(self.model), unfused(self.model), torch.no_grad():
                for ids, mask in islice(self.reference.batches(), batches):
                    size = int(mask.sum())
                    chosen = torch.zeros_like(mask, dtype=torch.bool)
                    chosen[mask.bool()] = self.sampled[seen : seen + size]
                    self._chosen = chosen.flatten().to(device)
                    seen += size
                    self.model(
                        input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False
                    )
        finally:
            for handle in handles:
                handle.remove()
            self._last = None
