"""Bytes that three kernels move and how fast, as the card counts them: by Nsight Compute (`ncu`).

Run as a script with the number of a case, it is what `ncu` looks at.
"""

import csv
import io
import sys

from .inside import Inside, LeftOut, tool

READ, WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"
TIME, SHARE = "gpu__time_duration.sum", "dram__throughput.avg.pct_of_peak_sustained_elapsed"
CACHE = "lts__t_bytes.sum"
CASES = ("right, k 16", "left, k 16", "wide list, a block")
EACH = 25  # seconds


def measure(inside: Inside) -> None:
    ncu = tool("ncu")
    if ncu is None:
        raise LeftOut("ncu is not there")
    inside.each(range(len(CASES)), lambda n: _case(inside, ncu, n), CASES.__getitem__)


def _case(inside: Inside, ncu: str, n: int) -> None:
    command = [ncu, "--csv", "--page", "raw", "--print-units", "base"]
    command += ["--clock-control", "none", "--profile-from-start", "off"]
    command += ["--metrics", ",".join((READ, WRITTEN, TIME, SHARE, CACHE))]
    command += [sys.executable, "-m", "gpu.counters", str(n), inside.kind]
    done = inside.under(command, CASES[n], EACH)
    if done is None:
        return
    if "ERR_NVGPUCTRPERM" in done.stdout:
        raise LeftOut("ncu may not read the card's counters here")
    kernels = kernels_of(done.stdout)
    if not kernels and inside.tiny:
        raise LeftOut("a rehearsal launches no kernel")
    if not kernels:
        said = [x for x in done.stdout.splitlines() if "==ERROR==" in x or "ERR_" in x]
        raise RuntimeError((said or [f"ncu counted nothing, exit status {done.returncode}"])[0])
    about = next(x for x in done.stdout.splitlines() if x.startswith("case "))
    floor = int(about.split()[-1])
    seconds = sum(k[TIME] for k in kernels) / 1e9
    moved = sum(k[READ] + k[WRITTEN] for k in kernels)
    inside.add(
        case=CASES[n],
        kernels=kernels,
        bytes=moved,
        floor_bytes=floor,
        over_floor=moved / floor,
        GBps=moved / seconds / 1e9 if seconds else float("nan"),
        us=1e6 * seconds,
    )


def kernels_of(said: str) -> list[dict]:
    """One for each launch, from the table that `ncu --csv --page raw` prints under what it says."""
    table = "\n".join(x for x in said.splitlines() if x.startswith('"'))
    rows = list(csv.DictReader(io.StringIO(table)))[1:]  # the first holds the units
    metrics = (READ, WRITTEN, TIME, SHARE, CACHE)
    return [
        {"kernel": row["Kernel Name"][:80]}
        | {m: float(row[m].replace(",", "")) for m in metrics if row.get(m)}
        for row in rows
    ]


def counted(n: int, kind: str) -> None:
    """One call, between the profiler's start and stop; says how many bytes it has to move."""
    import bench_project as bench
    import harness
    import torch

    import grasp_kernels as gk

    device = torch.device(kind)
    if n == 2:
        model = "tiny" if kind == "cpu" else "8B"
        Ts, Us = bench.factors(model, "A", bench.WIDE, device, 1)
        run = gk.Projector(Ts, Us)
        floor = 2 * harness.nbytes(Ts) + harness.nbytes(bench.distinct(Us))
    else:
        side, shape = (("right", (16384, 4096)), ("left", (4096, 14336)))[n]
        T, U = bench.Matrix(side, *shape, torch.bfloat16, 16).made(device)
        floor = 2 * harness.nbytes([T])

        def run():
            gk.project_(T, U, side=side)

    run()
    if kind == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        run()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    print(f"case {CASES[n]}: {floor}")


if __name__ == "__main__":
    counted(int(sys.argv[1]), sys.argv[2])
