"""What is refused or told when a guard is attached."""

import warnings
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grasp.guard.frozen import Frozen
from grasp.guard.guarded import Guarded
from grasp.model import Architecture, Trained

if TYPE_CHECKING:
    from grasp.guard.guard import Guard

_HOLDERS: dict[int, "weakref.ref[Guard]"] = {}  # by the parameters that are guarded


def take_over(guard: "Guard", parameters: Sequence[Tensor]) -> None:
    """Detach what was left behind on the parameters: each has one guard."""
    for p in parameters:
        held_by = _HOLDERS.get(id(p))
        other = held_by() if held_by else None
        if other not in (None, guard) and any(g.parameter is p for g in other.guarded):
            other.detach()
        _HOLDERS[id(p)] = weakref.ref(guard)


def refuse_rounded(trained: Sequence[Trained], zero: bool) -> None:
    """Refuse weights trained themselves in 16 bits.

    Args:
        zero: whether DeepSpeed trains them, which keeps fp32 copies, but rounds what it saves.

    Raises:
        ValueError: names the first.
    """
    for t in trained:
        if t.partner is None and t.parameter.dtype in (torch.bfloat16, torch.float16):
            dtype = str(t.parameter.dtype).removeprefix("torch.")
            instead = (
                "leave bf16 and fp16 out of DeepSpeed's configuration (torch_autocast still "
                "computes in bf16)"
                if zero
                else "load the model in float32 (Trainer's bf16=True still computes in bf16)"
            )
            raise ValueError(
                f"{t.name} is trained itself in {dtype}, whose rounding alone lets up to 0.9 of "
                f"its change through; {instead}, or train a LoRA"
            )


def refuse_dead_ends(found: Architecture) -> None:
    """Refuse maps that end a gradient: what lies before them would train on a part of it.

    Raises:
        ValueError: names the first.
    """
    for matrix in (m for block in found.blocks for m in block.matrices):
        if not matrix.passes_gradients():
            raise ValueError(
                f"{matrix.name} ({type(matrix.base).__name__}) hands no gradient on: its kernel is "
                "for inference alone, or evaluation has packed its weights for it; load the model "
                "with a backend that trains, and attach before anything evaluates it"
            )


def tell_open(
    found: Architecture, trained: Sequence[Trained], guarded: Sequence[Guarded | Frozen]
) -> None:
    """Warn of what is trained and not covered, by either of its factors."""
    covered = {id(g.parameter) for g in guarded}
    open_ways = [
        t.name
        for t in trained
        if not covered & {id(t.parameter), id(t.partner)} and t.matrix.role != "reader"
    ] + found.untracked()
    if open_ways:
        warnings.warn(
            "the factor can still be written through trained modules that the guard does not "
            f"cover: {', '.join(open_ways[:8])}{' …' if len(open_ways) > 8 else ''}",
            stacklevel=4,
        )


def refuse_late(asked: bool | None) -> None:
    """Refuse to freeze what a wrapper waits for.

    Raises:
        ValueError: it was asked for.
    """
    if asked:
        raise ValueError(
            "freeze_inputs=True came after the model was wrapped for several processes, which wait "
            "for gradients of all that asked for them then; freeze every lora_A before "
            "(requires_grad_(False)), or give GraspCallback to the Trainer when you make it"
        )


def tell_held(guarded: Sequence[Guarded], rank: int) -> None:
    """Warn of adapters that go on, where what they did before holds one factor whole, or both.

    Args:
        guarded: all of a guard.
        rank: to which bases of outputs grow: a LoRA of no larger r is held in A by them alone.
    """
    small = [
        g.name
        for g in guarded
        if g.left and g.partner is not None and g.partner.kept is not None
        if g.weight.shape[1] <= max(rank, g.basis.shape[1])
    ]
    if small:
        warnings.warn(
            f"{len(small)} adapters go on from what they learned ({small[0]}, …) with no larger r "
            f"than the {rank} directions of outputs that are blocked, which leaves them nothing to "
            "learn; give a smaller rank, or merge it and start a fresh LoRA",
            stacklevel=4,
        )
        return
    whole = [
        g.name
        for g in guarded
        for pin in g.pins()
        if pin.weight is g.partner and pin.basis.shape[1] == pin.basis.shape[0]
    ]
    if whole:
        warnings.warn(
            f"{len(whole)} adapters go on from what they learned ({whole[0]}, …) and act on what "
            "is blocked, so one of their factors is held and they learn less; to let both learn, "
            "merge it and start a fresh LoRA",
            stacklevel=4,
        )
