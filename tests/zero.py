"""Runs under DeepSpeed on a CPU, and what is measured of them apart from the guard."""

import contextlib
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grasp import Guard
from tests.models import PROMPTS, batch, build, subspaces, trainable, with_lora

STEPS = 5
GROWTH = {"reference": PROMPTS, "tokens": 4, "read": 0.5, "rank": 2, "refresh": 2, "grow": 1}
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
    groups: int = 1
    accumulate: int = 1
    steps: int = STEPS
    rate: float = 1e-2

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
        options = GROWTH if self.by != "subspaces" else {}
        return Guard(model, found, optimizer=optimizer, **options)


def quietly() -> Any:
    """DeepSpeed, which several processes have met by."""
    import logging

    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
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


def measured(
    bases: dict[str, Tensor],
    start: dict[str, Tensor],
    now: dict[str, Tensor],
    transposed: bool = False,
) -> tuple[float, float]:
    """The largest ‖UᵀΔW‖ / ‖ΔW‖ and ‖ΔW V‖ / ‖ΔW‖ in fp64, by weights of the same names.

    Args:
        transposed: whether whole weights are `[d_in, d_out]`, as GPT-2's.
    """
    start, now = ({k: v.double() for k, v in these.items()} for these in (start, now))
    U, V = [0.0], [0.0]
    for name, basis in bases.items():
        inputs = ".lora_A." in name or name.endswith(" (inputs)")
        name = name.removesuffix(" (inputs)")
        if ".lora_" in name:
            stem = name.split(".lora_")[0]
            A, B = (f"{stem}.lora_{f}.default.weight" for f in "AB")
            D = now[B] @ now[A] - start[B] @ start[A]
        else:
            D = now[name] - start[name]
            D = D[:, None] if D.ndim == 1 else D.mT if transposed else D
        basis = basis.double()
        if inputs:
            V.append(float((D @ basis).norm() / D.norm()))
        else:
            U.append(float((basis.mT @ D).norm() / D.norm()))
    return max(U), max(V)


def train(run: Run, guarded: bool = True) -> dict:
    """With DeepSpeed, by each of its processes."""
    deepspeed = quietly()
    model = run.model()
    optimizer = run.optimizer(model)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=run.config())
    begun, rows = wholes(model), ROWS // dist.get_world_size() // run.accumulate
    guard = run.guard(engine) if guarded else contextlib.nullcontext()
    found: dict[str, Any] = {}
    with guard:
        spent = []
        for step in range(run.steps):
            whole = batch(rows=ROWS, seed=step)
            at = time.perf_counter()
            for part in range(run.accumulate):
                first = (part * dist.get_world_size() + dist.get_rank()) * rows
                loss = engine(**{k: v[first : first + rows] for k, v in whole.items()}).loss
                engine.backward(loss)
                engine.step()
            spent.append(time.perf_counter() - at)
        found["seconds"] = sorted(spent)[len(spent) // 2]
        if guarded:
            found["certificate"] = guard.certificate()
            found["bases"] = {n: b.cpu() for n, b in guard.bases.items()}
    found["start"], found["weights"] = begun, wholes(model)
    found["saved"] = wholes(model, masters=False)
    assert "step" not in vars(engine.optimizer) or run.stage == 0
    engine.destroy()
    return found


def alone(run: Run, guarded: bool = True) -> dict[str, Tensor]:
    """The weights after the same batches in one process without DeepSpeed."""
    model = run.model()
    optimizer = run.optimizer(model)
    clip = run.about.get("gradient_clipping", 0.0)
    with run.guard(model, optimizer) if guarded else contextlib.nullcontext():
        for step in range(run.steps):
            model(**batch(rows=ROWS, seed=step)).loss.backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(trainable(model), clip)
            optimizer.step()
            optimizer.zero_grad()
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def distance(found: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest ‖W − W'‖ / ‖W'‖."""
    return max(float((found[n] - w).norm() / w.norm().clamp_min(1e-9)) for n, w in other.items())
