"""Metadata is in pyproject.toml; here the CUDA library is built, where it can be.

GRASP_CUDA=auto (default) builds it where nvcc and torch's headers are found, 1 fails without them,
0 leaves it out; GRASP_CUDA_ARCHS=90a,100 builds for those alone. Nothing is downloaded and no GPU
is asked for. torch must be importable, so install with `pip install --no-build-isolation .`, or
run `python setup.py build_ext --inplace`.
"""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = ("project", "project_list", "orthonormalize")  # and bindings.cpp
ARCHITECTURES = ("80", "90a", "100", "120")
CSRC = Path("csrc")


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = Path(home) / "bin" / "nvcc" if home else None
    return str(found) if found and found.exists() else shutil.which("nvcc")


def headers() -> Path | None:
    spec = importlib.util.find_spec("torch")
    include = Path(spec.origin).parent / "include" if spec and spec.origin else None
    return include if include and (include / "torch/csrc/stable/library.h").exists() else None


def extensions() -> list[Extension]:
    wanted = os.environ.get("GRASP_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"GRASP_CUDA is {wanted!r}; choose auto, 0 or 1")
    reasons = [
        reason
        for reason, lacks in (
            ("no nvcc: install the CUDA toolkit or set CUDA_HOME", nvcc() is None),
            ("torch's headers are not importable: use --no-build-isolation", headers() is None),
        )
        if lacks
    ]
    if wanted == "0" or (wanted == "auto" and reasons):
        return []
    if reasons:
        raise SystemExit(f"GRASP_CUDA=1, but {'; '.join(reasons)}")
    depends = [str(p) for p in CSRC.iterdir()]
    return [Extension("grasp_kernels._native", [str(CSRC / "bindings.cpp")], depends=depends)]


class Build(build_ext):
    def get_ext_filename(self, name: str) -> str:
        return str(Path(*name.split("."))) + ".so"  # no Python module: one file for any Python

    def build_extension(self, extension: Extension) -> None:
        out = Path(self.get_ext_fullpath(extension.name))
        objects = Path(self.build_temp)
        for folder in (out.parent, objects):
            folder.mkdir(parents=True, exist_ok=True)
        known = subprocess.run(
            [nvcc(), "--list-gpu-arch"], check=True, capture_output=True, text=True
        ).stdout
        wanted = os.environ.get("GRASP_CUDA_ARCHS")
        chosen = wanted.split(",") if wanted else ARCHITECTURES
        chosen = [a for a in chosen if wanted or f"compute_{a.rstrip('a')}" in known]
        flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in chosen]
        newest = chosen[-1].rstrip("a")
        flags.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")  # for what comes
        flags += ["-O3", "-std=c++20", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        include = [f"-I{headers()}", f"-I{headers() / 'torch/csrc/api/include'}"]
        running = []
        for source in (*(CSRC / f"{s}.cu" for s in SOURCES), CSRC / "bindings.cpp"):
            target = objects / f"{source.stem}.o"
            command = [nvcc(), "-x", "cu", *flags, *include, "-c", source, "-o", target]
            running.append((target, subprocess.Popen(command)))
        if any(process.wait() for _, process in running):
            raise SystemExit("nvcc failed; GRASP_CUDA=0 installs without the CUDA library")
        subprocess.run(
            [nvcc(), "-shared", "-cudart", "static", *(t for t, _ in running), "-o", out],
            check=True,
        )


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (
            ("py3", "none", platform) if self.distribution.ext_modules else (python, abi, platform)
        )


setup(ext_modules=extensions(), cmdclass={"build_ext": Build, "bdist_wheel": Wheel})
