"""Everything that needs a GPU, in one command that nobody has to watch.

    python benchmarks/gpu_check.py [--limit 540] [--out FOLDER]
    python benchmarks/gpu_check.py --part matrices --part lists
    python benchmarks/gpu_check.py --picture FOLDER/gpu_check.jsonl
    python benchmarks/gpu_check.py --device cpu

Each part runs in a process of its own with its own time; one that crashes, hangs or lacks a package
costs itself alone, and what it had measured is kept. In FOLDER, or `$OUT`, or `benchmarks/results`:
`gpu_check.jsonl` (a line for every figure as soon as it is known), `gpu_check.md` (what it comes
to), `roofline.png`, `gpu_check.log`. Needs torch, triton and numpy; what else is missing is named.

`--picture` draws and sums up from the lines alone, on any machine. `--device cpu` is a rehearsal:
tiny shapes, Triton's interpreter. Ends with 0 only if all that ran passed, the CUDA library loading
among it if it was built; with 2 where there is no GPU.
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from gpu import inside, runner, summary  # noqa: E402
from gpu.parts import HIDDEN, NAMED  # noqa: E402


def main() -> int:
    default = os.environ.get("OUT") or ROOT / "benchmarks" / "results"
    visible = [name for name in NAMED if name not in {part.name for part in HIDDEN}]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(default), metavar="FOLDER")
    parser.add_argument("--limit", type=float, default=540, help="seconds for all of it")
    parser.add_argument(
        "--part", action="append", choices=NAMED, metavar="NAME", help=", ".join(visible)
    )
    parser.add_argument("--picture", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--inside", choices=NAMED, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        return inside.run(options.inside, options.device, options.out, options.limit)
    if options.picture:
        from gpu import picture

        print(summary.write(options.picture))
        print(picture.draw(options.picture))
        return 0
    chosen = [NAMED[name] for name in options.part] if options.part else None
    return runner.run(options.device, options.out.resolve(), options.limit, chosen)


if __name__ == "__main__":
    sys.exit(main())
