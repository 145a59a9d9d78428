"""States that a model is put into for a while, and what its modules are given."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain

from torch import Tensor, nn

from grasp.model.sharding import is_split, reshard


@contextmanager
def base_model(model: nn.Module) -> Iterator[None]:
    """Run the model without its adapters, where it has any."""
    with model.disable_adapter() if hasattr(model, "disable_adapter") else ExitStack():
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout; afterwards every module is in the mode it was in, which may be mixed.

    Quantised maps are as in training: in evaluation some run without autograd (AWQ), or are packed
    anew and stay so, which no gradient passes from then on (bitsandbytes on a CPU).
    """
    modes = {m: m.training for m in model.modules()}
    for module in modes:
        _switch(module, is_quantised(module))
    try:
        yield
    finally:
        for module, training in modes.items():
            _switch(module, training)
        reshard(model)


def unwrapped_name(name: str) -> str:
    """Of a module, without the wrappers that torch puts around those it checkpoints."""
    return name.replace("_checkpoint_wrapped_module.", "").removesuffix(
        "._checkpoint_wrapped_module"
    )


def is_linear(module: nn.Module) -> bool:
    """Whether it maps vectors to vectors, quantised or not: of no such class need it be."""
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
        return True
    return {"in_features", "out_features"} <= vars(module).keys() and not list(module.children())


def is_quantised(module: nn.Module) -> bool:
    """Whether it is a linear map that holds something other than floating-point numbers."""
    held = chain(module.parameters(recurse=False), module.buffers(recurse=False))
    return is_linear(module) and not all(T.is_floating_point() for T in held)


def _switch(module: nn.Module, training: bool) -> None:
    """As `train` does, for the module alone: kernels lay their weights out anew in it."""
    if not is_quantised(module):
        module.training = training
        return
    with suppress(NotImplementedError):  # a kernel that does not train
        module.train(training)


@contextmanager
def asking(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """All of the parameters ask for gradients, also those that are frozen."""
    frozen = [p for p in parameters if not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


def _qkv(attention: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values; of an attention whose keys are its values, the keys twice."""
    q, k = attention.q_proj(x), attention.k_proj(x)
    return q, k, k if attention.v_proj is None else attention.v_proj(x)


PLAIN = {  # what Unsloth and Axolotl bind on an attention, as its own maps do it
    "apply_qkv": lambda m: lambda *args: _qkv(m, args[-1]),
    "apply_o": lambda m: lambda *args: m.o_proj(args[-1]),
}
FUSED = ("forward", "apply_in_proj_fused", "apply_out_proj")
"""What is called in place of a class's own where it is bound on an instance; Axolotl binds the last
two on linear attentions."""


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """With every module's own forward, in place of one bound on it that reads its parts' weights.

    Fused LoRA kernels are bound so (Unsloth's, Axolotl's); the maps inside are never called, so
    what they take in can't be seen. accelerate binds forwards too, to move inputs to a device;
    those stay.
    """
    aside = [
        (module, name, vars(module)[name])
        for module in model.modules()
        if not hasattr(module, "_hf_hook")
        for name in (*FUSED, *PLAIN)
        if name in vars(module)
    ]
    for module, name, _ in aside:
        if name in PLAIN:
            setattr(module, name, PLAIN[name](module))
        else:
            delattr(module, name)
    try:
        yield
    finally:
        for module, name, value in aside:
            setattr(module, name, value)


@contextmanager
def resting(model: nn.Module) -> Iterator[None]:
    """Without the LoRAs whose B is 0, which add nothing to an output and double what it takes.

    Where weights are split over processes all of them run, since no process sees a whole B.
    """
    idle = [] if is_split(model) else [m for m in model.modules() if _adds_nothing(m)]
    for module in idle:  # not `enable_adapters`, which sets what asks for gradients too
        module._disable_adapters = True
    try:
        yield
    finally:
        for module in idle:
            module._disable_adapters = False


def _adds_nothing(module: nn.Module) -> bool:
    """Whether it is PEFT's wrapper of a map whose adapters are all plain LoRAs with B = 0."""
    adapters = getattr(module, "lora_B", None)
    if not adapters or module.merged or module.disable_adapters:
        return False
    if getattr(module, "lora_variant", None):
        return False
    return all(
        isinstance(B, nn.Linear) and B.bias is None and not bool(B.weight.detach().any())
        for B in adapters.values()
    )


def given(args: tuple, kwargs: dict) -> Tensor:
    """What a linear map was called with, by position or by whatever name."""
    return args[0] if args else next(iter(kwargs.values()))
