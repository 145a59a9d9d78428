"""Experts of a mixture that share one 3-D weight, and of a LoRA on it each its own part.

PEFT (`target_parameters`) keeps the factors of all `E` experts in one A and one B:

    A [E r, d_in]       of expert e the rows e r, …, e r + r − 1
    B [d_out, r E]      of expert e the columns e, e + E, e + 2 E, …

Expert e adds s Bₑ Aₑ to its weight, so each is kept off bases of its own. What it takes in is what
transformers routes to it (`use_experts_implementation`); what its last map takes in is what its
first makes of that. A router's weight is no linear map either: what it is multiplied with is heard.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from grasp.model.architecture import Matrix
from grasp.model.modes import is_linear

KNOWN = {"has_gate", "has_bias", "is_transposed"}  # of a module whose experts run in the usual way
LAST = "down_proj"


@dataclass(frozen=True)
class Wrapped(Matrix):
    """A parameter `[d_out, d_in]` of a module that is no linear map, such as a router's.

    `module` is the wrapper that PEFT put around that module.
    """

    @property
    def base(self) -> nn.Module:
        return self.module.get_base_layer()

    @property
    def out_features(self) -> int:
        return self.module.out_features

    @property
    def in_features(self) -> int:
        return self.module.in_features

    @property
    def weight(self) -> Tensor:
        """`[d_out, d_in]`, of the pretrained."""
        return getattr(self.base, self.module.parameter_name).detach()

    def norm(self) -> float:
        return float(self.weight.float().norm())

    def back(self, vectors: Tensor) -> Tensor:
        return (self.weight.mT @ vectors.to(self.weight)).float()

    def passes_gradients(self) -> bool:
        return True

    def watch(
        self, hear: Callable[[Tensor, Tensor | None], None], routed: bool = True
    ) -> RemovableHandle:
        def hook(module, args, kwargs):
            with _Products(getattr(module, self.module.parameter_name)) as seen:
                module.forward(*args, **kwargs)
            for x in seen.taken:
                hear(x, None)

        return self.base.register_forward_pre_hook(hook, with_kwargs=True)


class _Products(TorchFunctionMode):
    """Keeps what is multiplied with a weight."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = weight
        self.taken: list[Tensor] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is nn.functional.linear and len(args) > 1 and args[1] is self.weight:
            self.taken.append(args[0])
        return function(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Expert(Wrapped):
    """One expert's part of a weight `[E, ...]`; the wrapper is that of all."""

    index: int | None = 0

    @property
    def weight(self) -> Tensor:
        W = super().weight[self.index]
        return W.mT if self.base.is_transposed else W

    def part(self, factor: Tensor, holds: str) -> Tensor:
        count = self.module.num_experts
        if holds == "inputs":
            return factor.unflatten(0, (count, -1))[self.index]
        return factor.unflatten(1, (-1, count))[:, :, self.index]

    def watch(
        self, hear: Callable[[Tensor, Tensor | None], None], routed: bool = True
    ) -> RemovableHandle:
        def hook(module, args, kwargs):
            states, chosen, *_ = (*args, *kwargs.values())
            tokens = torch.arange(len(states), device=states.device)
            if routed:
                tokens = tokens[(chosen == self.index).any(-1)]
            x = states[tokens]
            hear(self._between(module, x) if self.module.parameter_name == LAST else x, tokens)

        return self.base.register_forward_pre_hook(hook, with_kwargs=True)

    def _between(self, module: nn.Module, x: Tensor) -> Tensor:
        """What an expert's last map takes in, of what its first does: `module` is as it runs."""
        name = _first(module)
        W = getattr(module, name)[self.index]
        x = x.to(W) @ (W if module.is_transposed else W.mT)
        if module.has_bias:
            x = x + getattr(module, f"{name}_bias")[self.index]
        return module._apply_gate(x) if module.has_gate else module.act_fn(x)


def stacked(module: nn.Module) -> bool:
    """Whether PEFT put a LoRA on a parameter of the module inside, and that is no linear map."""
    if not (hasattr(module, "parameter_name") and hasattr(module, "lora_A")):
        return False
    return not is_linear(module.get_base_layer())


def is_stack(module: nn.Module) -> bool:
    """Whether it holds the weights of many experts, and runs them in the usual way."""
    return vars(module).keys() >= KNOWN and hasattr(module, LAST)


class Stack(NamedTuple):
    """A weight of many experts, in one parameter."""

    name: str
    count: int
    d_out: int
    d_in: int


def stacks_of(model: nn.Module) -> Iterator[Stack]:
    """Those of a model, with a LoRA on them or not."""
    for name, module in model.named_modules():
        if is_stack(module):
            for key, W in module.named_parameters(recurse=False):
                if W.ndim == 3:
                    count, a, b = W.shape
                    shape = (b, a) if module.is_transposed else (a, b)
                    yield Stack(f"{name}.{key}", count, *shape)


def wrapped(name: str, wrapper: nn.Module) -> list[Wrapped]:
    """What a wrapper, and those inside it, have a LoRA on; of stacked experts each.

    Raises:
        ValueError: a parameter is trained so that is neither; says which.
    """
    found: list[Wrapped] = []
    inner = wrapper
    while stacked(inner):
        base, parameter = inner.get_base_layer(), inner.parameter_name
        whole, W = f"{name}.{parameter}", getattr(inner.get_base_layer(), parameter)
        if _runs_as_usual(base, parameter):
            found += [
                Expert(f"{whole}.{e}", inner, "other", index=e) for e in range(inner.num_experts)
            ]
        elif W.ndim == 2:
            found.append(Wrapped(whole, inner, "other"))
        else:
            refuse_unheard(Wrapped(whole, inner, "other"))
        inner = inner.base_layer
    return found


def refuse_unheard(matrix: Wrapped) -> None:
    """Refuse a parameter of which is not known what it is multiplied with, if it is trained.

    Raises:
        ValueError: names it.
    """
    lora = ("lora_A", "lora_B")
    if any(p.requires_grad for n, p in matrix.module.named_parameters() if n.startswith(lora)):
        raise ValueError(
            f"{matrix.name} of a {type(matrix.base).__name__} is trained (target_parameters), and "
            "what it is multiplied with can't be seen, so it can't be guarded; leave it out of "
            "target_parameters, and train the attention and the shared experts"
        )


def _first(module: nn.Module) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def _runs_as_usual(base: nn.Module, parameter: str) -> bool:
    if not vars(base).keys() >= KNOWN or getattr(base, "_is_expert_parallel", False):
        return False
    W = getattr(base, parameter)
    return parameter in (_first(base), LAST) and W.ndim == 3 and W.is_floating_point()
