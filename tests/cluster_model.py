"""The cluster kernel's launch played out: clusters that share a memory, strip by strip.

Its code says what a strip's products take; whether copies, messages and products overlap is a
matter of when each is ready, which this plays. Latencies are those of a busy H100, guessed.
"""

from collections import deque
from collections.abc import Iterator
from heapq import heappop, heappush
from itertools import count

from grasp_kernels.project_cuda import Plan

LATENCY = 900  # cycles until a copy begins to come, under load
WRITTEN = 300  # until a strip that was written makes room
SEND = 600  # from a block to another and its flag
ADD = 500  # from the last share to the first total


class Memory:
    """Serves pieces of what is asked for in turn; no block takes more than 32 bytes a cycle."""

    PIECE = 16384

    def __init__(self, clock: "Clock", blocks: int, speed: float):
        self.clock, self.gap, self.speed = clock, self.PIECE / (32 * blocks), speed
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
            yield self.PIECE / self.speed
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


def simulated(
    p: Plan, size: int, strips: int, clusters: int, product: float, basis: float, speed: float
) -> float:
    """Cycles of a launch on a memory of `speed` bytes a cycle.

    `size` is an element's bytes, `product` the cycles of one product of a strip, `basis` those
    until it is kept.
    """
    clock = Clock()
    memory = Memory(clock, p.blocks, speed)
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
                memory.ask(size_of_strip, written, WRITTEN)
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
