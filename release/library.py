"""Checks of the CUDA library in a wheel: what it asks of Linux, of torch and of CUDA."""

import json
import re
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from release.dist import Dist, Wrong
from release.wheels import run
from tests import elf

MEMBER = "grasp_kernels/_native.so"
OLDEST_TORCH = (2, 11)
LARGEST = 2.0  # MB
OF_THE_SYSTEM = {"c", "m", "rt", "dl", "pthread", "gcc_s", "stdc++"}


@contextmanager
def library(wheel: Path) -> Iterator[Path]:
    with TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        yield Path(archive.extract(MEMBER, folder))


def linux(dist: Dist) -> str:
    """The wheel's tag is what auditwheel finds: on an older Linux it would not load."""
    said = run([sys.executable, "-m", "auditwheel", "show", dist.with_cuda])
    words = " ".join(said.split())
    found = re.search(r'platform tag to "([^"]+)"', words)
    if not found or found[1] not in dist.with_cuda.name:
        raise Wrong(f"{dist.with_cuda.name} is no wheel for what auditwheel finds: {words}")
    return found[1]


def abi(dist: Dist) -> str:
    """Any torch from the oldest on loads it: it uses the stable ABI alone, and nothing newer."""
    with library(dist.with_cuda) as file:
        said = run(["torch-abi-audit", "--json", "--check", "torch", file])
    (found,) = json.loads(said)["bundled_libs"]
    oldest = found["torch"]["min_torch_version"]
    least = ".".join(map(str, OLDEST_TORCH))
    if not found["torch"]["stable"] or found["torch"]["unknown_shim_symbols"]:
        raise Wrong(f"the library goes past the stable ABI: {found['torch']}")
    if tuple(map(int, oldest.split(".")[:2])) > OLDEST_TORCH:
        raise Wrong(
            f"the library needs torch {oldest}, and pyproject.toml promises {least}: take out "
            f"{found['torch']['version_defining_symbols']}, or raise it there"
        )
    return f"stable, torch {oldest} or newer ({least} promised)"


def needed(dist: Dist) -> str:
    """It names libtorch, nothing of CUDA's, and no folder of the machine that built it."""
    with library(dist.with_cuda) as file:
        found, content = elf.read(file), file.read_bytes()
    stems = {name.split(".so")[0].removeprefix("lib") for name in found.needed}
    if "libtorch.so" not in found.needed:
        raise Wrong("the library does not name libtorch.so, and so finds nothing: see setup.py")
    if more := stems - OF_THE_SYSTEM - {"torch", "ld-linux-x86-64", "ld-linux-aarch64"}:
        raise Wrong(f"the library needs {sorted(more)}, which not every machine has: link static")
    places = set(re.findall(rb"/[\w./-]*(?:site|dist)-packages/[\w./-]+", content))
    if found.paths or places:
        raise Wrong(f"the library names folders of this machine: {found.paths}, {places}")
    return ", ".join(found.needed)


def size(dist: Dist) -> str:
    with library(dist.with_cuda) as file:
        megabytes = file.stat().st_size / 1e6
    if megabytes > LARGEST:
        raise Wrong(
            f"the library is {megabytes:.2f} MB, more than {LARGEST}: fewer architectures "
            "(setup.py), fewer configurations, or a larger budget here with a reason"
        )
    return f"{megabytes:.2f} MB of {LARGEST}"
