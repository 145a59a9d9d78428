"""Compile every configuration of every Triton kernel for every architecture, without a GPU.

python -m tests.aot [ARCH ...]        prints one JSON object for each

Each release of Triton has its own assembler. Another one than is installed:
pip install --no-deps --target FOLDER triton==3.6.0; PYTHONPATH=FOLDER python -m tests.aot
"""

import json
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 89, 90, 100, 120)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


SIGNATURES = {
    "places": "*i64",
    "table": "*i64",
    "strips": "*i32",
    "energies": "*fp32",  # without them the kernel does less
    "count": "i32",
    "room": "i32",
    "scratch": "*fp32",  # of wide bases alone
    "states": "*i32",
    "partials": "*fp64",
    "X": "*fp64",
    "parts": "i32",
}
RANKS = (16, 32, 64)
# Of what is orthonormalised, in fp64: fp16 and the widths between differ in nothing that counts.
KINDS = ((torch.float32, 0), (torch.float32, 2), (torch.bfloat16, 0), (torch.bfloat16, 1))
WIDE = 65  # directions, more than stay in registers


def configurations() -> list[tuple[str, dict]]:
    """What each kernel's `tiling` chooses, by the op's name."""
    from grasp_kernels import orthonormalize_triton, project_triton

    sides = list(product((False, True), (16, 64)))
    found = [
        ("project", {**project_triton.tiling(code, left, k, widest), "wide": k == WIDE})
        for code, (left, widest), k in product(range(4), sides, (*RANKS, WIDE))
    ]
    for (dtype, layout), K in product(KINDS, (16, 64, orthonormalize_triton.WIDEST)):
        found += orthonormalize_triton.configurations(dtype, layout, K)
    return [job for i, job in enumerate(found) if job not in found[:i]]


def compiled(job: tuple[int, tuple[str, dict]]) -> dict:
    from grasp_kernels import orthonormalize_columns, orthonormalize_gram, project_triton

    arch, (op, options) = job
    modules = {"project": project_triton, "columns": orthonormalize_columns}
    kernel = getattr(modules.get(op, orthonormalize_gram), f"{op}_kernel")
    constants = {"COLUMNS": project_triton.COLUMNS, "ALIGNED": True, **options}
    given = {k: v for k, v in SIGNATURES.items() if k != "scratch" or options.get("wide")}
    if op == "columns":
        given["scratch"] = "*fp64"
    constants |= {"scratch": None}
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
        "wide_loads": ptx.count("ld.global.v4"),
        "wide_stores": ptx.count("st.global.v4"),
    }


def main() -> None:
    arches = [int(a) for a in sys.argv[1:]] or ARCHITECTURES
    jobs = list(product(arches, configurations()))
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        for result in pool.map(compiled, jobs, chunksize=4):
            print(json.dumps(result, default=str), flush=True)


if __name__ == "__main__":
    main()
