"""A weight whose elements DeepSpeed's ZeRO lays into flat partitions, one on each process.

This process holds those from `start` on: as parts of a matrix up to three blocks, which are the end
of a row, whole rows, and the beginning of a row.

    right   T ← T − (T V − C) Vᵀ        T V of a row that is cut is a sum over processes
    left    T ← T − U (Uᵀ T − C)        Uᵀ T is one, if anything is cut

What is not cut lies on one process, which projects it as ever; the others hold nothing of it.
"""

from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

import grasp_kernels as gk
from grasp.guard.weights import Whole
from grasp.model import Trained, partitions
from grasp_kernels.arguments import Side
from grasp_kernels.autocast import set_aside

if TYPE_CHECKING:
    from grasp.guard.zero import Zero


class Place(NamedTuple):
    """Where a fragment lies."""

    flat: int | None  # which flat partition; None of a frozen weight, which is in none
    offset: int  # in it
    start: int  # in the flattened weight
    numel: int


class Block(NamedTuple):
    """A part of a matrix, as a view of a fragment."""

    rows: slice
    columns: slice
    T: Tensor


class Fragment(Whole):
    """A weight of which this process holds a fragment; all must ask, and in one order.

    Coefficients of its right side are those of the rows that it holds anything of.

    Args:
        zero: what trains it.
        places: the fragments of all processes.
        process: this one among them.
    """

    split = True

    def __init__(self, trained: Trained, zero: "Zero", places: Sequence[Place], process: int):
        super().__init__(trained)
        self.zero, self.at = zero, places[process]
        self.columns = self.shape[-1]
        self.height = self.shape.numel() // self.columns
        there = [p for p in places if p.numel]
        self.cut = any(p.numel < self.shape.numel() for p in there)
        inside = {p.start // self.columns for p in there if p.start % self.columns}
        first, last = self._rows_between(self.at.start, self.at.start + self.at.numel)
        self.rows = slice(first, last)
        """Those that it holds anything of."""
        begun = -(-self.at.start // self.columns)
        self.whose = slice(min(begun, last) - first, last - first)
        """Of `rows` those that begin here, which are this process's to tell of."""
        self.cut_rows = sorted(inside)
        self.here = [r for r in self.cut_rows if first <= r < last]

    def _rows_between(self, start: int, end: int) -> tuple[int, int]:
        return (start // self.columns, -(-end // self.columns)) if end > start else (0, 0)

    @property
    def local(self) -> Tensor:
        if self.at.flat is None:
            return self.of(self.trained.parameter.ds_tensor.data)
        return self.of(self.zero.flats[self.at.flat].data)

    @property
    def gradient(self) -> Tensor | None:
        if self.at.flat is None or not self.moves:
            return None
        gradient = self.zero.flats[self.at.flat].grad
        return None if gradient is None else self.of(gradient)

    @property
    def stepped(self) -> Tensor:
        return self.trained.parameter if self.at.flat is None else self.zero.flats[self.at.flat]

    @property
    def moves(self) -> bool:
        return self.zero.moves(self.at.flat)

    def follows(self) -> bool:
        """Whether the model's weight is what is trained in its place, rounded to its dtype."""
        parameter = self.trained.parameter
        if hasattr(parameter, "ds_tensor"):
            weight = parameter.ds_tensor.data[: self.at.numel]
        else:
            weight = parameter.detach().reshape(-1).narrow(0, self.at.start, self.at.numel)
        return torch.allclose(self.local.to(weight), weight, rtol=0, atol=0, equal_nan=True)

    def of(self, flat: Tensor) -> Tensor:
        """The fragment in a flat partition, or in what is as long."""
        return flat.narrow(0, self.at.offset, self.at.numel)

    def put(self, T: Tensor) -> None:
        with partitions.written(self.trained.parameter) as parameter:
            parameter.data.copy_(T)

    def kind(self, side: Side) -> Hashable:
        return Fragment, self.at.flat

    def blocks(self, T: Tensor) -> Iterator[Block]:
        """The parts of a matrix that a fragment is."""
        n, at, end = self.columns, self.at.start, self.at.start + self.at.numel
        while at < end:
            row, column = divmod(at, n)
            whole = (end - at) // n if column == 0 else 0
            size = whole * n or min(n - column, end - at)
            rows, columns = slice(row, row + max(1, whole)), slice(column, column + min(size, n))
            part = T.narrow(0, at - self.at.start, size)
            yield Block(rows, slice(0, n) if whole else columns, part.view(max(1, whole), -1))
            at += size

    def times(self, T: Tensor, basis: Tensor, side: Side) -> Tensor:
        k, basis = basis.shape[1], basis.float()
        if side == "left":
            C = T.new_zeros(k, self.columns, dtype=torch.float32)
            for rows, columns, part in self.blocks(T.detach().float()):
                C[:, columns] += basis[rows].mT @ part
            return C
        C = T.new_zeros(self.rows.stop - self.rows.start, k, dtype=torch.float32)
        for rows, columns, part in self.blocks(T.detach().float()):
            C[self._from_first(rows)] += part @ basis[columns]
        return C

    def take_off(self, T: Tensor, basis: Tensor, C: Tensor, side: Side) -> None:
        """T ← T − U C, or T − C Vᵀ, on a fragment."""
        for rows, columns, part in self.blocks(T):
            if side == "left":
                part.addmm_(basis[rows], C[:, columns], alpha=-1)
            else:
                part.addmm_(C[self._from_first(rows)], basis[columns].mT, alpha=-1)

    def sent(self, C: Tensor, side: Side) -> Tensor:
        """Of this process's coefficients what others have a part in: all, or rows that are cut."""
        if side == "left":
            return C if self.cut else C[:0]
        sent = C.new_zeros(len(self.cut_rows), C.shape[1])
        if self.here:
            at = [self.cut_rows.index(r) for r in self.here]
            sent[at] = C[[r - self.rows.start for r in self.here]]
        return sent

    def received(self, C: Tensor, total: Tensor, side: Side) -> Tensor:
        """Coefficients with the sums of what was `sent`."""
        if side == "left":
            return total if self.cut else C
        if self.here:
            C = C.clone()
            at = [self.cut_rows.index(r) for r in self.here]
            C[[r - self.rows.start for r in self.here]] = total[at]
        return C

    def shares(self, side: Side) -> Tensor:
        """√ of the share of each coefficient's energy that this process tells of."""
        others = self.zero.processes**-0.5
        if side == "left":
            return torch.tensor(others)
        shares = torch.ones(self.rows.stop - self.rows.start, 1)
        shares[: self.whose.start] = 0  # that row's is told where it begins
        return shares

    def summed(self, coefficients: Sequence[Tensor], side: Side) -> Sequence[Tensor]:
        return summed([self] * len(coefficients), coefficients, side)

    def whole(self, T: Tensor, side: Side | None = None) -> Tensor:
        if side == "left":
            return T if self.cut else self.zero.total(T)
        if side == "right":
            whole = T.new_zeros(self.height, T.shape[1])
            whole[self.rows][self.whose] = T[self.whose]
            return self.zero.total(whole).view(*self.shape[:-1], T.shape[1])
        whole = T.new_zeros(self.shape.numel())
        whole[self.at.start : self.at.start + self.at.numel] = T.detach()
        return self.zero.total(whole).view(self.shape)

    def own(self, T: Tensor, side: Side | None = None) -> Tensor:
        if side == "left":
            return T if self.cut or self.at.numel else torch.zeros_like(T)
        if side == "right":
            return T.reshape(self.height, T.shape[-1])[self.rows].clone()
        return T.reshape(-1).narrow(0, self.at.start if self.at.numel else 0, self.at.numel).clone()

    def now(self) -> Tensor:
        parameter = self.trained.parameter
        with partitions.gathered([parameter]):
            return parameter.detach().clone()

    def laid(self, G: Tensor) -> Tensor:
        return self.own(G).to(self.local.device)

    def _any(self, T: Tensor) -> bool:
        with partitions.gathered([T]):
            return super()._any(T)

    def _from_first(self, rows: slice) -> slice:
        return slice(rows.start - self.rows.start, rows.stop - self.rows.start)

    @staticmethod
    def projector(
        weights: Sequence["Fragment"],
        tensors: Sequence[Tensor] | None,
        bases: Sequence[Tensor],
        Cs: Sequence[Tensor] | None,
        side: Side,
        measure: bool = False,
    ) -> "FragmentProjector":
        return FragmentProjector(weights, tensors, bases, Cs, side, measure)


def summed(weights: Sequence[Fragment], Cs: Sequence[Tensor], side: Side) -> list[Tensor]:
    """Coefficients of fragments of one partition, in one sum over processes."""
    sent = [w.sent(C, side) for w, C in zip(weights, Cs, strict=True)]
    flat = torch.cat([s.reshape(-1) for s in sent]) if sent else torch.empty(0)
    if not flat.numel():
        return list(Cs)
    totals = weights[0].zero.total(flat).split([s.numel() for s in sent])
    return [
        w.received(C, total.view_as(s), side)
        for w, C, total, s in zip(weights, Cs, totals, sent, strict=True)
    ]


class FragmentProjector:
    """`grasp_kernels.Projector` of fragments of one flat partition, as `Whole.projector` makes it.

    While an optimizer steps, it does something if its partition is among those that move.

    Args:
        tensors: as long as the partition each; None for the partition itself.
    """

    def __init__(
        self,
        weights: Sequence[Fragment],
        tensors: Sequence[Tensor] | None,
        bases: Sequence[Tensor],
        Cs: Sequence[Tensor] | None,
        side: Side,
        measure: bool,
    ):
        self.weights, self.bases, self.Cs, self.side = list(weights), bases, Cs, side
        self.tensors, self.measure = tensors, measure
        self.zero, self.flat = weights[0].zero, weights[0].at.flat
        self.cut = [i for i, w in enumerate(weights) if w.cut]
        self.alone = [i for i, w in enumerate(weights) if not w.cut and w.at.numel]
        parts = self._parts()
        self.shares = [weights[i].shares(side).to(parts[i].device) for i in self.cut]
        self._sums = torch.zeros(len(self.weights), 2, dtype=torch.float64)
        self.projector = None
        if self.alone:
            alone = [bases[i] for i in self.alone], [Cs[i] for i in self.alone] if Cs else None
            self.projector = gk.Projector(self._alone(parts), *alone, side=side, measure=measure)

    @torch.no_grad()
    @set_aside()
    def __call__(self, Ts: Sequence[Tensor] | None = None) -> None:
        """Project the tensors it was made of, or the fragments `Ts` in their place."""
        if not self.zero.moves(self.flat):
            return
        parts = self._parts() if Ts is None else list(Ts)
        if self.projector is not None:
            self.projector(self._alone(parts))
        cut = [(self.weights[i], parts[i], self.bases[i]) for i in self.cut]
        found = [w.times(T, basis, self.side) for w, T, basis in cut]
        found = summed([w for w, _, _ in cut], found, self.side)
        if self.measure and cut:
            self._add([T for _, T, _ in cut], found)
        for (w, T, basis), i, C in zip(cut, self.cut, found, strict=True):
            w.take_off(T, basis, C - self.Cs[i] if self.Cs else C, self.side)

    def energies(self) -> Tensor:
        """As `grasp_kernels.Projector.energies`, of what this process tells of: they add up."""
        sums, self._sums = self._sums.cpu(), torch.zeros_like(self._sums)
        if self.projector is not None:
            sums[self.alone] += self.projector.energies()
        return sums

    def _parts(self) -> list[Tensor]:
        if self.tensors is None:
            return [w.local for w in self.weights]
        return [w.of(T) for w, T in zip(self.weights, self.tensors, strict=True)]

    def _alone(self, parts: Sequence[Tensor]) -> list[Tensor]:
        return [parts[i].view(-1, self.weights[i].columns) for i in self.alone]

    def _add(self, parts: Sequence[Tensor], found: Sequence[Tensor]) -> None:
        inside = torch._foreach_norm([C * s for C, s in zip(found, self.shares, strict=True)])
        norms = torch.stack([torch.stack(torch._foreach_norm(list(parts))), torch.stack(inside)], 1)
        self._sums = self._sums.to(norms.device)
        self._sums[self.cut] += norms.double().square()
