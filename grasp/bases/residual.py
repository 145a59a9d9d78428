"""A block's subspace as each of its matrices must hold it, in that matrix's own outputs.

writer                U, or orth(γ ⊙ U) where a norm of weight γ stands before the residual stream
value                 orth of Wₒᵀ U gathered to the value's outputs, heads together; under grouped
                      queries once for each query head of a group
gate, up (hidden)     the k leading directions of Jₜᵀ W_downᵀ U over sample tokens t, with J the
                      derivative of the writer's input by this matrix's outputs
"""

import torch
from torch import Tensor, nn

import grasp_kernels as gk
from grasp.bases.subspaces import Subspaces
from grasp.model import Architecture, Block, Matrix, evaluating, partitions


def matrix_bases(
    architecture: Architecture,
    subspaces: Subspaces,
    *,
    indirect: bool = True,
    samples: Tensor | None = None,
) -> dict[str, Tensor]:
    """Bases `[d_out, k]` by the name of each matrix through which a block can write.

    Args:
        architecture: of the model to guard.
        subspaces: in the residual stream.
        indirect: value and hidden matrices too, not the writers alone.
        samples: token ids `[batch, tokens]` on which hidden matrices are linearised; default
            random tokens.
    """
    bases: dict[str, Tensor] = {}
    for block in architecture.blocks:
        if block.index not in subspaces:
            continue
        for writer in block.of_role("writer"):
            bases[writer.name] = _writer_basis(writer, subspaces[block.index])
        if indirect:
            for value in block.of_role("value"):
                bases[value.name] = _value_basis(value, bases[value.writer.name])
    if indirect:
        hidden = [
            (block, m)
            for block in architecture.blocks
            if block.index in subspaces
            for m in block.of_role("hidden")
        ]
        bases |= _hidden_bases(architecture.model, hidden, bases, samples)
    return bases


def _orthonormal(W: Tensor) -> Tensor:
    W = W.float().contiguous().clone()
    (rank,) = gk.orthonormalize_(W)
    return W[:, : int(rank)].contiguous()


def _writer_basis(writer: Matrix, U: Tensor) -> Tensor:
    return U if writer.scale is None else _orthonormal(writer.scale.cpu()[:, None] * U)


def _value_basis(value: Matrix, U: Tensor) -> Tensor:
    """Columns for each query head that reads the same value head, so that none is a way round."""
    reach = value.writer.back(U).cpu()  # [d_in of writer, k]
    select = value.select.cpu()
    nth = torch.zeros_like(select)  # which of the copies of its output each input of the writer is
    seen: dict[int, int] = {}
    for i, source in enumerate(select.tolist()):
        nth[i] = seen.get(source, 0)
        seen[source] = seen.get(source, 0) + 1
    columns = []
    for copy in range(int(nth.max()) + 1):
        gathered = torch.zeros(value.out_features, U.shape[1])
        gathered[select[nth == copy]] = reach[nth == copy]
        columns.append(gathered)
    return _orthonormal(torch.cat(columns, 1)[:, : value.out_features])


def _hidden_bases(
    model: nn.Module,
    hidden: list[tuple[Block, Matrix]],
    bases: dict[str, Tensor],
    samples: Tensor | None,
) -> dict[str, Tensor]:
    if not hidden:
        return {}
    outputs: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}

    def keep_output(name):
        def hook(module, args, output):
            # A leaf of its own: the derivative reaches from here to the writer's input, no further.
            outputs[name] = output.detach().requires_grad_()
            return outputs[name]

        return hook

    def keep_input(name):
        def hook(module, args):
            inputs[name] = args[0]

        return hook

    writers = {m.writer.name: m.writer for _, m in hidden}
    hooks = [m.module.register_forward_hook(keep_output(m.name)) for _, m in hidden]
    hooks += [  # first: what an engine's own hooks make of an input ends in that engine
        w.module.register_forward_pre_hook(keep_input(n), prepend=True) for n, w in writers.items()
    ]
    device = next(model.parameters()).device
    if samples is None:
        generator = torch.Generator().manual_seed(0)
        size = partitions.shape(model.get_input_embeddings().weight)[0]
        samples = torch.randint(size, (8, 16), generator=generator)
    try:
        with evaluating(model), torch.enable_grad():
            model(input_ids=samples.to(device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()

    found: dict[str, Tensor] = {}
    for _, m in hidden:
        U = bases[m.writer.name]
        reach = m.writer.back(U)  # [d_in of writer, k]
        x = inputs[m.writer.name]
        rows = [
            torch.autograd.grad(x, outputs[m.name], r.to(x).expand_as(x), retain_graph=True)[0]
            for r in reach.mT
        ]
        rows = torch.stack(rows).float().reshape(-1, m.out_features)  # [k · tokens, d_out]
        _, S, Vh = torch.linalg.svd(rows, full_matrices=False)
        keep = min(U.shape[1], int((S > S[0] * 1e-6).sum()))
        found[m.name] = _orthonormal(Vh[:keep].mT.cpu())
    return found
