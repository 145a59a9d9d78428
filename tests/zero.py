"""Guarded runs under DeepSpeed on a CPU, or in one process without it, and what came of them."""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grasp import Guard
from tests.models import PROMPTS, batch, build, subspaces, trainable, with_lora
from tests.sharded_runs import kept_off

STEPS, KEPT = 5, 3
GROWTH = {"reference": PROMPTS[:6], "tokens": 4, "read": 0.5, "rank": 2, "refresh": 2, "grow": 1}
ROWS = 4  # of a batch, over all processes and micro-batches
SPLIT = {"stage3_param_persistence_threshold": 0}  # ZeRO-3 keeps small weights whole


@dataclass(frozen=True)
class Run:
    """A fine-tune: what trains, how DeepSpeed trains it, and what guards it."""

    stage: int
    zero: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    full: bool = False
    family: str = "llama"
    by: str = "reference"  # or subspaces, or both
    goes_on: bool = False  # from a LoRA that has learned something
    free: int | None = None
    groups: int = 1
    accumulate: int = 1
    steps: int = STEPS
    rate: float = 1e-2

    @property
    def transposed(self) -> bool:
        """Whether weights are `[d_in, d_out]`."""
        return self.family == "gpt2"

    def config(self) -> dict:
        return {
            "train_micro_batch_size_per_gpu": ROWS // 2 // self.accumulate,
            "gradient_accumulation_steps": self.accumulate,
            "zero_optimization": {"stage": self.stage, **self.zero},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": 0.0,  # which is 1 otherwise
            **self.about,
        }

    def model(self) -> torch.nn.Module:
        if self.full:
            return build(self.family)
        model = with_lora(build(self.family))
        if self.goes_on:
            torch.manual_seed(1)
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if "lora_B" in name:
                        p.normal_(std=0.05)
        return model

    def optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        ps = trainable(model)
        groups = [{"params": ps[i :: self.groups]} for i in range(self.groups)]
        return torch.optim.AdamW(groups, lr=self.rate, weight_decay=0.0)

    def guard(self, model, optimizer=None) -> Guard:
        found = subspaces() if self.by != "reference" else None
        options = GROWTH | {"free_rank": self.free} if self.by != "subspaces" else {}
        return Guard(model, found, optimizer=optimizer, **options)


def quietly() -> Any:
    """DeepSpeed, which several processes have met by."""
    import logging

    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__ = {}  # else it compiles sums of its own when processes meet
    if not dist.is_initialized():
        deepspeed.init_distributed("gloo", verbose=False)
    return deepspeed


def wholes(model: torch.nn.Module, masters: bool = True) -> dict[str, Tensor]:
    """Every trained weight, gathered by DeepSpeed's own means; every process must call it."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    found = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        whole = safe_get_full_fp32_param(p) if masters else None
        if whole is None:
            with deepspeed.zero.GatheredParameters([p]):
                whole = p.detach()
                whole = whole.clone()
        found[name] = whole.detach().clone()
    return found


def train(
    run: Run, guarded: bool = True, keep: Path | None = None, resume: Path | None = None
) -> dict[str, Any]:
    """With DeepSpeed, by each of its processes.

    Args:
        keep: where all is written after `KEPT` steps, but the file of inputs' bases.
        resume: where that was written, to go on from.

    Returns:
        As `sharded_runs.run`, of weights as they are saved; and the same of the fp32 `masters`.
    """
    deepspeed = quietly()
    model = run.model()
    optimizer = run.optimizer(model)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=run.config())
    before, masters = wholes(model, masters=False), {"before": wholes(model)}
    guard = run.guard(engine)
    if resume is not None:
        engine.load_checkpoint(str(resume), tag="kept")
    if guarded:
        guard.attach(None if resume is None else resume / "guard.safetensors")
    for step in range(guard.steps, run.steps):
        if keep is not None and step == KEPT:
            _keep(engine, guard, keep)
        for part in range(run.accumulate):
            loss = engine(**own(batch(rows=ROWS, seed=step), part, run.accumulate)).loss
            engine.backward(loss)
            engine.step()
    found: dict[str, Any] = {"before": before, "transposed": run.transposed}
    if guarded:
        found["certificate"] = guard.certificate()
        found["bases"] = {n: b.cpu() for n, b in kept_off(guard).items()}
        guard.detach()
    found["after"] = wholes(model, masters=False)
    found["masters"] = masters | {"after": wholes(model)}
    assert "step" not in vars(engine.optimizer) or run.stage == 0
    engine.destroy()
    return found


def _keep(engine: Any, guard: Guard, folder: Path) -> None:
    engine.save_checkpoint(str(folder), tag="kept")
    guard.save(folder / "guard.safetensors")
    if dist.get_rank() == 0:
        (folder / "guard_inputs.safetensors").unlink()
    dist.barrier()


def own(rows: dict[str, Tensor], part: int = 0, parts: int = 1) -> dict[str, Tensor]:
    """This process's rows of a part of a global batch."""
    count = ROWS // dist.get_world_size() // parts
    first = (part * dist.get_world_size() + dist.get_rank()) * count
    return {key: value[first : first + count] for key, value in rows.items()}


def alone(run: Run, guarded: bool = True) -> dict[str, Any]:
    """The same batches in one process without DeepSpeed."""
    model = run.model()
    optimizer = run.optimizer(model)
    found: dict[str, Any] = {"before": trained(model)}
    clip = run.about.get("gradient_clipping", 0.0)
    guard = run.guard(model, optimizer)
    with guard if guarded else contextlib.nullcontext():
        for step in range(run.steps):
            model(**batch(rows=ROWS, seed=step)).loss.backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(trainable(model), clip)
            optimizer.step()
            optimizer.zero_grad()
        found["leak"] = guard.leak() if guarded else {}
    return found | {"after": trained(model)}


def trained(model: torch.nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
