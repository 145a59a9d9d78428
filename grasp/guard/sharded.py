"""A weight that FSDP2 splits: each process holds the DTensor's rows, or columns, from a to b.

    right   T ← T − (T V − C) Vᵀ        on this process's rows, alone
    left    T ← T − U (Uᵀ T − C)        Uᵀ T = Σ s, s = U[a:b]ᵀ T[a:b] of each process

A projection along what is split takes one sum over processes for all matrices together. The kernel
is the same, of rows alone: it takes s out itself, so its C is C − (Σ s − s).
"""

from collections.abc import Hashable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

import grasp_kernels as gk
from grasp.guard.weights import Whole, product
from grasp.model import Trained, sharding
from grasp_kernels.arguments import Side
from grasp_kernels.autocast import set_aside


class Sharded(Whole):
    """A weight of which this process holds a part; all processes must ask, and in one order."""

    split = True

    def __init__(self, trained: Trained):
        super().__init__(trained)
        p = trained.parameter
        self.mesh, self.placements = p.device_mesh, p.placements
        over = [i for i, placed in enumerate(self.placements) if isinstance(placed, Shard)]
        if not over:  # replicated
            self.dim, self.group, self.rows = None, None, slice(None)
            return
        (i,) = over  # FSDP2 splits over one dimension of its mesh
        self.dim, self.group = self.placements[i].dim % p.ndim, self.mesh.get_group(i)
        size = p.shape[self.dim]
        each = -(-size // self.mesh.size(i))
        start = min(size, each * self.mesh.get_local_rank(i))
        self.rows = slice(start, min(size, start + each))

    @property
    def local(self) -> Tensor:
        return sharding.local(self.trained.parameter)

    @property
    def gradient(self) -> Tensor | None:
        gradient = self.trained.parameter.grad
        return None if gradient is None else sharding.local(gradient)

    def of(self, T: Tensor) -> Tensor:
        return sharding.local(T)

    def kind(self, side: Side) -> Hashable:
        dtype = torch.promote_types(self.trained.parameter.dtype, torch.float32)
        return Sharded, self.group and self.group.group_name, self.cut(side), dtype

    def cut(self, side: Side) -> bool:
        """Whether the split cuts what a basis multiplies from this side."""
        return self.dim == (0 if side == "left" else self.trained.parameter.ndim - 1)

    def part(self, basis: Tensor, side: Side) -> Tensor:
        return basis[self.rows].contiguous() if self.cut(side) else basis

    def summed(self, coefficients: Sequence[Tensor], side: Side) -> Sequence[Tensor]:
        if not self.cut(side):
            return coefficients
        flat = self.total(torch.cat([c.reshape(-1) for c in coefficients]))
        return _like(flat, coefficients)

    def total(self, T: Tensor) -> Tensor:
        """The sum of every process's, as a new tensor."""
        total = T.to(self.mesh.device_type, copy=True)  # offloaded parts lie elsewhere
        if self.group is not None:
            dist.all_reduce(total, group=self.group)
        return total.to(T.device)

    def whole(self, T: Tensor, side: Side | None = None) -> Tensor:
        if self.dim is None or (side is not None and self.cut(side)):
            return T
        shape = list(T.shape)
        shape[self.dim] = self.shape[self.dim]
        laid = torch.empty(shape, device="meta")
        part = T.detach().to(self.mesh.device_type).contiguous()
        options = {"run_check": False, "shape": laid.shape, "stride": laid.stride()}
        whole = DTensor.from_local(part, self.mesh, self.placements, **options).full_tensor()
        return whole.to(T.device)

    def own(self, T: Tensor, side: Side | None = None) -> Tensor:
        if self.dim is None or (side is not None and self.cut(side)):
            return T
        rows = self.rows.stop - self.rows.start
        return T.narrow(self.dim, self.rows.start, rows).clone(
            memory_format=torch.contiguous_format
        )

    @staticmethod
    def projector(
        weights: Sequence["Sharded"],
        tensors: Sequence[Tensor] | None,
        bases: Sequence[Tensor],
        Cs: Sequence[Tensor] | None,
        side: Side,
        measure: bool = False,
    ) -> "ShardedProjector":
        return ShardedProjector(weights, tensors, bases, Cs, side, measure)

    def _any(self, T: Tensor) -> bool:
        return bool(self.total(sharding.local(T).any().float()))


class ShardedProjector:
    """`grasp_kernels.Projector` of this process's parts, as `Whole.projector` makes it.

    Parts without a row are left out, though not of the sums over processes.
    """

    def __init__(
        self,
        weights: Sequence[Sharded],
        tensors: Sequence[Tensor] | None,
        bases: Sequence[Tensor],
        Cs: Sequence[Tensor] | None,
        side: Side,
        measure: bool,
    ):
        self.weights, self.tensors, self.measure = weights, tensors, measure
        self.side, self.cut = side, weights[0].cut(side)
        self.bases = [w.part(basis, side) for w, basis in zip(weights, bases, strict=True)]
        parts = self._parts(None)
        self.there = [i for i, T in enumerate(parts) if T.numel()]
        self._inside = torch.zeros(len(weights), dtype=torch.float64)  # Σ ‖Uᵀ T‖² of wholes
        if self.cut:
            found = self._coefficients(parts)
            given = [c.reshape(-1) for c in Cs] if Cs else [torch.zeros_like(f) for f in found]
            self.pinned = torch.cat([c.reshape(-1) for c in given]).to(found[0])
            self.C = self.pinned.clone()  # what the kernel is given, written anew at each call
            Cs = _like(self.C, found)
        self.projector = None
        if self.there:
            chosen = [[these[i] for i in self.there] for these in (parts, self.bases)]
            Cs = [Cs[i] for i in self.there] if Cs else None
            self.projector = gk.Projector(*chosen, Cs, side=side, measure=measure)

    @torch.no_grad()
    @set_aside()
    def __call__(self, Ts: Sequence[Tensor] | None = None) -> None:
        """Project the tensors it was made of, or `Ts` in their place."""
        parts = self._parts(Ts)
        if self.cut:
            found = self._coefficients(parts)
            flat = torch.cat([c.reshape(-1) for c in found])
            total = self.weights[0].total(flat)
            torch.sub(self.pinned, total.sub(flat), out=self.C)
            if self.measure:
                norms = torch.stack(torch._foreach_norm(_like(total, found)))
                self._inside = self._inside.to(norms.device) + norms.double().square()
        if self.projector is not None:
            self.projector([parts[i] for i in self.there])

    def energies(self) -> Tensor:
        """As `grasp_kernels.Projector.energies`, of the tensors as a whole."""
        found = torch.zeros(len(self.weights), 2, dtype=torch.float64)
        if self.projector is not None:
            found[self.there] = self.projector.energies()
        found = self.weights[0].total(found)
        if self.cut:
            found[:, 1] = self._inside.cpu()
            self._inside = torch.zeros_like(self._inside)
        return found

    def _parts(self, Ts: Sequence[Tensor] | None) -> list[Tensor]:
        given = self.tensors if Ts is None else Ts
        if given is None:  # asked anew: FSDP2 may have laid them out elsewhere
            return [w.local for w in self.weights]
        return [sharding.local(T) for T in given]

    def _coefficients(self, parts: Sequence[Tensor]) -> list[Tensor]:
        return [product(T, U, self.side) for T, U in zip(parts, self.bases, strict=True)]


def _like(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Pieces of a flat tensor, one in the shape of each."""
    pieces = flat.split([T.numel() for T in tensors])
    return [piece.view_as(T) for piece, T in zip(pieces, tensors, strict=True)]
