"""Compiled loops without a GPU: what a warp's instructions are, and how long they keep it.

The assembler writes into each instruction how long to stall, which scoreboard it sets and which it
waits for. Played through with a latency for whatever is not fixed, they give the cycles of a loop's
iteration for a warp alone on its scheduler. That is a model, good to about a fifth for loops bound
by issue or latency; bank conflicts, and which warp a scheduler takes next, are not in it.
"""

import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

FIRST = re.compile(r"\s+/\*([0-9a-f]{4,5})\*/\s+(.*?)\s*;\s+/\* 0x([0-9a-f]{16}) \*/")
SECOND = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/")
BACK = re.compile(r"\bBRA(?:\.\S+)?\s+(?:.*?,\s*)?`?\(?\.?(0x[0-9a-f]+)")
PREDICATE = re.compile(r"^@!?U?P\w+\s+")

# Cycles until a result is there, by the start of the opcode; the first that fits.
LATENCIES = {
    "LDSM": 33,
    "LDS": 29,
    "STS": 10,
    "SHFL": 25,
    "MUFU": 30,
    "S2R": 30,
    "LDC": 40,
    "I2F": 20,
    "LD.": 200,  # a generic load: another block's shared memory (180 measured, arXiv 2402.13499)
}
OTHER = 25
# Cycles that an instruction holds the warp itself.
HOLDS = {
    "BAR": 22,
    "WARPGROUP.DEPBAR": 60,
    "UCGABAR_WAIT": 200,
    "MEMBAR.ALL.GPU": 500,  # until all that the warp has stored is seen
    "MEMBAR.SC.GPU": 500,
}
OPERANDS_READ = 12  # until a store has read its registers
COPY = ("LDGSTS",)
BULK = ("UBLKCP", "UTMALDG")


class Latency(NamedTuple):
    """Of what leaves the multiprocessor, in cycles."""

    memory: float  # asynchronous copies
    l2: float  # plain loads


@dataclass(frozen=True)
class Instruction:
    at: int
    text: str
    stall: int = 1
    sets: int = 7  # a scoreboard of 0 to 5; 7 is none
    reads: int = 7  # the one that is freed when the operands have been read
    waits: int = 0  # a bit for each

    @property
    def op(self) -> str:
        return PREDICATE.sub("", self.text).split()[0]

    @property
    def wide(self) -> int:
        """Bytes a thread of a load, a store or a copy."""
        sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
        return next((sizes[part] for part in self.op.split(".") if part in sizes), 4)


@dataclass
class Loop:
    """A loop with those inside it; `code` holds theirs too."""

    code: list[Instruction]
    inner: list["Loop"] = field(default_factory=list)

    @property
    def own(self) -> list[Instruction]:
        """Its code without that of the loops inside it."""
        inside = {i.at for loop in self.inner for i in loop.code}
        return [i for i in self.code if i.at not in inside]

    def has(self, mark: str) -> bool:
        """`"HMMA|HGMMA"`: an opcode begins with either; `"!STG"`: none does."""
        starts = tuple(mark.lstrip("!").split("|"))
        return any(i.op.startswith(starts) for i in self.code) != mark.startswith("!")


def parsed(sass: str) -> dict[str, list[Instruction]]:
    """The instructions of each kernel in what `cuobjdump -sass` writes."""
    found: dict[str, list[Instruction]] = {}
    name, pending = "", None
    for line in sass.splitlines():
        if m := re.search(r"Function : (\S+)", line):
            name = m[1]
        elif m := FIRST.match(line):
            pending = int(m[1], 16), m[2]
        elif (m := SECOND.match(line)) and pending:
            control = int(m[1], 16) >> 41
            bits = control & 15, control >> 5 & 7, control >> 8 & 7, control >> 11 & 63
            found.setdefault(name, []).append(Instruction(*pending, *bits))
            pending = None
    return found


@cache
def cuobjdump() -> Path:
    """Triton's wheel carries one."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def disassembled(cubin: Path) -> dict[str, list[Instruction]]:
    done = subprocess.run([cuobjdump(), "-sass", cubin], capture_output=True, text=True, check=True)
    return parsed(done.stdout)


def nest(code: Sequence[Instruction]) -> Loop:
    """A kernel's loops, as the inner ones of a loop that is all of it."""
    place = {i.at: n for n, i in enumerate(code)}
    starts = ((m, n) for n, i in enumerate(code) if (m := BACK.search(i.text)))
    spans = {(place[start], n) for m, n in starts if (start := int(m[1], 16)) in place}
    whole = Loop(list(code))
    open_: list[tuple[int, Loop]] = [(len(code), whole)]
    for start, end in sorted(spans, key=lambda span: (span[0], -span[1])):
        body = list(code[start : end + 1])
        # Code set aside behind the kernel's end jumps back too.
        if start >= end or any(i.text == "EXIT" for i in body):
            continue
        while open_[-1][0] < end:
            open_.pop()
        loop = Loop(body)
        open_[-1][1].inner.append(loop)
        open_.append((end, loop))
    return whole


class Played(NamedTuple):
    cycles: float  # of an iteration
    in_flight: float  # bytes a warp has asked for and not yet waited for, at most
    waits: bool  # for copies


def played(code: Sequence[Instruction], latency: Latency, rounds: int = 60) -> Played:
    """An iteration in the steady state, for a warp that has its scheduler for itself.

    With `rounds=1` once through, from nothing.
    """
    now, copied = 0.0, 0.0  # when the last copy arrives
    board, asked = [0.0] * 6, [0] * 6
    groups: list[tuple[float, int]] = []  # of copies: when all have arrived, and their bytes
    ungrouped = most = 0
    waits = any(i.op.startswith("DEPBAR") for i in code)
    marks = [0.0]
    for _ in range(rounds):
        for i in code:
            o = i.op
            for s in range(6):
                if i.waits >> s & 1:
                    now, asked[s] = max(now, board[s]), 0
            if o.startswith("DEPBAR") and (m := re.search(r"SB0, 0x([0-9a-f]+)", i.text)):
                done = max(0, len(groups) - int(m[1], 16))
                now = max([now, *(arrived for arrived, _ in groups[:done])])
                groups = groups[done:]
            now += next((v for k, v in HOLDS.items() if o.startswith(k)), 0)
            if o.startswith(COPY):
                copied, ungrouped = now + latency.memory, ungrouped + 32 * i.wide
            if o.startswith("LDGDEPBAR"):
                groups.append((max(copied, now), ungrouped))
                ungrouped = 0
            plain = o.startswith("LDG.") or o == "LDG"
            if i.sets < 6:
                fixed = next((v for k, v in LATENCIES.items() if o.startswith(k)), OTHER)
                board[i.sets] = max(board[i.sets], now + (latency.l2 if plain else fixed))
                asked[i.sets] += 32 * i.wide if plain else 0
            if i.reads < 6:
                board[i.reads] = max(board[i.reads], now + OPERANDS_READ)
            most = max(most, sum(asked) + sum(size for _, size in groups) + ungrouped)
            now += max(1, i.stall)
        marks.append(now)
    first = rounds // 2
    return Played((marks[-1] - marks[first]) / (rounds - first), most, waits)


def units(code: Iterable[Instruction], mma: float, fp64: float) -> Counter:
    """Cycles for which a warp's instructions hold each unit of its scheduler.

    `mma`, `fp64`: cycles of one such instruction. A multiprocessor's shared memory gives its four
    schedulers 128 bytes a cycle together, 32 each: a cycle for each byte a thread.
    """
    used: Counter = Counter()
    for i in code:
        o = i.op
        used["issue"] += 1
        if o.startswith("HMMA"):
            used["mma"] += mma
        elif m := re.match(r"HGMMA\.64x(\d+)x(\d+)", o):  # all four schedulers together
            rate = 1024 if "TF32" in o else 2048  # products a cycle
            used["mma"] += 64 * int(m[1]) * int(m[2]) / rate
        elif m := re.match(r"DMMA\.(\d+)x(\d+)x(\d+)", o):  # at twice the rate of DFMA, 32 products
            used["fp64"] += int(m[1]) * int(m[2]) * int(m[3]) * fp64 / 64
        elif o.startswith(("DFMA", "DADD", "DMUL", "DSETP")):
            used["fp64"] += fp64
        elif o.startswith(("LDSM", "STSM")):
            used["shared"] += 4 * int(o[-1] if o[-1] in "24" else 1)
        elif o.startswith(("LDS", "STS", *COPY)):
            used["shared"] += i.wide
    return used


def widths(code: Sequence[Instruction]) -> dict[str, dict[str, int]]:
    """How many of each width in bytes a thread; what stays inside the block is left out."""
    kinds = {
        "copies": (*COPY, *BULK),
        "loads": ("LDG.",),
        "stores": ("STG.", "UTMASTG", "UBLKSTG"),
        "remote": ("LD.", "ST."),  # of a cluster's other blocks
    }
    found: dict[str, Counter] = {kind: Counter() for kind in kinds}
    for i in code:
        for kind, starts in kinds.items():
            if i.op.startswith(starts):
                bulk = i.op.startswith((*BULK, "UTMASTG", "UBLKSTG"))
                found[kind]["bulk" if bulk else str(i.wide)] += 1
    return {kind: dict(counts) for kind, counts in found.items() if counts}


def barriers(code: Iterable[Instruction]) -> int:
    """Of a block or a cluster."""
    return sum(i.op.startswith(("BAR.", "UCGABAR_WAIT")) for i in code)
