"""A decoder as its configuration has it, without its weights: what it is made of can be found.

Each weight is one number, shown at every place, and a linear map puts out zeros of its shape, so
that a model of any size takes megabytes and a token runs through it at once. What part a map plays
(`probe`) does not depend on the values of weights.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from grasp.model.architecture import out_features
from grasp.model.experts import is_stack
from grasp.model.loading import config_of
from grasp.model.modes import is_linear


def hollow(name: str) -> nn.Module:
    """The model of this name, as `load_model` takes it, without its weights.

    Raises:
        ValueError: no configuration is found by this name, or it is none of a decoder.
    """
    from transformers import AutoModelForCausalLM

    config = config_of(name)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (ValueError, KeyError, ImportError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"{name} is no decoder that transformers builds ({why})") from error
    model.config._name_or_path = name
    for module in model.modules():
        _fill(module)
        if is_linear(module):
            _replace(module, _zeros)
        elif is_stack(module):
            _replace(module, lambda self, x, *args, **kwargs: torch.zeros_like(x))
    model.tie_weights()
    return model.eval().requires_grad_(False)


def _fill(module: nn.Module) -> None:
    for key, T in list(module.named_parameters(recurse=False)):
        setattr(module, key, nn.Parameter(_filled(T), requires_grad=False))
    for key, T in list(module.named_buffers(recurse=False)):
        module._buffers[key] = _filled(T)


def _filled(T: Tensor) -> Tensor:
    """A norm's weight is 1, and a mask lets all through; nothing else is read."""
    value = T.ndim == 1 or T.dtype == torch.bool
    return torch.full((), float(value)).to(T.dtype).expand(T.shape)


def _zeros(module: nn.Module, x: Tensor, *args, **kwargs) -> Tensor:
    return x.new_zeros(*x.shape[:-1], out_features(module))


def _replace(module: nn.Module, forward: Callable) -> None:
    """Of its class, whose name tells what it is; what is bound on a module steps aside."""
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {"forward": forward})
