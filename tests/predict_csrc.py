"""What the cluster kernel should reach on an H100, from its machine code.

python -m tests.predict_csrc MODEL        prints a JSON object for each case

MODEL is a static issue model with `kernels(cubin)`, `loops(code)` and `cycles(body, memory, l2)`,
an iteration's for one warp a scheduler. Each kernel's multiply loop gives the cycles of its two
products; all clusters are then simulated, strip by strip, on one memory that serves what is asked
for in turn. Predicted, never measured: good to about a fifth.
"""

import argparse
import importlib.util
import json
import re
import subprocess
import tempfile
from collections import deque
from collections.abc import Iterator
from heapq import heappop, heappush
from itertools import count
from pathlib import Path

from grasp_kernels.project_cuda import Plan, plan

CSRC = Path(__file__).parent.parent / "csrc"
CLOCK, PROCESSORS, COPY, L2 = 1.755e9, 132, 3.0e12, 5.5e12  # an H100; copy counts both ways
PER_CYCLE = COPY / CLOCK
LATENCY = 900  # cycles until a copy begins to come, under load
SEND = 600  # from a block to another and its flag
ADD = 500  # from the last share to the first total
MATRIX = 6.5  # cycles of m16n8k16, or of m16n8k8 in tf32: 62 % of what wgmma reaches
CASES = [  # side, stored shape, bytes an element, k
    *(("right", (16384, 4096), 2, k) for k in (16, 64)),
    ("right", (16384, 8192), 2, 64),
    ("right", (16384, 16384), 2, 16),
    *(("right", (16384, 4096), 4, k) for k in (16, 64)),
    *(("left", (4096, 14336), 2, k) for k in (16, 64)),
    *(("left", (14336, 4096), 2, k) for k in (16, 64)),
    *(("left", (8192, 28672), 2, k) for k in (16, 64)),
]


def compiled(keys: list[tuple[int, str, Plan]], folder: Path) -> tuple[Path, str]:
    """A cubin of these kernels, and what ptxas says of them."""
    lines = "\n".join(
        f"template __global__ void kernel<{'bf16' if size == 2 else 'float'}, "
        f"{str(side == 'left').lower()}, {p.kp}, {p.slice}, {p.strip}>"
        "(const __grid_constant__ Job);"
        for size, side, p in keys
    )
    source = folder / "kernels.cu"
    source.write_text(
        f'#include "{CSRC}/project.cuh"\n'
        "namespace grasp {\n"
        "template <typename T, bool LEFT, int KP, int SLICE, int BS>\n"
        "__global__ void __launch_bounds__(Strips<T, LEFT, KP, SLICE, BS>::THREADS, 1)\n"
        "    kernel(const __grid_constant__ Job job) {\n"
        "  extern __shared__ __align__(128) char shared[];\n"
        "  Strips<T, LEFT, KP, SLICE, BS>(job, shared, blockIdx.x, gridDim.x).run();\n"
        f"}}\n{lines}\n}}\n"
    )
    out = folder / "kernels.cubin"
    done = subprocess.run(
        ["nvcc", "-cubin", "-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a"]
        + ["-Xptxas", "-v", "-o", out, source],
        check=True,
        capture_output=True,
        text=True,
    )
    return out, done.stderr


def mangled(size: int, side: str, p: Plan) -> str:
    dtype = "13__nv_bfloat16" if size == 2 else "f"
    return f"I{dtype}Lb{int(side == 'left')}ELi{p.kp}ELi{p.slice}ELi{p.strip}E"


def multiply_loop(model, code: list[dict]) -> list[dict]:
    """The shortest loop that holds every matrix instruction."""

    def matrix(body):
        return sum("HMMA" in i["text"] for i in body)

    return min((b for b in model.loops(code) if matrix(b) == matrix(code)), key=len)


def strip_cycles(model, body: list[dict]) -> dict[str, float]:
    """Of both products, what one strip takes of each unit; two warps share a scheduler."""
    matrix = sum("HMMA" in i["text"] for i in body)
    wide = sum("LDSM" in i["text"] or "STSM" in i["text"] for i in body) * 4  # 512 bytes each
    narrow = sum(bool(re.search(r"\b(LDS|STS)\b", i["text"])) for i in body)
    return {
        "latency": model.cycles(body, 700, 280),
        "issue": 2 * len(body),
        "matrix": 2 * matrix * MATRIX,
        "shared": 8 * (wide + 2 * narrow),
    }


class Memory:
    """Serves pieces of what is asked for in turn; no block takes more than 32 bytes a cycle."""

    PIECE = 16384

    def __init__(self, clock: "Clock", blocks: int):
        self.clock, self.gap = clock, self.PIECE / (32 * blocks)
        self.asked: deque = deque()
        self.busy = False

    def ask(self, size: float, done: "Event", latency: float) -> None:
        self.asked.append([size, 0.0, done, latency])
        if not self.busy:
            self.busy = True
            self.clock.start(self.serve())

    def serve(self) -> Iterator[float]:
        while self.asked:
            ready = [a for a in self.asked if a[1] <= self.clock.now]
            if not ready:
                yield min(a[1] for a in self.asked) - self.clock.now
                continue
            piece = ready[0]
            self.asked.remove(piece)
            yield self.PIECE / PER_CYCLE
            piece[0] -= self.PIECE
            piece[1] = self.clock.now + self.gap
            if piece[0] > 0:
                self.asked.append(piece)
            else:
                self.clock.start(later(piece[2], piece[3]))
        self.busy = False


class Event:
    def __init__(self, clock: "Clock"):
        self.clock, self.set, self.waiting = clock, False, []

    def happen(self) -> None:
        self.set = True
        for process in self.waiting:
            self.clock.start(process)


def later(event: Event, after: float) -> Iterator[float]:
    yield after
    event.happen()


class Clock:
    """Processes yield a time to pass or an event to wait for."""

    def __init__(self):
        self.now, self.queue, self.order = 0.0, [], count()

    def start(self, process: Iterator, at: float | None = None) -> None:
        heappush(self.queue, (self.now if at is None else at, next(self.order), process))

    def run(self) -> float:
        while self.queue:
            self.now, _, process = heappop(self.queue)
            wish = next(process, None)
            if isinstance(wish, Event):
                if wish.set:
                    self.start(process)
                else:
                    wish.waiting.append(process)
            elif wish is not None:
                self.start(process, self.now + wish)
        return self.now


def simulate(p: Plan, size: int, strips: int, product: float, basis: float) -> float:
    """Cycles of a launch; `product` of one product of a strip, `basis` until it is kept."""
    clock = Clock()
    clusters = min(strips, 128 // p.blocks)  # a GPC of 16 or 18 processors holds 16 in clusters
    memory = Memory(clock, p.blocks)
    size_of_strip = p.blocks * p.width * p.strip * size

    def cluster(mine: int, begins: float) -> list[Iterator]:
        full, summed, done = ([Event(clock) for _ in range(mine)] for _ in range(3))

        def move():
            yield begins
            for i in range(min(p.stages, mine)):
                memory.ask(size_of_strip, full[i], LATENCY)
            for i in range(mine):
                yield done[i]
                written = Event(clock)
                memory.ask(size_of_strip, written, 300)
                yield written
                if i + p.stages < mine:
                    memory.ask(size_of_strip, full[i + p.stages], LATENCY)

        def multiply():
            yield begins + basis
            sent = kept = 0
            while kept < mine:
                if sent < mine and (sent == kept or (sent == kept + 1 and full[sent].set)):
                    yield full[sent]
                    yield product
                    clock.start(later(summed[sent], 2 * SEND + ADD))
                    sent += 1
                else:
                    yield summed[kept]
                    yield product
                    done[kept].happen()
                    kept += 1

        return [move(), multiply()]

    for i in range(clusters):
        for process in cluster(len(range(i, strips, clusters)), 137 * i % 1500):
            clock.start(process)
    return clock.run()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("model", type=Path, help="the issue model, a Python file")
    given = options.parse_args()
    spec = importlib.util.spec_from_file_location("issue_model", given.model)
    model = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(model)
    cases = []
    for side, shape, size, k in CASES:
        d, n = shape if side == "left" else shape[::-1]
        cases.append((side, shape, size, k, d, n, plan(size, d, k, 227 << 10)))
    keys = list(dict.fromkeys((size, side, p) for side, _, size, _, _, _, p in cases if p))
    with tempfile.TemporaryDirectory() as folder:
        cubin, said = compiled(keys, Path(folder))
        code = model.kernels(cubin)
    for side, shape, size, k, d, n, p in cases:
        row = {"side": side, "shape": shape, "bytes": size, "k": k}
        if p is None:
            print(json.dumps({**row, "refused": "does not fit"}))
            continue
        name = next(name for name in code if mangled(size, side, p) in name)
        body = multiply_loop(model, code[name])
        units = strip_cycles(model, body)
        about = said[said.index(f"function '{name}'") :]
        strips = -(-n // p.strip)
        clusters = min(strips, 128 // p.blocks)
        basis = 1500 + clusters * d * k * 4 / (L2 / CLOCK)
        cycles = simulate(p, size, strips, max(units.values()) / 2, basis)
        moved = 2 * n * d * size
        row |= {
            "cluster": p.blocks,
            "slice": p.width,
            "strip": p.strip,
            "stages": p.stages,
            "registers": int(re.search(r"Used (\d+) registers", about)[1]),
            "spilled": int(re.search(r"(\d+) bytes spill stores", about)[1]),
            "shared": p.bytes,
            "blocks a multiprocessor": 1,
            "in flight": (p.stages - 1) * p.strip * p.width * size,
            "barriers a strip": sum(bool(re.search(r"\bBAR\.", i["text"])) for i in body),
            "memory bytes a byte of T": round(2 + 4 * k / (size * n), 3),
            "L2 bytes a byte of T": round(2 + clusters * 4 * k / (size * n), 3),
            "sent a byte of T": round(
                (4 + size)
                * p.strip
                * p.kp
                * (p.blocks - 1)
                / p.blocks
                / (p.strip * p.width * size),
                3,
            ),
            "cycles a strip": {unit: round(c) for unit, c in units.items()},
            "cycles at copy": round(2 * p.strip * p.width * size / (PER_CYCLE / PROCESSORS)),
            "predicted share of copy": round(moved / PER_CYCLE / cycles, 3),
        }
        print(json.dumps(row))


if __name__ == "__main__":
    main()
