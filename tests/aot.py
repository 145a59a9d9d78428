"""Kernels compiled without a GPU: by Triton for any architecture, by nvcc where it is.

A job says what is compiled and nothing of the machine. Triton keeps what it compiles in its own
cache; what nvcc makes is kept by content under `GRASP_COMPILED`, build/compiled unless given.

Each release of Triton has its own assembler. Another one than is installed:
pip install --no-deps --target FOLDER triton==3.6.0, then PYTHONPATH=FOLDER.
"""

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path

from .issue_model import Instruction, cuobjdump, disassembled
from .static_model import Resources

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"


@dataclass(frozen=True)
class TritonJob:
    """A kernel with the types of what it takes and all that its launcher chooses."""

    module: str
    kernel: str
    takes: dict[str, str]
    """Type of each argument of run time; pointers are multiples of 16."""
    chosen: dict
    """Constants, and options such as `num_warps`. What is named in neither is None."""

    def run(self, arch: int) -> "Compiled":
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        kernel = getattr(import_module(self.module), self.kernel)
        names = kernel.arg_names
        constants = {n: self.chosen.get(n) for n in names if n not in self.takes}
        pointers = [i for i, n in enumerate(names) if self.takes.get(n, "").startswith("*")]
        source = ASTSource(
            fn=kernel,
            signature={n: self.takes.get(n, "constexpr") for n in names},
            constexprs=constants,
            attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
        )
        options = {n: v for n, v in self.chosen.items() if n not in names}
        done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        has, threads = done.metadata.shared, 32 * done.metadata.num_warps
        return Compiled(done.asm["cubin"], done.metadata.name, has, threads, done.asm["ptx"])


@dataclass(frozen=True)
class CudaJob:
    """An instantiation of a kernel in `csrc`."""

    source: str
    kernel: str
    """A part of the mangled name that no other has."""
    shared: int  # bytes a block asks for when it is launched
    threads: int

    def run(self, arch: int) -> "Compiled":
        return Compiled(
            nvcc(self.source, arch).read_bytes(), self.kernel, self.shared, self.threads
        )


@dataclass(frozen=True)
class Compiled:
    cubin: bytes = field(repr=False)
    kernel: str  # a part of its name
    shared: int  # bytes a block
    threads: int  # a block
    ptx: str = field(default="", repr=False)

    @cached_property
    def used(self) -> Resources:
        found = self._of_the_kernel(resources)
        return replace(found, shared=self.shared, threads=self.threads)

    @cached_property
    def code(self) -> list[Instruction]:
        return self._of_the_kernel(disassembled)

    def _of_the_kernel(self, read: Callable[[Path], dict]):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            found = read(Path(file.name))
        (name,) = (n for n in found if self.kernel in n)
        return found[name]


def resources(cubin: Path) -> dict[str, Resources]:
    """Of each kernel, as the assembler has written them into the file."""
    said = subprocess.run(
        [cuobjdump(), "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    found = {}
    for name, line in re.findall(r"Function (\S+):\n\s*(.*)", said):
        has = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
        found[name] = Resources(has["REG"], has["SHARED"], has["LOCAL"] + has["STACK"], 0)
    return found


def nvcc(source: str, arch: int) -> Path:
    """The cubin of one file of `csrc`, compiled if no earlier call has."""
    tool = shutil.which("nvcc")
    if tool is None:
        raise FileNotFoundError("no nvcc: install the CUDA toolkit, or leave CUDA's kernels out")
    target = "90a" if arch == 90 else str(arch)
    flags = ["-std=c++17", "-O3", f"-gencode=arch=compute_{target},code=sm_{target}", "-cubin"]
    version = subprocess.run([tool, "--version"], capture_output=True, check=True).stdout
    read = [p.read_bytes() for p in sorted(CSRC.glob("*.cuh")) + sorted(CSRC.glob("*.h"))]
    read += [(CSRC / source).read_bytes(), " ".join(flags).encode(), version]
    content = hashlib.sha256(b"\0".join(read)).hexdigest()[:24]
    folder = Path(os.environ.get("GRASP_COMPILED", ROOT / "build" / "compiled"))
    out = folder / f"{Path(source).stem}-{target}-{content}.cubin"
    if not out.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as apart:
            made = Path(apart) / out.name
            command = [tool, *flags, CSRC / source, "-o", made]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"nvcc can't compile {source} for {target}: {done.stderr}")
            made.replace(out)
    return out
