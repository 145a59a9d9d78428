"""The engines that `bench_engines.py` compares, by name; another is a line in `ENGINES`.

An engine is what makes a `Run` of a model: something that takes guarded steps, gives its weights as
a whole, and is written down and taken up again.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # which DeepSpeed reads when it is imported
import deepspeed
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

RATE = 1e-2
Rows = dict[str, Tensor]


def _kept(name: str, p: nn.Parameter) -> bool:
    """Of what is compared: what trains, and a LoRA's A that is frozen."""
    return p.requires_grad or "lora_" in name


class Run:
    """AdamW on a model as `wrap` makes it, by torch's own checkpoints."""

    def __init__(self, model: nn.Module, wrap: Callable[[nn.Module], nn.Module]):
        self.model = wrap(model)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)

    def step(self, rows: Rows) -> None:
        """One step on this process's rows of a global batch."""
        self.model(**rows).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def whole(self) -> dict[str, Tensor]:
        """Trained weights and frozen A by the names of a bare model; all processes must ask."""
        return {
            n.replace("_checkpoint_wrapped_module.", "").removeprefix("module."): (
                p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach()
            ).clone()
            for n, p in self.model.named_parameters()
            if _kept(n, p)
        }

    def save(self, folder: Path) -> None:
        weights, state = get_state_dict(self.model, self.optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        weights, state = get_state_dict(self.model, self.optimizer)
        kept = {"model": weights, "optimizer": state}
        dcp.load(kept, checkpoint_id=folder)
        given = {"model_state_dict": kept["model"], "optim_state_dict": kept["optimizer"]}
        set_state_dict(self.model, self.optimizer, **given)


class ZeroRun(Run):
    """The same by DeepSpeed, and by its checkpoints; weights are those that it saves."""

    def __init__(self, model: nn.Module, config: dict[str, Any]):
        parameters = [p for p in model.parameters() if p.requires_grad]
        inside = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
        self.model, self.optimizer, *_ = deepspeed.initialize(
            model=model, optimizer=inside, config=config
        )

    def step(self, rows: Rows) -> None:
        self.model.backward(self.model(**rows).loss)
        self.model.step()

    def whole(self) -> dict[str, Tensor]:
        trained = {n: p for n, p in self.model.module.named_parameters() if _kept(n, p)}
        with deepspeed.zero.GatheredParameters(list(trained.values())):
            return {n: p.detach().clone() for n, p in trained.items()}

    def save(self, folder: Path) -> None:
        self.model.save_checkpoint(str(folder), tag="run")

    def load(self, folder: Path) -> None:
        self.model.load_checkpoint(str(folder), tag="run")


class Engine(NamedTuple):
    start: Callable[[nn.Module], Run]
    processes: int = 2
    only: str | None = None
    """The weights that it can train, where that is not all."""


def split(model: nn.Module, checkpointed: bool = False, mesh=None, **options) -> nn.Module:
    """Each block, then the model, as torch's documentation of `fully_shard` does it."""
    blocks = model.get_decoder().layers
    if mesh is not None:
        names = ("replicas", "shards")
        options["mesh"] = init_device_mesh("cpu", mesh, mesh_dim_names=names)
    if checkpointed:
        kind = type(blocks[0])
        apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, kind))
    for block in model.get_decoder().layers:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def fsdp2(processes: int = 2, **options) -> Engine:
    return Engine(partial(Run, wrap=partial(split, **options)), processes)


def zero(stage: int, *, only: str | None = None, about: dict | None = None, **options) -> Engine:
    config = {
        "train_micro_batch_size_per_gpu": 1,  # which it only writes down
        "zero_optimization": {"stage": stage, **options},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
        **(about or {}),
    }
    return Engine(partial(ZeroRun, config=config), only=only)


OFFLOADED = {"offload_optimizer": {"device": "cpu"}}
SPLIT = {"stage3_param_persistence_threshold": 0}  # else small weights stay whole
ONE = Engine(partial(Run, wrap=lambda model: model), 1)
ENGINES = {
    "DDP": Engine(partial(Run, wrap=DistributedDataParallel)),
    "FSDP2": fsdp2(),
    "FSDP2, not resharded": fsdp2(reshard_after_forward=False),
    "FSDP2, offloaded": fsdp2(offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "FSDP2, bf16": fsdp2(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)),
    "FSDP2, checkpointed": fsdp2(checkpointed=True),
    "FSDP2, 2 × 2": fsdp2(processes=4, mesh=(2, 2)),
    "ZeRO-1": zero(1),
    "ZeRO-2": zero(2),
    "ZeRO-2, offloaded": zero(2, **OFFLOADED),
    "ZeRO-2, bf16": zero(2, about={"bf16": {"enabled": True}}, only="LoRA"),
    "ZeRO-3": zero(3, **SPLIT),
    "ZeRO-3, offloaded": zero(3, **SPLIT, **OFFLOADED),
}


def own(rows: Rows) -> Rows:
    """This process's part of a global batch."""
    if not dist.is_initialized():
        return rows
    count, at = dist.get_world_size(), dist.get_rank()
    return {key: value.chunk(count)[at] for key, value in rows.items()}
