"""`grasp_kernels/factors_triton.py`: programs draw pieces of sums and of the result."""

from collections.abc import Iterator
from itertools import product
from math import ceil

from ..aot import TritonJob
from ..static_model import Chip, Named, Work
from .shapes import CODES, LISTS, MMA, Case, Factors

TAKES = {
    **dict.fromkeys(("rows", "pinned", "groups"), "*i64"),
    **dict.fromkeys(("pieces", "counters"), "*i32"),
    "scratch": "*fp32",
    "count": "i32",
}
LOOPS = Named("sum", f"{MMA} LDGSTS !STG"), Named("off", f"{MMA} LDGSTS")


def cases(chip: Chip) -> Iterator[Case]:
    from grasp_kernels.factors_layout import Layout, at_once, by_tiling

    for factors in LISTS:
        rows = _rows(factors)
        for chosen, these in by_tiling(rows):
            resident = chip.multiprocessors * at_once(chosen)
            laid = Layout([rows[i] for i in these], chosen, resident)
            pieces = [_piece(laid.groups[g], block, chosen) for g, block, _ in laid.pieces]
            read = sum(size for _, size in pieces)
            tensor = sum(factors.matrices[i].bytes for i in these)
            bases = {factors.basis_of[i]: factors.matrices[i].basis for i in these}
            widest = max(factors.matrices[i].k for i in these)
            part = "" if len(these) == len(rows) else f", {len(these)} of k {widest} or less"
            yield Case(
                factors.name + part,
                _job(chosen),
                Work(
                    tensor=tensor,
                    once=2 * tensor + sum(bases.values()),
                    again=tensor + sum(bases.values()),
                    # Between the sums and what reads the same again.
                    resident=(laid.lead + resident) * read / len(pieces),
                    l2=read,
                    items=[item for item, _ in pieces],
                    programs=min(len(pieces), resident),
                    loop=Named("piece", f"{MMA} STG", LOOPS),
                    in_turn=False,
                ),
            )


def _piece(group, block: int, chosen: dict) -> tuple[dict[str, float], float]:
    """How often each loop of a piece goes round, and the bytes that it reads and writes."""
    KB, BD, length = chosen["KB"], chosen["BD"], min(group.length, group.d)
    if block >= 0:
        return {"sum": ceil(length / BD), "off": 0}, length * 4 * (min(KB, group.k) + group.n)
    if chosen["WHOLE"]:
        return {"sum": 0, "off": ceil(length / BD)}, length * 4 * (group.k + 2 * group.n)
    return {"sum": 0, "off": ceil(group.k / KB)}, BD * 4 * (group.k + 2 * group.n)


def _rows(factors: Factors) -> list:
    from grasp_kernels.matrices import Row

    found = []
    for T, basis in zip(factors.matrices, factors.basis_of, strict=True):
        step = T.d if T.side == "right" else T.n
        known = {"basis": 16 + 16 * basis, "basis_d": ceil(T.k / 4) * 4, "basis_k": 1, "vector": 1}
        known |= {"n": T.n, "d": T.d, "k": T.k, "step": step, "out_step": step}
        known |= {"left": int(T.side == "left")}
        found.append(Row(**{name: known.get(name, 0) for name in Row._fields}))
    return found


def jobs() -> list[TritonJob]:
    from grasp_kernels.factors_layout import WIDE, tiling

    ranks, heights = (16, 32, 64, WIDE + 1), (16, 32)
    return [
        _job({**tiling(*chosen), "UNIT": 16, "VECTOR": True}, {"energies": "*fp32"})
        for chosen in product(CODES.values(), (False, True), ranks, heights)
    ]


def _job(chosen: dict, measured: dict[str, str] | None = None) -> TritonJob:
    kept = {name: value for name, value in chosen.items() if name != "LENGTH"}
    takes = TAKES | (measured or {})
    return TritonJob("grasp_kernels.factors_triton", "factors_kernel", takes, kept)
