"""What flows back through each block's output, kept off the block's subspace."""

import sys

from torch import Tensor
from torch.utils.hooks import RemovableHandle

import grasp_kernels as gk
from grasp.bases.subspaces import Subspaces
from grasp.model import Architecture


def hook_residual(found: Architecture, subspaces: Subspaces) -> list[RemovableHandle]:
    """Project gradients at the outputs of blocks with a basis, until the handles are removed."""
    _forget_compiled()
    handles = []
    for block in found.blocks:
        if block.index in subspaces:
            U = subspaces[block.index].to(next(block.module.parameters()).device)
            handles.append(block.module.register_forward_hook(_hook(U)))
    return handles


def _forget_compiled() -> None:
    """A graph that was compiled before does not call hooks that are new."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


def _hook(U: Tensor):
    def hook(module, args, output):
        if isinstance(output, tuple):
            return (gk.project_gradient(output[0], U.to(output[0].device)), *output[1:])
        return gk.project_gradient(output, U.to(output.device))

    return hook
