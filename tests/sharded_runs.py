"""Guarded runs of one tiny model, in one process or split over several, and what came of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_apply_ac, fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from grasp import Guard
from tests.models import PROMPTS, batch, build, subspaces, trainable, with_lora

GROWTH = {"reference": PROMPTS[:6], "tokens": 4, "read": 0.5, "rank": 2, "refresh": 2, "every": 1}
FEW = {**GROWTH, "free_rank": 6}
ROWS = 4  # of each global batch, shared among the processes


def lora(r: int = 4, family: str = "llama") -> nn.Module:
    return with_lora(build(family), r=r)


def adapter_that_goes_on() -> nn.Module:
    """Both of its factors are other than 0 when training begins."""
    model = lora()
    generator = torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.02, generator=generator)
    return model


def full_fine_tune(family: str = "llama") -> nn.Module:
    """Of what the blocks hold, but norms."""
    model = build(family)
    for name, p in model.named_parameters():
        p.requires_grad_((".layers." in name or ".h." in name) and "ln_" not in name)
        p.requires_grad_(p.requires_grad and "norm" not in name)
    return model


def sharded(model: nn.Module, **options) -> nn.Module:
    """As torch's documentation does it: each block, then the model."""
    for block in blocks(model):
        fully_shard(block, **options)
    return fully_shard(model, **options)


def blocks(model: nn.Module) -> nn.ModuleList:
    decoder = model.get_decoder()
    return decoder.h if hasattr(decoder, "h") else decoder.layers


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
    transposed: bool = False
    """Whether weights are `[d_in, d_out]`."""
    close: float | None = 1e-4
    """Largest distance from one process; None where that computes in another dtype."""


def run(case: Case, steps: int = 4, keep_at: int = 0, to=None, resume=None, guarded=True) -> dict:
    """The bases, and the trained weights as a whole before and after a guarded run.

    Args:
        keep_at: the step after which all is written `to` a folder, to be resumed.
    """
    model = case.model()
    case.prepare(model)
    if dist.is_initialized():
        model = case.split(model)
    optimizer = case.optimizer(trainable(model))
    before = full(model)
    if resume is not None:
        load(model, optimizer, resume)
    guard = Guard(model, optimizer=optimizer, **case.guard)
    if guarded:
        guard.attach(None if resume is None else resume / "guard.safetensors")
    norms = []
    for n in range(guard.steps, steps):
        norms.append(step(model, optimizer, case, n))
        if n + 1 == keep_at:
            save(model, optimizer, to)
            guard.save(to / "guard.safetensors")
            own = to / f"own-{dist.get_rank() if dist.is_initialized() else 0}"
            guard.save(own / "guard.safetensors", everyone=True)
    averages = {
        n: _full(optimizer.state[p]["ax"])
        for n, p in model.named_parameters()
        if "ax" in optimizer.state.get(p, {})
    }
    found = {
        "before": before,
        "after": full(model),
        "averages": averages,
        "bases": kept_off(guard),
        "norms": norms,
        "transposed": case.transposed,
        "modules": [n for n, _ in model.named_modules()],
        "certificate": guard.certificate() if guarded else None,
        "rows": [len(p.to_local()) for p in trainable(model) if hasattr(p, "to_local")],
    }
    guard.detach()
    return found


def step(model: nn.Module, optimizer, case: Case, n: int) -> float:
    """One step over a global batch of its own; the norm that clipping saw."""
    for part in range(case.accumulate):
        if hasattr(model, "set_requires_gradient_sync"):
            model.set_requires_gradient_sync(part == case.accumulate - 1)
        rows = batch(rows=ROWS, seed=n * case.accumulate + part)
        loss = model(**{k: own(v) for k, v in rows.items()}).loss / case.accumulate
        loss.backward()
    norm = torch.zeros(())
    if case.clip is not None:
        norm = _full(nn.utils.clip_grad_norm_(trainable(model), case.clip))
    optimizer.step()
    optimizer.zero_grad()
    return float(norm)


def save(model: nn.Module, optimizer, folder) -> None:
    """By torch's distributed checkpoints."""
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / "checkpoint")


def load(model: nn.Module, optimizer, folder) -> None:
    weights, state = get_state_dict(model, optimizer)
    kept = {"model": weights, "optimizer": state}
    dcp.load(kept, checkpoint_id=folder / "checkpoint")
    options = {"model_state_dict": kept["model"], "optim_state_dict": kept["optimizer"]}
    set_state_dict(model, optimizer, **options)


def own(rows: Tensor) -> Tensor:
    """This process's rows of a global batch."""
    if not dist.is_initialized():
        return rows
    each = len(rows) // dist.get_world_size()
    return rows[dist.get_rank() * each :][:each]


def full(model: nn.Module) -> dict[str, Tensor]:
    """What trains, gathered, by the names of a model that nothing wraps."""
    return {
        n.replace("_checkpoint_wrapped_module.", ""): _full(p).clone()
        for n, p in model.named_parameters()
        if p.requires_grad
    }


def _full(T: Tensor) -> Tensor:
    T = T.detach()
    return T.full_tensor() if hasattr(T, "full_tensor") else T


def kept_off(guard: Guard) -> dict[str, Tensor]:
    """All that is blocked; where the rest of it is what is kept, made of that in fp64."""
    rest = {g.name: g.basis.double() for g in guard.guarded if g.inside}
    whole = {name: torch.linalg.qr(W, mode="complete").Q for name, W in rest.items()}
    return guard.bases | {name: Q[:, rest[name].shape[1] :] for name, Q in whole.items()}


def through(found: dict) -> tuple[float, float]:
    """The most of any ΔW that lies in a basis of outputs, and of inputs, in fp64."""
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
            D = D[:, None] if D.ndim == 1 else D.mT if found["transposed"] else D
        Q = basis.double()
        inside = D @ Q if inputs else Q.mT @ D
        side = "inputs" if inputs else "outputs"
        most[side] = max(most[side], float(inside.norm() / D.norm()))
    return most["outputs"], most["inputs"]


def distance(one: dict, other: dict) -> float:
    """Of the weights after two runs, as a share of the change that the first made."""
    moved = sum(float((one["after"][n] - W).square().sum()) for n, W in one["before"].items())
    apart = sum(float((one["after"][n] - W).square().sum()) for n, W in other["after"].items())
    return (apart / moved) ** 0.5


def wrapped(model: nn.Module) -> None:
    """By torch's own checkpointing of activations."""
    kinds = {type(block) for block in blocks(model)}
    apply_activation_checkpointing(model, check_fn=lambda m: type(m) in kinds)


def recomputed(model: nn.Module, reentrant: bool) -> None:
    """As Trainer's `gradient_checkpointing` does it."""
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})


def plugin(mixed: str | None = None, **options) -> Accelerator:
    """An accelerator set up for FSDP2, which it would not be on a CPU by itself."""
    accelerator = Accelerator(cpu=True)
    chosen = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", **options
    )
    if mixed is not None:
        chosen.set_mixed_precision(mixed)
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = chosen
    return accelerator


def by_accelerate(model: nn.Module, **options) -> nn.Module:
    """As Trainer has it done."""
    accelerator = plugin(**options)
    accelerator.state.fsdp_plugin.set_auto_wrap_policy(model)
    if accelerator.state.fsdp_plugin.activation_checkpointing:
        model = fsdp2_apply_ac(accelerator, model)
    return fsdp2_prepare_model(accelerator, model)


def from_meta(model: nn.Module) -> nn.Module:
    """The weights reach each process after the split of a model without any."""
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
    "adamw": Case(),
    "sgd": Case(optimizer=partial(torch.optim.SGD, lr=0.3)),
    "the root alone": Case(
        split=fully_shard, optimizer=partial(torch.optim.AdamW, lr=1e-2, foreach=True)
    ),
    "not resharded": Case(
        split=partial(sharded, reshard_after_forward=False),
        optimizer=partial(torch.optim.Adam, lr=1e-2, fused=True),
    ),
    "accumulated and clipped": Case(accumulate=2, clip=0.05),
    "three rows": Case(model=partial(lora, r=3), optimizer=partial(torch.optim.ASGD, lr=0.3, t0=1)),
    "a part without rows": Case(model=partial(lora, r=1)),
    "by columns": Case(split=partial(sharded, shard_placement_fn=lambda p: Shard(p.ndim - 1))),
    "offloaded": Case(split=partial(sharded, offload_policy=CPUOffloadPolicy(pin_memory=False))),
    "bf16": Case(
        split=partial(sharded, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)),
        close=None,
    ),
    "wrapped": Case(prepare=wrapped),
    "reentrant": Case(prepare=partial(recomputed, reentrant=True)),
    "not reentrant": Case(prepare=partial(recomputed, reentrant=False)),
    "meta": Case(split=from_meta),
    "accelerate": Case(split=by_accelerate),
    "accelerate, bf16, wrapped": Case(
        split=partial(by_accelerate, mixed="bf16", activation_checkpointing=True), close=None
    ),
    "norms after writers": Case(
        model=partial(lora, family="olmo2"), guard={"subspaces": subspaces(), "residual": True}
    ),
    "few free": Case(guard=FEW),
    "few free, by columns": Case(
        guard=FEW, split=partial(sharded, shard_placement_fn=lambda p: Shard(p.ndim - 1))
    ),
    "few free, averaged": Case(
        guard=FEW, model=partial(lora, r=3), optimizer=partial(torch.optim.ASGD, lr=0.3, t0=1)
    ),
    # Rounding of what it starts from is set against how far it goes.
    "an adapter goes on": Case(
        model=adapter_that_goes_on, optimizer=partial(torch.optim.AdamW, lr=3e-2)
    ),
    "full": Case(model=full_fine_tune),
    "full, biases, transposed": Case(
        model=partial(full_fine_tune, family="gpt2"),
        # A key's bias has no gradient, of which Adam would make a step of full length.
        optimizer=partial(torch.optim.SGD, lr=3.0),
        guard={"subspaces": subspaces(), **GROWTH},
        transposed=True,
    ),
}
HYBRID = {
    "hybrid": Case(split=hybrid),
    "hybrid, full": Case(model=full_fine_tune, split=hybrid),
}
