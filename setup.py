"""Metadata is in pyproject.toml; here the CUDA library is built, where it can be.

GRASP_CUDA=auto (default) builds it where nvcc, ninja and torch's headers are found, 1 fails without
them, 0 leaves it out; GRASP_CUDA_ARCHS=90a,100 builds for those alone, MAX_JOBS limits how many
compilers run at a time, GRASP_VERSION_TAG=+cu130 stands behind the version. Nothing is downloaded
and no GPU is asked for. torch must be importable, so install with
`pip install --no-build-isolation .`, or run `python setup.py build_ext --inplace`.

Why not torch's CUDAExtension: it imports torch to say what the package is called, refuses an nvcc
of another version than torch's own, though the library needs neither, cannot be used beside a torch
without CUDA, builds for one Python, and does not link libtorch, without which a library that
Python loads finds none of its symbols. ninja, which it uses as well, is driven here directly.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:  # pip asks for it with isolation alone
    raise SystemExit("setuptools >= 77 is needed: pip install --upgrade 'setuptools>=77'")

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.egg_info import egg_info

ARCHITECTURES = ("90a", "100", "120")  # clusters begin with 9.0
HOME = "https://github.com/grasp-kernels/grasp-kernels"
CSRC = Path("csrc")  # from here, and not from /: what a compiler writes down names no machine


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = Path(home) / "bin" / "nvcc" if home else None
    return str(found) if found and found.exists() else shutil.which("nvcc")


def ninja() -> str | None:
    """Beside this Python first, whose folder is on the PATH in an activated environment alone."""
    places = (str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath))
    return shutil.which("ninja", path=os.pathsep.join(places))


def torch() -> Path | None:
    """Where torch's headers and libraries are, found without importing it."""
    spec = importlib.util.find_spec("torch")
    home = Path(spec.origin).parent if spec and spec.origin else None
    return home if home and (home / "include/torch/csrc/stable/library.h").exists() else None


def extensions() -> list[Extension]:
    wanted = os.environ.get("GRASP_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"GRASP_CUDA is {wanted!r}; choose auto, 0 or 1")
    if wanted == "0":
        return []
    needs = {
        "no Linux: it is built for that alone": sys.platform == "linux" or None,
        "no nvcc: install the CUDA toolkit or set CUDA_HOME": nvcc(),
        "no ninja: pip install ninja": ninja(),
        "no torch >= 2.11 to import: install it and use --no-build-isolation": torch(),
    }
    if lacks := "; ".join(reason for reason, found in needs.items() if found is None):
        if wanted == "1":
            raise SystemExit(f"GRASP_CUDA=1, but {lacks}")
        print(f"the CUDA library is left out: {lacks}", file=sys.stderr)
        return []
    return [Extension("grasp_kernels._native", [])]


def architectures() -> list[str]:
    if wanted := os.environ.get("GRASP_CUDA_ARCHS"):
        chosen = wanted.split(",")
        if odd := [a for a in chosen if not re.fullmatch(r"\d{2,3}[af]?", a)]:
            raise SystemExit(f"GRASP_CUDA_ARCHS has {odd[0]!r}; write it like 80,90a,100")
        return chosen
    known = subprocess.run(
        [nvcc(), "--list-gpu-arch"], check=True, capture_output=True, text=True
    ).stdout.split()
    return [a for a in ARCHITECTURES if f"compute_{a.rstrip('a')}" in known]


def smaller() -> list[str]:
    """A fifth of the bytes, unpacked when a kernel is loaded: known to nvcc since 12.8."""
    said = subprocess.run([nvcc(), "--help"], check=True, capture_output=True, text=True).stdout
    return ["--compress-mode=size"] if "--compress-mode" in said else []


def ninja_file(objects: Path, library: Path) -> str:
    """What ninja is to do: each source to an object, made anew when a header it read changes."""
    chosen = architectures()
    newest = max((a.rstrip("af") for a in chosen), key=int)
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in chosen]
    flags.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")  # for what comes
    flags += ["-O3", "-std=c++20", "-Xcompiler", "-fPIC,-fvisibility=hidden", *smaller()]
    # Kept, and so by names that are always the same: nvcc writes them into what it makes.
    flags += ["--keep", f"--keep-dir={objects}"]
    include = torch() / "include"
    flags += ["-Xcompiler", f"-fmacro-prefix-map={include}=torch/include"]  # where errors arose
    flags += [f"-I{include}", f"-I{include / 'torch/csrc/api/include'}"]
    # A library that does not name libtorch finds none of its symbols: Python loads them privately.
    # By that name, with no path, it finds the libtorch that `import torch` has loaded.
    # No code of a GPU is linked, which would write down where libraries were looked for.
    link = ["-shared", "-nodlink", "-cudart", "static", "-L", str(torch() / "lib")]
    link += ["-Xlinker", "--no-as-needed", "-ltorch", "-Xlinker", "-s"]  # and no symbol tables
    sources = [*sorted(CSRC.glob("*.cu")), CSRC / "bindings.cpp"]
    targets = [objects / f"{source.stem}.o" for source in sources]
    lines = [
        f"builddir = {path(objects)}",
        "rule compile",
        f"  command = {command(nvcc())} -x $kind -MD -MF $out.d {command(*flags)} -c $in -o $out",
        "  description = nvcc $in",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {command(nvcc())} $in {command(*link)} -o $out.part && mv $out.part $out",
        "  description = nvcc $out",
        *(
            f"build {path(t)}: compile {path(s)}\n  kind = {'cu' if s.suffix == '.cu' else 'c++'}"
            for t, s in zip(targets, sources, strict=True)
        ),
        f"build {path(library)}: link {' '.join(map(path, targets))}",
    ]
    return "\n".join(lines) + "\n"


def command(*words: str) -> str:
    return shlex.join(words).replace("$", "$$")


def path(file: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(file))


def run_ninja(file: Path) -> int:
    jobs = os.environ.get("MAX_JOBS")
    if jobs and not re.fullmatch(r"[1-9]\d*", jobs):
        raise SystemExit(f"MAX_JOBS is {jobs!r}; give a number from 1 up")
    limit = ["-j", jobs] if jobs else []
    running = subprocess.Popen([ninja(), "-f", str(file), *limit])
    try:
        return running.wait()
    except BaseException:
        running.terminate()  # and not kill: ninja ends its compilers first
        running.wait()
        raise


class Build(build_ext):
    def get_ext_filename(self, name: str) -> str:
        return str(Path(*name.split("."))) + ".so"  # no Python module: one file for any Python

    def build_extension(self, extension: Extension) -> None:
        library = Path(self.get_ext_fullpath(extension.name))
        objects = Path(self.build_temp)
        for folder in (library.parent, objects):
            folder.mkdir(parents=True, exist_ok=True)
        file = objects / "build.ninja"
        file.write_text(ninja_file(objects, library))
        if run_ninja(file):
            raise SystemExit("nvcc failed; GRASP_CUDA=0 installs without the CUDA library")

    def copy_file(self, infile, outfile, *args, **options):
        """Under a library's name is a whole one at any time: processes may have it open."""
        part = f"{outfile}.part"
        _, copied = super().copy_file(infile, part, *args, **options)
        os.replace(part, outfile)
        return outfile, copied


class Info(egg_info):
    def finalize_options(self) -> None:
        # Here, since the setup.cfg of an sdist says that there is no tag.
        self.tag_build = os.environ.get("GRASP_VERSION_TAG", self.tag_build)
        super().finalize_options()


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (
            ("py3", "none", platform) if self.distribution.ext_modules else (python, abi, platform)
        )


def long_description() -> str:
    """README for an index page, where a relative link leads nowhere."""

    def absolute(found: re.Match) -> str:
        text, to = found.groups()
        if text is None:  # code
            return found[0]
        place = "raw" if text.startswith("!") else "blob"
        file = "README.md" if to.startswith("#") else ""
        return f"{text}({HOME}/{place}/main/{file}{to})"

    links = r"```.*?```|(!?\[[^][]*\])\((?!https?:)([^)]+)\)"
    return re.sub(links, absolute, Path("README.md").read_text(encoding="utf-8"), flags=re.S)


setup(
    long_description=long_description(),
    long_description_content_type="text/markdown",
    ext_modules=extensions(),
    cmdclass={"build_ext": Build, "bdist_wheel": Wheel, "egg_info": Info},
)
