"""A script as `accelerate launch` starts it, on a machine where accelerate finds no GPU.

    accelerate launch --config_file FILE -m tests.launched FOLDER SCRIPT OPTIONS...

It splits models over accelerators alone, so that processes which met by gloo are told that they
have some; all else is as the file says. What each has come to is left in the folder, by rank.
"""

import runpy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType

import grasp


class Seen(grasp.Guard):
    """Writes all weights, gathered, and what it kept them off, when it is left."""

    def __exit__(self, *error) -> None:
        model = self.model
        parts = {n: tuple(p.to_local().shape) for n, p in model.named_parameters()}
        weights = {n: p.detach().full_tensor() for n, p in model.named_parameters()}
        found = {"bases": dict(self.bases), "weights": weights, "parts": parts}
        super().__exit__(*error)
        torch.save(found, FOLDER / f"{dist.get_rank()}.pt")


if __name__ == "__main__":
    FOLDER = Path(sys.argv[1])
    sys.argv = sys.argv[2:]
    torch.set_num_threads(1)
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    grasp.Guard = Seen
    runpy.run_path(sys.argv[0], run_name="__main__")
