"""PEFT's OSF with its gradients projected by `grasp_kernels`: python examples/kernels/osf.py

OSF trains the low singular directions of each weight; hooks keep their gradients off the high ones.
`attach` stands for `OSFLayer._attach_hooks`; `together` projects all in one call, without hooks.
"""

from functools import partial

import torch
from peft import OSFConfig, get_peft_model
from peft.tuners.osf.layer import OSFLayer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import grasp_kernels as gk


def high_and_low(layer: OSFLayer, adapter: str, name: str) -> tuple[Tensor | None, Tensor]:
    """As columns; of a square factor PEFT keeps the low directions alone."""
    found = [getattr(layer, f"_osf_{name}_{part}") for part in ("high", "low_init")]
    high, low = (part[adapter] if adapter in part else None for part in found)
    return (high, low) if name == "U" else (None if high is None else high.mT, low.mT)


def attach(layer: OSFLayer, adapter: str) -> None:
    def off(gradient: Tensor, name: str) -> Tensor:
        high, low = high_and_low(layer, adapter, name)
        side = "left" if name == "U" else "right"  # U_low is [d_out, r], V_low [r, d_in]
        away = gk.project(gradient, low if high is None else high, side=side)
        return gradient - away if high is None else away  # on the low is off the high ones

    for name in "UV":
        parameter = layer.osf_svd_params[adapter][f"{name}_low"]
        layer.hook_handles.append(parameter.register_hook(partial(off, name=name)))


def together(model: nn.Module, optimizer: torch.optim.Optimizer, adapter: str = "default") -> None:
    """For a model that is where it will stay: one call before each step of the optimizer."""
    parameters, bases = [], []
    for layer in (m for m in model.modules() if isinstance(m, OSFLayer)):
        layer._detach_hooks()
        for name in "UV":
            high, low = high_and_low(layer, adapter, name)
            complement = torch.linalg.qr(low, "complete").Q[:, low.shape[1] :]
            bases.append((complement if high is None else high).contiguous())
            parameters.append(layer.osf_svd_params[adapter][f"{name}_low"])
    projector = gk.Projector(_left([p.data for p in parameters]), bases, side="left")
    optimizer.register_step_pre_hook(lambda *_: projector(_left([p.grad for p in parameters])))


def _left(Ts: list[Tensor]) -> list[Tensor]:
    return [T.mT if i % 2 else T for i, T in enumerate(Ts)]  # of V_low the transpose


def train(steps: int, ours: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    model = get_peft_model(LlamaForCausalLM(config), OSFConfig(target_modules="all-linear"))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
    if ours:
        together(model, optimizer)
    tokens = torch.randint(128, (4, 32))
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    return {name: p.detach() for name, p in trained.items()}


def main(steps: int = 5) -> float:
    start, theirs, ours = train(0), train(steps), train(steps, ours=True)
    apart = max(float((ours[n] - theirs[n]).norm() / (theirs[n] - start[n]).norm()) for n in start)
    print(f"{len(start)} parameters after {steps} steps: {apart:.1e} of their change apart at most")
    return apart


if __name__ == "__main__":
    main()
