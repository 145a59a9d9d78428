"""The guard under DeepSpeed's ZeRO, which moves flat fp32 partitions in place of the weights.

The torch optimizer inside steps the partitions, one after the other: before it a partition's
`.grad` is projected, after it the partition itself, which DeepSpeed copies to the weights then.
DeepSpeed scales and clips gradients before that.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from grasp.guard.clock import Clock, timed
from grasp.guard.fragments import Fragment, Place
from grasp.guard.gradients import Gradients
from grasp.guard.guarded import Guarded
from grasp.guard.steps import Steps
from grasp.model import partitions, processes

FLATS = {  # where each of DeepSpeed's optimizers keeps its partitions, and its groups of weights
    "DeepSpeedZeroOptimizer": ("single_partition_of_fp32_groups", "bit16_groups"),
    "BF16_Optimizer": ("fp32_groups_flat_partition", "bf16_groups"),
    "DeepSpeedZeroOptimizer_Stage3": ("fp32_partitioned_groups_flat", "fp16_groups"),
}
PLAIN = "train with plain ZeRO-1, 2 or 3"


class Zero:
    """DeepSpeed's ZeRO optimizer, and what the torch optimizer inside it moves.

    Args:
        optimizer: of `engine.optimizer`'s kind.
    """

    def __init__(self, optimizer: Any):
        self.optimizer = optimizer
        self.flats_name, self.groups_name = FLATS[type(optimizer).__name__]
        self.splits = self.groups_name == "fp16_groups"
        """Whether weights are empty between passes, as of ZeRO-3."""
        self.processes = dist.get_world_size() if processes.several() else 1
        self.process = dist.get_rank() if processes.several() else 0
        self.moving: set[int] | None = None
        """The partitions that an optimizer is stepping; None between steps."""

    @property
    def flats(self) -> list[Tensor]:
        return getattr(self.optimizer, self.flats_name)

    @property
    def inside(self) -> Optimizer:
        """The torch optimizer that steps the partitions."""
        return self.optimizer.optimizer

    def moves(self, flat: int | None) -> bool:
        """Whether a partition may be written now: any between steps, then those that step."""
        return self.moving is None or flat in self.moving

    def begin(self, optimizer: Optimizer) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.moving = {i for i, flat in enumerate(self.flats) if id(flat) in held}

    def places(self, parameters: Sequence[Tensor]) -> list[list[Place] | None]:
        """Of each where the fragments of all processes lie; None of one that is frozen and whole.

        Every process must ask.
        """
        in_group = {
            id(p): i for i, ps in enumerate(getattr(self.optimizer, self.groups_name)) for p in ps
        }
        of_all = zip(*_gathered([self._place(p, in_group) for p in parameters]), strict=True)
        return [None if None in of_each else list(of_each) for of_each in of_all]

    def refuse_elsewhere(self, weights: Sequence[Fragment]) -> None:
        """Refuse weights of which something else is trained than their fragments.

        Raises:
            ValueError: names the first such weight of any process.
        """
        others = [w.trained.name for w in weights if not w.follows()]
        if others := sorted({name for names in _gathered(others) for name in names}):
            raise ValueError(
                f"{others[0]} is not what DeepSpeed says that it trains in its place, so it can't "
                "be held (round_robin_gradients does that): leave that out, and attach when "
                "DeepSpeed has loaded and copied all weights"
            )

    def total(self, T: Tensor) -> Tensor:
        """The sum over processes."""
        if self.processes == 1:
            return T
        accelerator = sys.modules["deepspeed"].accelerator.get_accelerator()
        total = T.to(accelerator.current_device_name(), copy=True).contiguous()
        dist.all_reduce(total)
        return total.to(T.device)

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the partitions to the weights, as DeepSpeed does after a step."""
        zero = self.optimizer
        if not self.splits:
            return zero.update_lp_params()
        zero._partition_all_parameters()
        for i in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(i)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def _place(self, parameter: Tensor, in_group: dict[int, int]) -> Place | None:
        """None of a weight that is frozen and whole."""
        if self.splits:
            n = parameter.ds_tensor.ds_numel
            start = n * dist.get_rank(parameter.ds_process_group)
            numel = max(0, min(n, parameter.ds_numel - start))
            if id(parameter) not in in_group:
                return Place(None, 0, start, numel)
            flat, offset, _ = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
            return Place(flat, offset, start, numel)
        if id(parameter) not in in_group:
            return None
        flat, mapping = in_group[id(parameter)], parameter._hp_mapping
        if mapping is None:
            return Place(flat, 0, 0, 0)
        master, own = mapping.hp_fragment_address, mapping.lp_fragment_address
        return Place(flat, master.start, own.start, own.numel)


def _gathered(mine: list) -> list[list]:
    """What each process gives."""
    if not processes.several():
        return [mine]
    found: list[list] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, mine)
    return found


class ZeroGradients(Gradients):
    """The gradients of partitions, which come when the optimizer is about to step them."""

    def __init__(self, guarded: Sequence[Guarded], model: nn.Module, clock: Clock):
        super().__init__(guarded, model, clock)
        self._sums: dict[int, Tensor] = {}  # of each what this process tells of, and not counted

    def hook(self) -> list:
        return []

    @timed
    def before_step(self) -> None:
        self.pending = [g for g in self.guarded if g.weight.gradient is not None]
        self.project()

    def count(self) -> None:
        """As of `Gradients`, added up over processes, which must all call it."""
        self._keep()
        none = torch.zeros(2, dtype=torch.float64)
        of_all = _gathered([self._sums.pop(id(g), none) for g in self.guarded])
        for g, of_each in zip(self.guarded, zip(*of_all, strict=True), strict=True):
            total, blocked = sum(of_each)
            if float(total) > 0:
                g.total = total if g.total is None else g.total + total
                g.blocked = blocked if g.blocked is None else g.blocked + blocked

    def forget(self) -> None:
        """As of `Gradients`, but no process waits for another: one may have failed."""
        self._keep()
        self._laid.clear()

    def _keep(self) -> None:
        for projections in self._laid.values():
            for projector, group in projections.projectors:
                for (g, _), sums in zip(group, projector.energies(), strict=True):
                    self._sums[id(g)] = self._sums.get(id(g), 0) + sums


class ZeroSteps(Steps):
    """The steps of a ZeRO optimizer, of which those of the torch optimizer inside make parts."""

    def __init__(self, zero: Zero):
        super().__init__()
        self.zero = zero
        self._parts = 0

    def moves(self, optimizer: Optimizer) -> bool:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return any(id(flat) in held for flat in self.zero.flats)

    def begin(self, optimizer: Optimizer) -> None:
        self.zero.begin(optimizer)

    def end(self, optimizer: Optimizer) -> bool:
        self.zero.moving = None
        self._parts += 1
        return False

    def after_all(self, call: Callable[[Optimizer], Any]) -> "Undo":
        """Call when DeepSpeed has stepped all partitions and the weights follow them."""
        optimizer = self.zero.optimizer
        step = optimizer.step

        @functools.wraps(step)
        def stepped(*args, **kwargs):
            self._parts, self.zero.moving = 0, None
            result = step(*args, **kwargs)
            if self._parts:  # none where the loss scale was too large
                call(self.zero.inside)
            return result

        optimizer.step = stepped
        return Undo(optimizer, stepped)


class Undo:
    """Gives a ZeRO optimizer its own step back."""

    def __init__(self, optimizer: Any, stepped: Callable):
        self.optimizer, self.stepped = optimizer, stepped

    def remove(self) -> None:
        if vars(self.optimizer).get("step") is self.stepped:
            del self.optimizer.step


def optimizer_of(model: nn.Module, optimizer: Any = None) -> Any:
    """The optimizer, or that of the engine that a model is in."""
    return model.optimizer if optimizer is None and partitions.engine(model) else optimizer


def find(model: nn.Module, optimizer: Any = None) -> Zero | None:
    """What trains a model, if that is DeepSpeed's ZeRO; else None.

    Args:
        model: or its engine.
        optimizer: or what accelerate makes of it.

    Raises:
        ValueError: what of DeepSpeed can't be guarded, by name; or the engine is not to be found.
    """
    if "deepspeed" not in sys.modules:
        return None
    if partitions.engine(model):
        _refuse_engine(model)
        optimizer = model.optimizer
        if isinstance(optimizer, Optimizer):
            return None  # stage 0: the weights themselves are stepped
    while type(optimizer).__module__.startswith("accelerate."):
        optimizer = optimizer.optimizer
    if not type(optimizer).__module__.startswith("deepspeed.runtime."):
        optimizer = None
    parameters = list(model.parameters())
    if optimizer is None:
        held_by = (getattr(p, "_z3_optimizer", None) for p in parameters)
        optimizer = next((o for o in held_by if o is not None), None)
    if optimizer is None and not any(map(partitions.partitioned, parameters)):
        return None
    if optimizer is None:
        raise ValueError(
            "the weights are DeepSpeed's, but not what trains them: give what deepspeed.initialize "
            "or accelerator.prepare returned, Guard(engine, ...), and after that call"
        )
    _refuse(optimizer)
    return Zero(optimizer)


def _refuse_engine(engine: Any) -> None:
    if type(engine).__name__ == "PipelineEngine":
        raise ValueError(f"DeepSpeed's pipeline engine runs a model in parts; {PLAIN}")
    if engine.is_deepcompile_enabled():
        raise ValueError(f"DeepCompile puts steps of its own into the graph; {PLAIN} without it")
    if engine.sequence_parallel_size > 1:
        raise ValueError(
            f"sequence parallelism gives processes parts of a text; {PLAIN} without it"
        )


def _refuse(zero: Any) -> None:
    name = type(zero).__name__
    if name not in FLATS:
        raise ValueError(
            f"DeepSpeed's {name} does not step flat fp32 partitions as ZeRO does (ZenFlow, "
            "SuperOffload, MiCS and 16-bit training at stage 0 are such); " + PLAIN
        )
    flats = getattr(zero, FLATS[name][0])
    if getattr(zero, "swap_optimizer", False) or getattr(zero, "params_in_nvme_and_cpu", False):
        raise ValueError(
            "DeepSpeed offloads to NVMe, and what is swapped out can't be held in place; offload "
            'to the CPU ("device": "cpu")'
        )
    if _plus(zero):
        raise ValueError(
            "ZeRO++ (zero_quantized_weights, zero_quantized_gradients, zero_hpz_partition_size) "
            "trains on other copies than those that are held; leave it out: " + PLAIN
        )
    if any(flat.dtype != torch.float32 for flat in flats):
        raise ValueError(
            "DeepSpeed keeps its master weights in 16 bits (bf16_master_weights_and_grads), whose "
            "rounding lets through what is blocked; keep them in fp32"
        )
    group = getattr(zero, "dp_process_group", None)
    if processes.several() and dist.get_world_size(group) != dist.get_world_size():
        raise ValueError(
            "DeepSpeed splits the model itself over processes (tensor, expert parallel); "
            + PLAIN
            + " over all processes"
        )


def _plus(zero: Any) -> bool:
    """Whether it is ZeRO++, of which ZeRO-3 alone has parts."""
    offload = getattr(zero, "parameter_offload", None)
    quantised = ("zero_quantized_weights", "zero_quantized_nontrainable_weights")
    return (
        any(getattr(offload, key, False) for key in quantised)
        or getattr(zero, "all2all_process_group", None) is not None
        or getattr(zero, "zero_hpz_partition_size", 1) > 1
    )
