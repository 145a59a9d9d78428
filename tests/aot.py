"""Compile every configuration of every Triton kernel for every architecture, without a GPU.

python -m tests.aot [ARCH ...]        prints one JSON object for each
"""

import json
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 89, 90, 100, 120)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def configurations() -> list[dict]:
    """All that `project_triton.tiling` chooses."""
    from grasp_kernels.project_triton import tiling

    ranks, sides = (16, 32, 64), ((False, 64), (True, 16), (True, 64))
    found = [tiling(c, left, KP, n) for c, (left, n), KP in product(range(4), sides, ranks)]
    return [options for i, options in enumerate(found) if options not in found[:i]]


def compiled(job: tuple[int, dict]) -> dict:
    from grasp_kernels.project_triton import COLUMNS, project_kernel

    arch, options = job
    constants = options | {"COLUMNS": COLUMNS, "ALIGNED": True, "INTERPRETED": False}
    signature = {"table": "*i64", "strips": "*i32", "count": "i32"}
    names = project_kernel.arg_names
    source = ASTSource(
        fn=project_kernel,
        signature={n: signature.get(n, "constexpr") for n in names},
        constexprs={n: constants[n] for n in names if n not in signature},
        attrs={(0,): [["tt.divisibility", 16]], (1,): [["tt.divisibility", 16]]},
    )
    kernel = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": options["num_warps"]}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    fields = dict(
        field.split(":") for field in usage.split("Function", 1)[1].split() if ":" in field[:-1]
    )
    ptx = kernel.asm["ptx"]
    return {
        "arch": arch,
        "options": options,
        "registers": int(fields["REG"]),
        "spilled": int(fields["LOCAL"]) + int(fields["STACK"]),
        "shared": kernel.metadata.shared,
        "matrix_instructions": ptx.count("mma.sync")
        + ptx.count("wgmma")
        + ptx.count("tcgen05.mma"),
        "wide_loads": ptx.count("ld.global.v4"),
        "wide_stores": ptx.count("st.global.v4"),
    }


def main() -> None:
    arches = [int(a) for a in sys.argv[1:]] or ARCHITECTURES
    jobs = list(product(arches, configurations()))
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        for result in pool.map(compiled, jobs, chunksize=4):
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
