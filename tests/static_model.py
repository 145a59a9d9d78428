"""How long a launch should take, from its code and from what it must move. Predicted, not measured.

    t = max(memory, L2, loops, stages)                                             seconds
    memory = (once + again (1 − hit)) / copy bandwidth;  hit = min(1, L2 size / resident)
    L2     = bytes asked of it / its bandwidth
    loops  = cycles of the longest chain of items / clock

A slot is a place for a program (or a cluster of blocks) on the chip: as many as registers, shared
memory and warps leave. An item, a strip for instance, takes `cycles(loop)` of its loop, where

    cycles(loop) = max(alone(loop), warps on a scheduler · busiest unit of it)
    alone(loop)  = once(loop) + Σ over inner (times · alone(inner) − once(inner))

where `once` is an iteration of a warp that has its scheduler for itself, each inner loop gone round
once, and a unit's time the sum over instructions, times how often each is run.

`hit` is for a walk and its way back over `resident` bytes: what was read last is met first.
What it leaves out: the launch, bank conflicts, and that the three may get in each other's way.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from .issue_model import (
    COPY,
    Instruction,
    Latency,
    Loop,
    Played,
    barriers,
    nest,
    played,
    units,
    widths,
)


@dataclass(frozen=True)
class Chip:
    """Assumed figures."""

    name: str
    multiprocessors: int
    clock: float  # Hz
    copy: float  # bytes/s read and written together, of a large copy
    l2: float  # bytes/s
    l2_size: float  # bytes
    shared: int  # bytes a multiprocessor
    shared_block: int  # bytes a block may have
    mma: float  # cycles of one HMMA on its scheduler
    fp64: float
    warps: int = 64  # a multiprocessor
    blocks: int = 32
    memory_latency: float = 700  # cycles
    l2_latency: float = 280
    clusters: bool = True  # of blocks that see each other's shared memory


# H100 (SXM): copy, L2 and clock as the kernels were first reviewed with; none is measured here.
# A100: copy 89 % of the peak, measured on an A800; L2 by H100's bytes a cycle and multiprocessor.
# B200: 148 multiprocessors at about H100's clock (chipsandcheese.com), L2 of 126.5 MB, copy 92 %
# (torchao's roofline) of 7.67 TB/s; its L2 bandwidth, that of two H100, is a guess. An HMMA takes
# what 63 % of wgmma's rate leaves on H100 (arXiv 2402.13499); the same on B200 is a guess.
CHIPS = {
    80: Chip("A100", 108, 1.41e9, 1.7e12, 3.6e12, 40e6, 164 << 10, 163 << 10, 8, 4, clusters=False),
    89: Chip("RTX 4090", 128, 2.5e9, 0.92e12, 5e12, 72e6, 100 << 10, 99 << 10, 8, 64, 48, 24),
    90: Chip("H100", 132, 1.755e9, 3.0e12, 5.5e12, 50e6, 228 << 10, 227 << 10, 6, 2),
    100: Chip("B200", 148, 1.755e9, 7.0e12, 11e12, 126.5e6, 228 << 10, 227 << 10, 6, 4),
    120: Chip("RTX 5090", 170, 2.4e9, 1.55e12, 6e12, 96e6, 100 << 10, 99 << 10, 8, 64, 48, 24),
}
RESOURCES_ONLY = (89, 120)  # nothing is predicted of them
REGISTERS = 65536  # a multiprocessor
RESERVED = 1024  # bytes of shared memory that each block costs beside its own


@dataclass(frozen=True)
class Named:
    """Which loop of the code this is: the first inner one that has all `marks`.

    Attributes:
        marks: as `Loop.has` reads them, with spaces between.
        inner: those inside it that run; others are branches not taken.
        per: an opcode; the times are then of that instruction, however far the loop is unrolled.
        ahead: iterations between the start of a bulk copy and the wait for it, which the code does
            not show; 0 where there is none.
    """

    name: str
    marks: str = ""
    inner: tuple["Named", ...] = ()
    per: str = ""
    ahead: int = 0

    @property
    def rounds(self) -> int:
        """A kernel's whole code is gone through once, from nothing."""
        return 60 if self.marks else 1


@dataclass(frozen=True)
class Placed:
    """A named loop and its code."""

    named: Named
    loop: Loop
    inner: tuple["Placed", ...]
    others: tuple[Loop, ...]  # inside it, which do not run

    def times(self, item: Mapping[str, float]) -> float:
        """How often its code, unrolled or not, goes round in one round of what is around it."""
        times = item.get(self.named.name, 1)
        if self.named.per:
            times /= sum(i.op.startswith(self.named.per) for i in self.loop.code)
        return times

    @property
    def within(self) -> list["Placed"]:
        """All named loops inside it, however deep."""
        return [x for p in self.inner for x in (p, *p.within)]


def placed(named: Named, among: Sequence[Loop]) -> Placed:
    """Raises LookupError if no loop has the marks."""
    for loop in among:
        if all(loop.has(mark) for mark in named.marks.split()):
            break
    else:
        seen = "; ".join(f"{x.code[0].at:#x}, {len(x.code)} long" for x in among) or "none"
        raise LookupError(f"no loop has the marks {named.marks!r} of {named.name!r} among: {seen}")
    left, inner = list(loop.inner), []
    for child in named.inner:
        inner.append(placed(child, left))
        left.remove(inner[-1].loop)
    return Placed(named, loop, tuple(inner), tuple(left))


Item = Mapping[str, float]  # how often each named loop runs


@dataclass(frozen=True)
class Work:
    """What a launch is given to do."""

    tensor: float  # bytes of what is projected; a copy of it is what the launch is compared with
    once: float  # bytes that must come from memory or go there
    again: float  # bytes read another time, from L2 if they are still there
    resident: float  # bytes between a first and a last use, of all programs at a time
    l2: float  # bytes asked of the L2 cache, reads and writes
    items: Sequence[Item]
    programs: int  # or clusters, in the grid
    loop: Named
    """That an item goes round once; without marks, all of the kernel."""
    in_turn: bool = True
    """Programs take every so-many-th item; else whoever is free takes the next."""
    blocks: int = 1  # of a cluster
    warps: int = 0  # of a block, that go round `loop`; 0 for all
    stages: Callable[[float], float] | None = None
    """Cycles of the launch, from those of an item, where stages wait for each other."""
    bulk: float = 0  # bytes of bulk copies on their way to a block, which the code does not show


@dataclass(frozen=True)
class Resources:
    registers: int
    shared: int  # bytes a block
    spilled: int
    threads: int  # a block


def slots(used: Resources, chip: Chip) -> int:
    """Blocks on a multiprocessor."""
    registers = 8 * ceil(used.registers / 8) * used.threads
    limits = (
        REGISTERS // registers,
        chip.shared // (used.shared + RESERVED),
        chip.warps * 32 // used.threads,
        chip.blocks,
    )
    return min(limits)


class Timed:
    """The loops of one kernel: a warp alone with its latencies, and the units that all share."""

    def __init__(self, chip: Chip, latency: Latency):
        self.chip, self.latency = chip, latency
        self.kept: dict[tuple, Played] = {}

    def played(self, loop: Loop, rounds: int = 60) -> Played:
        key = loop.code[0].at, len(loop.code)
        if key not in self.kept:
            self.kept[key] = played(loop.code, self.latency, rounds)
        return self.kept[key]

    def once(self, at: Placed) -> float:
        waits = self.latency.memory / at.named.ahead if at.named.ahead else 0.0
        return max(self.played(at.loop, at.named.rounds).cycles, waits)

    def alone(self, at: Placed, item: Item) -> float:
        total = self.once(at) - sum(self.played(loop).cycles for loop in at.others)
        for child in at.inner:
            total += child.times(item) * self.alone(child, item) - self.once(child)
        return max(0.0, total)

    def shared(self, at: Placed, item: Item) -> Counter:
        used = units(at.loop.own, self.chip.mma, self.chip.fp64)
        for child in at.inner:
            for unit, cycles in self.shared(child, item).items():
                used[unit] += child.times(item) * cycles
        return used

    def in_flight(self, at: Placed, item: Item) -> float:
        """Bytes that a warp has asked for at most, in the loop that asks for most."""
        found = self.played(at.loop)
        if not found.waits:  # for copies: all are begun before any is waited for
            copies = sum(32 * i.wide for i in at.loop.code if i.op.startswith(COPY))
            return max(found.in_flight if not copies else 0, copies * at.times(item))
        return found.in_flight


def longest(each: Sequence[float], programs: int, places: int, in_turn: bool) -> float:
    """Cycles until the last item is done: in turn, or each in whichever place is free first."""
    if in_turn:
        return ceil(programs / places) * max(sum(each[i::programs]) for i in range(programs))
    free = [0.0] * min(programs, places)
    for cycles in each:
        heapq.heapreplace(free, free[0] + cycles)
    return max(free)


def predicted(code: Sequence[Instruction], used: Resources, work: Work, chip: Chip) -> dict:
    """All that a launch's code and work tell of it."""
    hit = min(1.0, chip.l2_size / work.resident)
    far = hit * chip.l2_latency + (1 - hit) * chip.memory_latency
    fit = slots(used, chip)
    together = min(fit, ceil(work.programs * work.blocks / chip.multiprocessors))
    whole = nest(code)
    at = placed(work.loop, whole.inner if work.loop.marks else [whole])
    warps = together * (work.warps or used.threads / 32)
    timed = Timed(chip, Latency(chip.memory_latency, far))
    bounds: dict[tuple, dict[str, float]] = {}
    for item in work.items:
        if (key := tuple(item.items())) not in bounds:
            each = timed.shared(at, item)
            bounds[key] = {unit: warps / 4 * cycles for unit, cycles in each.items()}
            bounds[key]["latency"] = timed.alone(at, item)
    items = [bounds[tuple(item.items())] for item in work.items]
    slowest = max(items, key=lambda item: max(item.values()))
    places = max(1, chip.multiprocessors * fit // work.blocks)
    chain = longest([max(item.values()) for item in items], work.programs, places, work.in_turn)
    memory = work.once + work.again * (1 - hit)
    seconds = {
        "memory": memory / chip.copy,
        "L2": work.l2 / chip.l2,
        max(slowest, key=slowest.get): chain / chip.clock,
    }
    if work.stages is not None:
        seconds["stages"] = work.stages(max(slowest.values())) / chip.clock
    limit = max(seconds, key=seconds.get)
    total = seconds[limit]
    inside = at.within or [at]
    tiles = [i for p in inside for i in p.loop.own]
    asked = warps * max(timed.in_flight(p, work.items[0]) for p in inside if not p.inner)
    return {
        "programs_at_once": together,
        **widths(tiles),
        "barriers_a_tile": barriers(tiles),
        "barriers_a_strip": barriers(at.loop.own),
        "bytes_in_flight": round(max(asked, together * work.bulk)),
        "l2_per_byte": round(work.l2 / work.tensor, 2),
        "memory_per_byte": round(memory / work.tensor, 2),
        "cycles_a_tile": {p.named.name: round(timed.once(p)) for p in inside},
        "cycles_a_strip": {unit: round(cycles) for unit, cycles in slowest.items()},
        "floor_us": float(f"{work.once / chip.copy * 1e6:.3g}"),
        "us": {unit: float(f"{t * 1e6:.3g}") for unit, t in seconds.items()},
        "predicted_us": float(f"{total * 1e6:.3g}"),
        "predicted_share_of_copy": float(f"{2 * work.tensor / chip.copy / total:.3g}"),
        "limit": limit,
    }
