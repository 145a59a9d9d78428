"""How a list of matrices of few rows is cut into the pieces of `factors_triton`'s work."""

from collections.abc import Sequence
from itertools import groupby, product
from typing import NamedTuple

import torch

from .matrices import CODES, Row, unit

LOW, MOST = 16, 32  # rows of a group
WIDE = 64  # directions in one block of columns; above, the basis is most of what is read


class Group(NamedTuple):
    """Rows that share a basis, and where their sums lie in `scratch` and `counters`."""

    basis: int  # address of [d, k] fp32
    basis_d: int  # strides
    basis_k: int
    d: int
    k: int
    n: int
    first: int  # of its rows among those of the launch
    step: int  # elements between rows, of a matrix from its left side
    out_step: int
    C_k: int
    length: int  # of a part of d
    sums: int  # place of the parts' sums, [blocks of columns, parts, BR, KB]
    total: int  # place of c − C, [blocks of columns, BR, KB]
    energy: int  # place of the rows' energies, [parts + blocks of columns, BR]
    counter: int  # [1 + blocks of columns]: sums that are done; of each, parts that are


class Layout:
    """Groups, pieces and places of a launch."""

    def __init__(self, rows: Sequence[Row], options: dict, resident: int):
        """For `resident` programs at a time."""
        self.options = options
        # Sums run ahead of what needs them: by as much as all programs do where a piece is long,
        # by less where that keeps what is read again in the second-level cache.
        self.lead = resident // 4 if options["WHOLE"] else resident
        self.groups: list[Group] = []
        self.owners: list[int] = []
        """The matrix that each row of the launch is of."""
        self.within: list[tuple[int, int]] = []
        """Bytes of each row from the start of its matrix, and of its projection."""
        self.pinned: list[int] = []
        """Addresses of each row's C, or 0."""
        self.scratch, self.counters = 0, 1  # the first counts pieces
        size = 4 if options["CODE"] == CODES[torch.float32] else 2
        for stacked in _stacked(rows, options["BR"]):
            self._add_group(rows[stacked[0][0]], len(stacked))
            for owner, i in stacked:
                row = rows[owner]
                apart = (1, 1) if row.left else (row.step, row.out_step)
                self.within.append((i * apart[0] * size, i * apart[1] * size))
                self.pinned.append(row.C + 4 * i * row.C_n if row.C else 0)
                self.owners.append(owner)
        self.pieces = self._pieces()

    def _add_group(self, row: Row, n: int) -> None:
        BR, KB, length = (self.options[name] for name in ("BR", "KB", "LENGTH"))
        blocks, parts = -(-row.k // KB), -(-row.d // length)
        sums = self.scratch
        total = sums + (blocks * parts * BR * KB if parts > 1 else 0)
        energy = total + blocks * BR * KB
        where = (row.basis, row.basis_d, row.basis_k, row.d, row.k, n, len(self.owners))
        steps = (row.step, row.out_step, row.C_k, length)
        self.groups.append(Group(*where, *steps, sums, total, energy, self.counters))
        self.scratch = energy + (parts + blocks) * BR
        self.counters += 1 + blocks

    def _pieces(self) -> list[tuple[int, int, int]]:
        """(group, block of columns or −1, part), in the order that programs draw them.

        Sums run `lead` pieces ahead. Groups that share a basis go side by side,
        so that its columns are read from memory once.
        """
        KB, BD, whole = (self.options[name] for name in ("KB", "BD", "WHOLE"))
        due: list[tuple[int, tuple[int, int, int]]] = []
        summed = 0
        for _, same in groupby(range(len(self.groups)), lambda g: self.groups[g][:5]):
            together = list(same)
            group = self.groups[together[0]]
            blocks, parts = range(-(-group.k // KB)), range(-(-group.d // group.length))
            sums = [(g, b, p) for b, p, g in product(blocks, parts, together)]
            due += [(summed + i, piece) for i, piece in enumerate(sums)]
            summed += len(sums)
            stretches = range(-(-group.d // (group.length if whole else BD)))
            due += [(summed + self.lead, (g, -1, e)) for e, g in product(stretches, together)]
        return [piece for _, piece in sorted(due, key=lambda entry: entry[0])]


def by_tiling(rows: Sequence[Row]) -> list[tuple[dict, list[int]]]:
    """The rows that each launch takes: of one dtype and side, with narrow bases or wide ones.

    Narrow lists take one launch, whose tiling suits the tallest matrix and the widest basis. Of
    wide bases low groups go apart from tall ones: padded rows would cost more than the launch.
    """
    stacked: dict[tuple, int] = {}
    for row in rows:
        stacked[_shared(row)] = stacked.get(_shared(row), 0) + row.n
    heights = [stacked[_shared(row)] if _stacks(row) else row.n for row in rows]
    together: dict[tuple, list[int]] = {}
    for i, row in enumerate(rows):
        kind = (heights[i] <= LOW,) if row.k > WIDE else ()
        alike = (row.code, bool(row.left), kind, unit(row), bool(row.vector))
        together.setdefault(alike, []).append(i)
    return [
        (
            tiling(code, left, max(rows[i].k for i in these), max(heights[i] for i in these))
            | {"UNIT": least, "VECTOR": vector},
            these,
        )
        for (code, left, _, least, vector), these in together.items()
    ]


def tiling(code: int, left: bool, k: int, height: int) -> dict:
    """The kernel's constants and warps, for groups of `height` rows.

    A narrow basis takes one warp: several would repeat each other's products, and more programs
    keep more copies in flight.
    """
    BR = LOW if height <= LOW else MOST
    KB = min(WIDE, max(16, 1 << (k - 1).bit_length()))
    wide = k > WIDE
    sizes = {"BR": BR, "KB": KB, "STAGES": 4, "LENGTH": 4096 if wide else 256}
    warps = 4 if wide else 1 if KB * BR == 256 else max(2, KB * BR // 512)
    launch = {"num_warps": warps, "maxnreg": 200 if warps == 1 else 255}
    return {"CODE": code, "LEFT": left, **sizes, "BD": 32, "WHOLE": not wide, **launch}


def at_once(options: dict) -> int:
    """Programs of a tiling on a multiprocessor, as registers and shared memory allow."""
    if not options["WHOLE"]:
        return 3
    return 10 if options["num_warps"] == 1 else 8 // options["num_warps"]


def _stacks(row: Row) -> bool:
    """Whether a group may hold rows of several matrices: they need the basis alone in common."""
    return row.k > WIDE and not row.left


def _shared(row: Row) -> tuple:
    return row.basis, row.basis_d, row.basis_k, row.d, row.k, row.code, row.left


def _stacked(rows: Sequence[Row], most: int) -> list[list[tuple[int, int]]]:
    """(matrix, row of it) in groups of at most `most`."""
    together: dict[tuple, list[tuple[int, int]]] = {}
    for owner, row in enumerate(rows):
        key = _shared(row) if _stacks(row) else (owner,)
        together.setdefault(key, []).extend((owner, i) for i in range(row.n))
    return [
        found[start : start + most]
        for found in together.values()
        for start in range(0, len(found), most)
    ]
