"""Guarded runs of one tiny model, in one process or split over several, and what came of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

from grasp import Guard
from tests.models import PROMPTS, batch, build, subspaces, trainable, with_lora

GROWTH = {"reference": PROMPTS, "tokens": 4, "read": 0.5, "rank": 2, "refresh": 2, "every": 1}
ROWS = 4  # of each global batch, shared among the processes


def lora(r: int = 4, **options) -> nn.Module:
    return with_lora(build(), r=r, **options)


def whole_weights() -> nn.Module:
    """A full fine-tune of the maps in blocks."""
    model = build()
    for name, p in model.named_parameters():
        p.requires_grad_("layers" in name and p.ndim > 1)
    return model


def sharded(model: nn.Module, **options) -> nn.Module:
    """As torch's documentation does it: each block, then the model."""
    for block in blocks(model):
        fully_shard(block, **options)
    return fully_shard(model, **options)


def blocks(model: nn.Module) -> nn.ModuleList:
    return model.get_decoder().layers


@dataclass
class Case:
    """How a run is set up; `split` does nothing in one process."""

    model: Callable[[], nn.Module] = lora
    split: Callable[[nn.Module], nn.Module] = sharded
    optimizer: Callable = partial(torch.optim.AdamW, lr=1e-2)
    guard: dict = field(default_factory=lambda: GROWTH)
    prepare: Callable[[nn.Module], object] = lambda model: None
    """Done to the model in one process too."""
    accumulate: int = 1
    clip: float | None = None
    close: float = 1e-4
    """Largest distance from one process, of the change that training made."""


def run(case: Case, folder=None, steps: int = 6) -> dict:
    """The bases, and the trained weights as a whole before and after a guarded run."""
    model = case.model()
    case.prepare(model)
    if dist.is_initialized():
        model = case.split(model)
    optimizer = case.optimizer(trainable(model))
    before = full(model)
    with Guard(model, optimizer=optimizer, **case.guard) as guard:
        certain = [step(model, optimizer, guard, case, n) for n in range(steps)]
        certificate = guard.certificate()
    return {
        "before": before,
        "after": full(model),
        "bases": guard.bases,
        "norms": certain,
        "certificate": certificate,
        "local": {n: tuple(p.to_local().shape) for n, p in model.named_parameters()}
        if dist.is_initialized()
        else {},
    }


def step(model, optimizer, guard, case: Case, n: int) -> float:
    """One step over a global batch of its own; the norm that clipping saw."""
    for part in range(case.accumulate):
        if hasattr(model, "set_requires_gradient_sync"):
            model.set_requires_gradient_sync(part == case.accumulate - 1)
        rows = batch(rows=ROWS, seed=n * case.accumulate + part)
        loss = model(**{k: own(v) for k, v in rows.items()}).loss / case.accumulate
        loss.backward()
    norm = 0.0
    if case.clip is not None:
        norm = nn.utils.clip_grad_norm_(trainable(model), case.clip)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    optimizer.step()
    optimizer.zero_grad()
    return norm


def own(rows: Tensor) -> Tensor:
    """This process's rows of a global batch."""
    if not dist.is_initialized():
        return rows
    each = len(rows) // dist.get_world_size()
    return rows[dist.get_rank() * each :][:each]


def full(model: nn.Module) -> dict[str, Tensor]:
    """What trains, gathered, by the names of a model that nothing wraps."""
    return {
        n.replace("_checkpoint_wrapped_module.", ""): (
            p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach()
        ).clone()
        for n, p in model.named_parameters()
        if p.requires_grad
    }


def through(found: dict) -> tuple[float, float]:
    """The most of any ΔW that lies in a basis of outputs, and of inputs: fp64, from whole tensors."""
    before, after = (
        {n.removesuffix(".weight"): W.double() for n, W in found[key].items()}
        for key in ("before", "after")
    )
    most = {"outputs": 0.0, "inputs": 0.0}
    for name, basis in found["bases"].items():
        inputs = ".lora_A." in name or name.endswith("(inputs)")
        name = name.removesuffix(" (inputs)").removesuffix(".weight")
        if ".lora_" in name:
            B, A = name.replace(".lora_A.", ".lora_B."), name.replace(".lora_B.", ".lora_A.")
            D = after[B] @ after[A] - before[B] @ before[A]
        else:
            D = after[name] - before[name]
        Q = basis.double()
        inside = D @ Q if inputs else Q.mT @ D
        side = "inputs" if inputs else "outputs"
        most[side] = max(most[side], float(inside.norm() / D.norm()))
    return most["outputs"], most["inputs"]


def distance(one: dict, other: dict) -> float:
    """Of the weights after two runs, as a share of the change that the first made."""
    moved = sum(float((one["after"][n] - W).square().sum()) for n, W in one["before"].items())
    apart = sum(
        float((one["after"][n] - W).square().sum()) for n, W in other["after"].items()
    )
    return (apart / moved) ** 0.5


def checkpointed(model: nn.Module) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        apply_activation_checkpointing,
    )

    kinds = {type(b) for b in blocks(model)}
    apply_activation_checkpointing(model, check_fn=lambda m: type(m) in kinds)


def recomputed(model: nn.Module, reentrant: bool) -> None:
    """As Trainer's `gradient_checkpointing` does it."""
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})


def by_accelerate(model: nn.Module, **options) -> nn.Module:
    """As Trainer has it done; on a CPU it would choose DDP, so its function is called by itself."""
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    accelerator = Accelerator(cpu=True)
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", **options
    )
    return fsdp2_prepare_model(accelerator, model)


def from_meta(model: nn.Module) -> nn.Module:
    """The weights reach each process after the split of a model without any."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    state = model.state_dict()
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    model = sharded(model.to("meta"))
    model.to_empty(device="cpu")
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return model


def hybrid(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    return sharded(model, mesh=mesh)


CASES = {
    "sgd": Case(optimizer=partial(torch.optim.SGD, lr=0.3)),
    "adamw": Case(),
    "foreach": Case(optimizer=partial(torch.optim.AdamW, lr=1e-2, foreach=True)),
    "fused": Case(optimizer=partial(torch.optim.Adam, lr=1e-2, fused=True)),
    "root alone": Case(split=fully_shard),
    "no reshard": Case(split=partial(sharded, reshard_after_forward=False)),
    "accumulated and clipped": Case(accumulate=2, clip=0.05),
    "three rows": Case(model=partial(lora, r=3)),
    "a part without rows": Case(model=partial(lora, r=1)),
    "offload": Case(split=partial(sharded, offload_policy=CPUOffloadPolicy(pin_memory=False))),
    "bf16": Case(
        split=partial(sharded, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)),
        close=1.0,
    ),
    "checkpointed": Case(prepare=checkpointed),
    "reentrant": Case(prepare=partial(recomputed, reentrant=True)),
    "not reentrant": Case(prepare=partial(recomputed, reentrant=False)),
    "meta": Case(split=from_meta),
    "accelerate": Case(split=by_accelerate),
    "accelerate, bf16": Case(split=by_accelerate),
    "subspaces": Case(guard={"subspaces": subspaces()}),
    "subspaces, residual": Case(guard={"subspaces": subspaces(), "residual": True}),
    "full": Case(model=whole_weights),
    "full, subspaces": Case(model=whole_weights, guard={"subspaces": subspaces(), **GROWTH}),
}
HYBRID = {"hybrid": Case(split=hybrid), "hybrid, full": Case(model=whole_weights, split=hybrid)}
