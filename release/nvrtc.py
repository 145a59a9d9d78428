"""Compile every kernel by NVRTC 12.9, where no nvcc 12 is at hand: `python -m release.nvrtc`.

PyPI has CUDA 12's compiler as a library alone, for device code without the standard library. So
each `csrc/*.cu` is compiled as it stands, its host code too, with a line or two in the place of
each header that it lacks. What comes of host code is never run: naming a kernel makes it.
"""

import argparse
import ctypes
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

CSRC = Path(__file__).parent.parent / "csrc"
ARCHITECTURES = ("80", "90a", "100", "120")
VERSION = 12, 9
HEADERS = {
    "cstdint": "using int64_t = long long; using uint64_t = unsigned long long; "
    "using uint32_t = unsigned;",
    "type_traits": "namespace std { template <class T, T V> struct integral_constant {"
    "  static constexpr T value = V; constexpr operator T() const { return V; } };"
    "template <class A, class B> struct is_same { static constexpr bool value = false; };"
    "template <class A> struct is_same<A, A> { static constexpr bool value = true; }; }",
    "algorithm": "namespace std { template <class T> T min(T a, T b) { return b < a ? b : a; } }",
    "array": "namespace std { template <class T, int N> struct array { T of[N]; }; }",
    "map": "namespace std { template <class K, class V> struct map {"
    "  struct Pair { K first; V second; } one; Pair* find(const K&) { return &one; }"
    "  Pair* end() { return nullptr; } V& operator[](const K&) { return one.second; } }; }",
    "mutex": "namespace std { struct mutex {};"
    "template <class M> struct lock_guard { lock_guard(M&) {} }; }",
    "cuda_runtime.h": "#include <driver_types.h>\ncudaError_t cudaGetDevice(int*);"
    "template <class F> cudaError_t cudaFuncSetAttribute(F, cudaFuncAttribute, int);"
    "template <class F> cudaError_t cudaOccupancyMaxActiveClusters("
    "  int*, F, const cudaLaunchConfig_t*);"
    "template <class F, class... A> cudaError_t cudaLaunchKernelEx("
    "  const cudaLaunchConfig_t*, F, A...);",
}


def packaged(package: str, name: str) -> Path:
    """A file of an installed package of NVIDIA's."""
    try:
        return next(Path(f.locate()) for f in files(package) or () if f.name == name)
    except (PackageNotFoundError, StopIteration):
        raise SystemExit(
            f"{name} of {package} is missing: pip install '{package}=={VERSION[0]}.{VERSION[1]}.*'"
        ) from None


class Compiler:
    """NVRTC, and where the headers of that CUDA are."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(str(packaged("nvidia-cuda-nvrtc-cu12", "libnvrtc.so.12")))
        self.include = packaged("nvidia-cuda-runtime-cu12", "cuda_fp16.h").parent
        found = ctypes.c_int(), ctypes.c_int()
        self.library.nvrtcVersion(*map(ctypes.byref, found))
        self.version = tuple(n.value for n in found)
        if self.version != VERSION:
            raise SystemExit(f"NVRTC is {self.version}, not {VERSION}: see pyproject's [release]")

    def __call__(self, source: Path, architecture: str) -> bytes:
        """A source's code for one architecture.

        Raises:
            SystemExit: it does not compile; says why.
        """
        names, texts = zip(*HEADERS.items(), strict=True)
        program = ctypes.c_void_p()
        self.library.nvrtcCreateProgram(
            ctypes.byref(program),
            source.read_bytes(),
            source.name.encode(),
            len(HEADERS),
            _strings(f"#pragma once\n{text}\n" for text in texts),
            _strings(names),
        )
        options = (f"--gpu-architecture=sm_{architecture}", "-std=c++20", "-default-device")
        options += (f"-I{source.parent}", f"-I{self.include}")
        failed = self.library.nvrtcCompileProgram(program, len(options), _strings(options))
        if failed:
            log = self._read(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog").decode()
            raise SystemExit(
                f"{source.name} does not compile for {architecture} by CUDA 12:\n{log}"
            )
        code = self._read(program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN")
        self.library.nvrtcDestroyProgram(ctypes.byref(program))
        return code

    def _read(self, program: ctypes.c_void_p, size: str, content: str) -> bytes:
        length = ctypes.c_size_t()
        getattr(self.library, size)(program, ctypes.byref(length))
        buffer = ctypes.create_string_buffer(length.value)
        getattr(self.library, content)(program, buffer)
        return buffer.raw


def _strings(texts) -> ctypes.Array:
    encoded = [text.encode() for text in texts]
    return (ctypes.c_char_p * len(encoded))(*encoded)


def kernels(code: bytes) -> int:
    """How many there are: each has a section of instructions, `.text.` and its name."""
    return len({name for name in code.split(b"\0") if name.startswith(b".text.")})


def compiled(csrc: Path = CSRC) -> Iterator[str]:
    """Compile each source for each architecture, and say what came of it."""
    compiler = Compiler()
    for source in sorted(csrc.glob("*.cu")):
        for architecture in ARCHITECTURES:
            start = time.monotonic()
            code = compiler(source, architecture)
            if not kernels(code):
                raise SystemExit(f"{source.name} has no kernel for {architecture}: see HEADERS")
            seconds = time.monotonic() - start
            yield (
                f"{source.name} for {architecture}: {kernels(code)} kernels, "
                f"{len(code) / 1e6:.2f} MB, {seconds:.0f} s"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csrc", type=Path, default=CSRC)
    for line in compiled(parser.parse_args().csrc):
        print(line, file=sys.stdout, flush=True)
