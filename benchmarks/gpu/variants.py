"""Stages, warps and block widths of the Triton kernels, each on the same matrices.

The constants come from functions named `tiling` in `grasp_kernels`, replaced here by ones that
change what they return; each line names the one that was asked, where a variant that wins goes.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from itertools import product
from typing import NamedTuple
from unittest import mock

import bench_project as bench
import harness
import torch
from torch import Tensor

import grasp_kernels as gk

from .inside import Inside

HOOK = "tiling"
STAGES = {"num_stages", "STAGES"}
REGISTERS = 65536  # of a multiprocessor
MATRICES = [
    bench.Matrix("right", 16384, 4096, torch.bfloat16, 16),
    bench.Matrix("left", 4096, 14336, torch.bfloat16, 16),
    bench.Matrix("right", 16384, 4096, torch.bfloat16, 64),
    bench.Matrix("right", 16384, 4096, torch.float32, 16),
]
TINY = [bench.Matrix("right", 40, 96, torch.bfloat16, 16)]


class Factors(NamedTuple):
    """LoRA A of a few blocks and their wide bases."""

    model: str
    blocks: int

    def about(self) -> dict:
        return {"side": "right", "dtype": "float32", "model": self.model, "blocks": self.blocks}

    def __str__(self) -> str:
        return f"{self.blocks} blocks of {self.model} A"


class Variant(NamedTuple):
    stages: int
    warps: int
    BD: int | None = None

    def applied(self, options: dict) -> dict:
        """The kernel's constants changed; stages as it has them, or Triton's own."""
        named = STAGES & options.keys() or {"num_stages"}
        changed = options | {"num_warps": self.warps} | dict.fromkeys(named, self.stages)
        if "BD" in options and self.BD:
            changed["BD"] = self.BD
        if "maxnreg" in options:  # more than there are for so many warps would refuse to launch
            most = REGISTERS // (32 * self.warps)
            changed["maxnreg"] = min(options["maxnreg"], most)
        return changed


def measure(inside: Inside) -> None:
    matrices = TINY if inside.tiny else MATRICES
    factors = Factors(*(("tiny", 1) if inside.tiny else ("8B", 4)))
    most = 2 if inside.tiny else None
    strips = [None, *(Variant(*v) for v in product((4, 3, 5), (8, 4), (128, 64, 32)))][:most]
    lists = [None, *(Variant(*v) for v in product((4, 3, 5), (8, 4)))][:most]
    first, rest = matrices[:2], matrices[2:]
    cases = [(m, v) for v in strips for m in first]
    cases += [(factors, v) for v in lists] + list(product(rest, strips))
    made: dict = {}
    inside.each(cases[:1], lambda case: _case(inside, made, *case), _name)
    inside.each(cases[1:], lambda case: _case(inside, made, *case), _name, trial=True)


def _name(case: tuple) -> str:
    return f"{case[0]}, {case[1] or 'as it is'}"


def _case(inside: Inside, made: dict, of: NamedTuple, variant: Variant | None) -> None:
    if of not in made:
        made[of] = _made(of, inside.device)
    Ts, Us, side = made[of]
    for T in Ts:
        T.normal_()  # what another variant projected would hide one that does nothing
    targets = [torch.empty_like(T) for T in Ts]
    with _changed(variant) as used, gk.backend("triton"):
        runs = {
            "copy": lambda: torch._foreach_copy_(targets, Ts),
            "triton": gk.Projector(Ts, Us, side=side),
        }
        times = harness.timed(runs, inside.device, 2 if inside.tiny else 12)
    leak = max(map(partial(_leak, side), Ts, Us))
    inside.add(
        sound=leak <= max(1e-5, 4 * torch.finfo(Ts[0].dtype).eps),
        case=_name((of, variant)),
        **of.about(),
        variant=variant._asdict() if variant else None,
        hooks=[{"of": name} | options for name, options in used],
        ms=times["triton"],
        share=times["copy"] / times["triton"],
        leak=leak,
    )


def _made(of: NamedTuple, device: torch.device) -> tuple[list[Tensor], list[Tensor], str]:
    if isinstance(of, Factors):
        return *bench.factors(of.model, "A", bench.WIDE, device, of.blocks), "right"
    T, U = of.made(device)
    return [T], [U], of.side


def _leak(side: str, T: Tensor, U: Tensor) -> float:
    X = T.float()
    return float((U.mT @ X if side == "left" else X @ U).norm() / X.norm())


@contextmanager
def _changed(variant: Variant | None) -> Iterator[list[tuple[str, dict]]]:
    """Inside, kernels are laid out with this variant; who was asked, and what was then used."""
    import_module("grasp_kernels.project_triton")
    ours = [m for name, m in list(sys.modules.items()) if name.startswith("grasp_kernels.")]
    hooked = [m for m in ours if hasattr(m, HOOK)]
    if not hooked:
        raise LookupError(f"grasp_kernels has no {HOOK}; name the function that gives constants")
    used: list[tuple[str, dict]] = []

    def changed(own: Callable[..., dict], *args, **kwargs) -> dict:
        options = own(*args, **kwargs)
        options = variant.applied(options) if variant else options
        if (of := (f"{own.__module__}.{HOOK}", options)) not in used:
            used.append(of)
        return options

    with ExitStack() as stack:
        for module in hooked:
            own = getattr(module, HOOK)
            stack.enter_context(mock.patch.object(module, HOOK, partial(changed, own)))
        yield used
