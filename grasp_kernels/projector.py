"""Projections that are done again at every step, laid out once.

To check a list of hundreds of tensors and find their shapes takes Python milliseconds; to project
them takes a GPU microseconds. What stays from step to step is done once here.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch
from .arguments import Side, check_distinct, check_matrix, checked
from .autocast import set_aside
from .matrices import listed, matrices
from .project import Norms, chosen_backends, project_strips
from .tables import capturing

KEPT = 16  # sets of addresses, between which an allocator goes round


class Projector:
    """Project a list of matrices in place, at every step of a run.

        right   T ← T − (T V − C) Vᵀ        left   T ← T − U (Uᵀ T − C)

    A call does what `project_` does. The tensors given here are held and must keep their shapes and
    strides; where their memory lies may change. Bases and `C` are held too, and must stay as they
    are: new ones need a new projector.

    Args:
        Ts, bases, Cs, side, check: as `project_` takes them, in lists; a None here is refused.
        measure: add up the energies that `energies` returns.

    Raises:
        TypeError, ValueError: as `project_`.
    """

    def __init__(
        self,
        Ts: Sequence[Tensor],
        bases: Tensor | Sequence[Tensor],
        Cs: Tensor | Sequence[Tensor] | None = None,
        *,
        side: Side = "right",
        measure: bool = False,
        check: bool = False,
    ) -> None:
        given = [Ts] if isinstance(Ts, Tensor) else list(Ts)
        if any(T is None for T in given):
            raise TypeError("Ts holds None; make the Projector of what there is to project")
        self.tensors, self.bases, self.Cs, self.left = checked(given, bases, Cs, side, check)
        self.side, self.measure = side, measure
        self._sums = torch.zeros(len(self.tensors), 2, dtype=torch.float64)
        self._parts: OrderedDict[tuple[int, ...], Projector] = OrderedDict()
        self._own = _layout_of(self.tensors)
        self._lay_out(self.tensors, self._own)

    def __call__(self, Ts: Sequence[Tensor | None] | None = None) -> None:
        """Project the tensors it was made of, or in their place `Ts`, such as their gradients.

        A None among `Ts` is left out of this call.

        Raises:
            TypeError, ValueError: as `project_`.
        """
        given = self.tensors if Ts is None else list(Ts)
        try:
            layout = self._own if Ts is None else _layout_of(given)
        except AttributeError:  # None has no layout
            return self._project_some(given)
        if layout is not self._layout and layout != self._layout:
            self._check(given)
            self._lay_out(given, layout)
        if self._asked_for != dispatch.asked_for():
            self._lay_out(given, layout)
        if Ts is not None and torch.is_grad_enabled():
            if any(T.requires_grad and not T.is_leaf for T in given):
                self._check(given)
        pointers = tuple(map(Tensor.data_ptr, given))
        places = self._places.get(pointers) or self._place(given, pointers)
        with torch.no_grad(), set_aside():
            for laid, where in zip(self._laid, places, strict=True):
                laid.launch.run(where, laid.energies)
            self._project_plainly(given)
            torch.autograd.graph.increment_version(given)

    def energies(self) -> Tensor:
        """What the calls since the last one of this took in and took out.

        Returns:
            `[len(Ts), 2]` fp64 on the CPU: Σ ‖T‖² over the calls, and Σ ‖T V‖² (or ‖Uᵀ T‖²), what
            of it lay in the basis. A call whose ‖T‖² overflows fp32 counts as nothing.

        Raises:
            ValueError: it was made without `measure`.
        """
        if not self.measure:
            raise ValueError("measure is False; make the Projector with measure=True")
        self._gather()
        for there, part in self._parts.items():
            self._gather_part(there, part)
        sums, self._sums = self._sums, torch.zeros_like(self._sums)
        return sums

    def _project_some(self, Ts: list[Tensor | None]) -> None:
        """By a projector of those that are there, kept for the next time it is the same ones."""
        self._check_count(Ts)
        for i, T in enumerate(Ts):
            if T is not None:
                check_matrix(f"Ts[{i}]", T)
        there = tuple(i for i, T in enumerate(Ts) if T is not None)
        if (part := self._parts.get(there)) is None:
            if len(self._parts) >= KEPT:
                self._gather_part(*self._parts.popitem(last=False))
            tensors, bases = ([these[i] for i in there] for these in (self.tensors, self.bases))
            Cs = [self.Cs[i] for i in there] if self.Cs else None
            part = Projector(tensors, bases, Cs, side=self.side, measure=self.measure)
            self._parts[there] = part
        part([Ts[i] for i in there])

    def _gather_part(self, there: tuple[int, ...], part: "Projector") -> None:
        if self.measure:
            self._sums[list(there)] += part.energies()

    def _check_count(self, Ts: Sequence[Tensor | None]) -> None:
        if len(Ts) != len(self.tensors):
            raise ValueError(f"Ts has {len(Ts)} tensors; this projector takes {len(self.tensors)}")

    def _check(self, Ts: list[Tensor]) -> None:
        self._check_count(Ts)
        checked(Ts, self.bases, self.Cs or None, self.side)

    def _lay_out(self, Ts: list[Tensor], layout: "_Layout") -> None:
        """For tensors of this layout, on the backends that are asked for."""
        if capturing():
            raise RuntimeError(
                "a Projector can't be laid out while a CUDA graph is captured; make it before, and "
                "call it once with tensors of this layout"
            )
        if self.measure:
            self._gather()
        self._layout, self._asked_for = layout, dispatch.asked_for()
        self._aligned = _aligned(map(Tensor.data_ptr, Ts))
        self._places: OrderedDict[tuple[int, ...], list] = OrderedDict()
        self._laid: list[_Laid] = []
        self._plain: list[int] = []
        self._plain_energies: dict[torch.device, Tensor] = {}
        for name, chosen in chosen_backends("project_", Ts, self.bases).items():
            if name == "reference":
                self._plain += chosen
                continue
            # What has to be copied before a kernel can take it is left to PyTorch.
            awkward = [
                i for i in chosen if not self.bases[i].shape[-1] or _staged(Ts[i], self.left)
            ]
            self._plain += awkward
            self._lay_out_on(name, Ts, [i for i in chosen if i not in awkward])
        for device in {Ts[i].device for i in self._plain}:
            self._plain_energies[device] = torch.zeros(len(Ts), 2, device=device)

    def _lay_out_on(self, name: str, Ts: list[Tensor], chosen: list[int]) -> None:
        if not chosen:
            return
        module = dispatch.module_of("project", name)
        some_Cs = [self.Cs[i] for i in chosen] if self.Cs else []
        bases = [self.bases[i] for i in chosen]
        some = [Ts[i] for i in chosen]
        by_device = listed(some, some, bases, some_Cs, self.left, [])
        for device, found in by_device.items():
            for launch, rows in module.launches(found.rows, device):
                members = [(chosen[found.members[r][0]], found.members[r][1]) for r in rows]
                energies = owners = None
                if self.measure:
                    owners = torch.tensor([members[m][0] for m in launch.owners])
                    energies = torch.zeros(launch.count, 2, device=device)
                kept = [found.kept[r] for r in rows]
                self._laid.append(_Laid(launch, members, kept, owners, energies))

    def _place(self, Ts: list[Tensor], pointers: tuple[int, ...]) -> list:
        """Tables for tensors at these addresses, kept for the next time they lie there."""
        if _layout_of(Ts) != self._layout:
            raise ValueError(
                "a tensor of this projector has changed its shape, dtype or device; make a new one"
            )
        check_distinct(Ts)
        if self._aligned != _aligned(pointers):  # a kernel may take one and not the other
            self._lay_out(Ts, self._layout)
        places = [
            laid.launch.places(tuple(pointers[i] + at for i, at in laid.members for _ in range(2)))
            for laid in self._laid
        ]
        if capturing():  # the tables are filled by the graph's replays alone
            return places
        self._places[pointers] = places
        if len(self._places) > KEPT:
            self._places.popitem(last=False)
        return places

    def _project_plainly(self, Ts: list[Tensor]) -> None:
        norms: Norms = []
        owners: list[int] = []
        for i in self._plain:
            C = self.Cs[i] if self.Cs else None
            project_strips(
                Ts[i], self.bases[i], C, self.left, Ts[i], norms if self.measure else None
            )
            owners += [i] * (len(norms) - len(owners))
        # In a few operations for all: one for each would take longer than the projections.
        for device, sums in self._plain_energies.items() if norms else ():
            on = [j for j, (whole, _) in enumerate(norms) if whole.device == device]
            flat = torch.stack([n.to(torch.float32) for j in on for n in norms[j]])
            squares = flat.view(-1, 2).square()
            squares = torch.where(squares[:, :1].isfinite(), squares, 0.0)
            sums.index_add_(0, torch.tensor([owners[j] for j in on], device=device), squares)

    def _gather(self) -> None:
        for laid in getattr(self, "_laid", ()):
            self._sums.index_add_(0, laid.owners, laid.energies.double().cpu())
            laid.energies.zero_()
        for sums in getattr(self, "_plain_energies", {}).values():
            self._sums += sums.cpu().double()  # in this order: MPS has no fp64
            sums.zero_()


class _Laid(NamedTuple):
    """One launch, with what it is of."""

    launch: object
    members: list[tuple[int, int]]  # of each matrix the tensor, and the bytes from its start
    kept: list  # what its table points to
    owners: Tensor | None  # the tensor of each strip
    energies: Tensor | None  # [strips, 2]


_Layout = tuple[list, ...]


def _layout_of(Ts: Sequence[Tensor]) -> _Layout:
    """What a launch relies on, to be compared with the next call's."""
    return (
        [T.shape for T in Ts],
        [T.stride() for T in Ts],
        [T.dtype for T in Ts],
        [T.device for T in Ts],
    )


def _aligned(pointers: Iterable[int]) -> list[bool]:
    return [pointer % 16 == 0 for pointer in pointers]


def _staged(T: Tensor, left: bool) -> bool:
    staged: list[tuple[Tensor, Tensor]] = []
    matrices(T, T, None, left, staged)
    return bool(staged)
