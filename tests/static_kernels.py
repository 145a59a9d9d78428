"""What every kernel should do on a GPU, predicted from its compiled code: no GPU is needed.

python -m tests.static_kernels --table                      all that is predicted, to be read
python -m tests.static_kernels --out FILE.json              the same, a configuration a line
python -m tests.static_kernels --arch 90 --only project     some of it
python -m tests.static_kernels --only NAME --loops          the loops, for who adds a kernel
python -m tests.static_kernels --resources                  every configuration that can be launched

`kernel_cases/` has the kernels, `static_model.py` the formulas and what is assumed of each GPU.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context

from .issue_model import Latency, Loop, nest, played, widths
from .kernel_cases import FAMILIES
from .kernel_cases.shapes import Case
from .static_model import CHIPS, RESOURCES_ONLY, predicted

COLUMNS = {  # of the table: heading, and what is in it
    "chip": lambda r: r["chip"],
    "kernel": lambda r: r["kernel"],
    "case": lambda r: r["case"],
    "registers": lambda r: r["registers"],
    "shared KiB": lambda r: round(r["shared"] / 1024, 1),
    "spilled": lambda r: r["spilled"],
    "programs": lambda r: r.get("programs_at_once", ""),
    "copies": lambda r: _by_width(r.get("copies", {})),
    "loads": lambda r: _by_width(r.get("loads", {})),
    "in flight KiB": lambda r: round(r["bytes_in_flight"] / 1024, 1) if "limit" in r else "",
    "barriers": lambda r: r.get("barriers_a_tile", ""),
    "L2": lambda r: r.get("l2_per_byte", ""),
    "memory": lambda r: r.get("memory_per_byte", ""),
    "cycles a strip": lambda r: max(r["cycles_a_strip"].values()) if "limit" in r else "",
    "floor µs": lambda r: r.get("floor_us", ""),
    "µs": lambda r: r.get("predicted_us", ""),
    "% of copy": lambda r: f"{100 * r['predicted_share_of_copy']:.3g}" if "limit" in r else "",
    "limit": lambda r: r.get("limit", ""),
}

TOLD = (  # opcodes that tell one loop from another
    *("LDGSTS", "UBLKCP", "UTMALDG", "LDG", "STG", "LD", "ST", "LDSM", "LDS", "STS"),
    *("HMMA", "HGMMA", "DMMA", "DFMA", "MUFU", "BAR", "SYNCS"),
)


def _by_width(counts: dict[str, int]) -> str:
    return " + ".join(f"{n} of {width}" for width, n in counts.items())


def row(task: tuple[int, str, Case]) -> dict:
    """A configuration and what is predicted of it, or why nothing can be."""
    arch, family, case = task
    head = {"arch": arch, "chip": CHIPS[arch].name, "kernel": family, "case": case.name}
    try:
        compiled = case.job.run(arch)
        found = head | asdict(compiled.used)
        if arch not in RESOURCES_ONLY:
            found |= predicted(compiled.code, compiled.used, case.work, CHIPS[arch])
    except (LookupError, RuntimeError, OSError) as error:
        return head | {"failed": str(error)}
    return found


def loops(task: tuple[int, str, Case]) -> str:
    """Each loop of a kernel, to be named in its case."""
    arch, family, case = task
    chip = CHIPS[arch]
    latency = Latency(chip.memory_latency, chip.l2_latency)

    def lines(loop: Loop, depth: int) -> Iterator[str]:
        kinds: dict[str, int] = {}
        for i in loop.code:
            start = i.op.split(".")[0]
            kinds[start] = kinds.get(start, 0) + 1
        seen = " ".join(f"{n}={kinds[n]}" for n in TOLD if n in kinds)
        cycles = played(loop.code, latency).cycles
        wide = widths(loop.code).get("copies", {})
        yield f"{'  ' * depth}{loop.code[0].at:#x}: {len(loop.code)} long, {cycles:.0f} cycles: "
        yield f"{seen}; copies {_by_width(wide) or 'none'}\n"
        for inner in loop.inner:
            yield from lines(inner, depth + 1)

    whole = nest(case.job.run(arch).code)
    return f"{family} {case.name} {chip.name}\n" + "".join(lines(whole, 0))


def resource_row(task: tuple[int, object]) -> dict:
    arch, job = task
    compiled = job.run(arch)
    return {
        "arch": arch,
        "kernel": job.kernel,
        "options": job.chosen,
        "takes": list(job.takes),
        **asdict(compiled.used),
        "matrix_instructions": sum(map(compiled.ptx.count, ("mma.sync", "wgmma", "tcgen05.mma"))),
        "narrow_copies": len(re.findall(r"cp\.async\.c[ag]\.[^;]*?, 0x4,", compiled.ptx)),
    }


def table(rows: list[dict]) -> str:
    """Markdown, predicted figures named so."""
    lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS)]
    lines += [" | ".join(str(read(r)) for read in COLUMNS.values()) for r in rows]
    return "Predicted, not measured.\n\n" + "\n".join(f"| {line} |" for line in lines)


def versions() -> dict[str, str]:
    import triton

    nvcc = shutil.which("nvcc")
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True) if nvcc else None
    return {
        "triton": triton.__version__,
        "nvcc": said.stdout.split("release ")[1].split(",")[0] if said else "none",
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--arch", type=int, action="append", choices=CHIPS)
    options.add_argument("--only", default="", help="a part of a kernel's or a case's name")
    options.add_argument("--out", help="a JSON file")
    options.add_argument("--table", action="store_true")
    options.add_argument("--loops", action="store_true")
    options.add_argument("--resources", action="store_true")
    options.add_argument("--processes", type=int, default=2)
    given = options.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # kernels are compiled here, not interpreted
    with ProcessPoolExecutor(given.processes, get_context("spawn")) as pool:
        if given.resources:
            jobs = [job for module in FAMILIES.values() for job in module.jobs()]
            tasks = [(arch, job) for arch in given.arch or CHIPS for job in jobs]
            for result in pool.map(resource_row, tasks, chunksize=4):
                print(json.dumps(result, default=str), flush=True)  # of Triton's own types
            return
        wanted = [
            (arch, family, case)
            for arch in given.arch or CHIPS
            for family, module in FAMILIES.items()
            for case in module.cases(CHIPS[arch])
            if given.only in f"{family} {case.name}"
        ]
        if given.loops:
            print("\n".join(pool.map(loops, wanted)))
            return
        rows = list(pool.map(row, wanted))
    failed = [r for r in rows if "failed" in r]
    for r in failed:
        print(f"{r['chip']} {r['kernel']} {r['case']}: {r['failed']}", file=sys.stderr)
    if given.table or not given.out:
        print(table([r for r in rows if r not in failed]))
    if failed:
        raise SystemExit(f"{len(failed)} of {len(rows)} can't be predicted; nothing is written")
    if given.out:
        from grasp.files import write_json  # not in every process

        said = {name: value for name, value in vars(given).items() if value and name != "processes"}
        command = "python -m tests.static_kernels " + " ".join(
            f"--{name}" if value is True else f"--{name} {value}" for name, value in said.items()
        )
        chips = {arch: asdict(chip) for arch, chip in CHIPS.items() if arch not in RESOURCES_ONLY}
        head = {"command": command, "figures": "predicted, not measured", **versions()}
        write_json(given.out, head | {"assumed": list(chips.values()), "runs": rows})


if __name__ == "__main__":
    main()
