"""Compile every configuration of every Triton kernel for every architecture, without a GPU.

python -m tests.aot [ARCH ...]        prints one JSON object for each

Each release of Triton has its own assembler. Another one than is installed:
pip install --no-deps --target FOLDER triton==3.6.0; PYTHONPATH=FOLDER python -m tests.aot
"""

import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90, 100, 120)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


SIGNATURES = {
    "places": "*i64",
    "table": "*i64",
    "strips": "*i32",
    "rows": "*i64",
    "pinned": "*i64",
    "groups": "*i64",
    "pieces": "*i32",
    "scratch": "*fp32",
    "counters": "*i32",
    "energies": "*fp32",  # without them the kernel does less
    "count": "i32",
}
RANKS = (16, 32, 64)
WIDE = 65  # directions, more than one block of columns


def configurations() -> list[tuple[str, dict]]:
    """All that each kernel's `tiling` chooses, by its stem."""
    from grasp_kernels import factors_layout, orthonormalize_triton, strips_triton

    codes, sides = (0, 1), (False, True)  # fp16 is compiled as bf16 is
    whole = {"UNIT": 16, "VECTOR": True}
    found = [
        ("strips", {**strips_triton.tiling(*chosen), **whole})
        for chosen in product(codes, sides, RANKS)
    ]
    found += [
        ("factors", {**factors_layout.tiling(*chosen), **whole})
        for chosen in product(codes, sides, (*RANKS, WIDE), (16, 32))
    ]
    found += [
        ("orthonormalize", {"CODE": code, **orthonormalize_triton.tiling(KP)})
        for code, KP in product(codes, RANKS)
    ]
    return found


def compiled(job: tuple[int, tuple[str, dict]]) -> dict:
    arch, (op, options) = job
    module = import_module(f"grasp_kernels.{op}_triton")
    kernel = getattr(module, f"{op}_kernel")
    constants = {"COLUMNS": getattr(module, "COLUMNS", None), **options}
    given = SIGNATURES
    names = kernel.arg_names
    pointers = [i for i, n in enumerate(names) if given.get(n, "").startswith("*")]
    source = ASTSource(
        fn=kernel,
        signature={n: given.get(n, "constexpr") for n in names},
        constexprs={n: constants[n] for n in names if n not in given},
        attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
    )
    kernel = triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options={k: v for k, v in options.items() if k in ("num_warps", "maxnreg")},
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
        "op": op,
        "options": options,
        "registers": int(fields["REG"]),
        "spilled": int(fields["LOCAL"]) + int(fields["STACK"]),
        "shared": kernel.metadata.shared,
        "matrix_instructions": ptx.count("mma.sync")
        + ptx.count("wgmma")
        + ptx.count("tcgen05.mma"),
        "narrow_copies": len(re.findall(r"cp\.async\.c[ag]\.[^;]*?, 0x4,", ptx)),
    }


def main() -> None:
    arches = [int(a) for a in sys.argv[1:]] or ARCHITECTURES
    jobs = list(product(arches, configurations()))
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        for result in pool.map(compiled, jobs, chunksize=4):
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
