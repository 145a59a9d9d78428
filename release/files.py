"""Checks of what is in the files of a release, and what they are called."""

import os
import re
import sys
import tarfile
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from release import wheels as building
from release.dist import Dist, Wrong, found_in
from release.wheels import ROOT, run

LARGEST = {"pure": 6.5, "with_cuda": 8.0}  # MB
HELD = {
    "grasp/py.typed",
    "grasp_kernels/py.typed",
    "grasp/assets/prompts.txt",
    "grasp/assets/report.html.j2",
    "grasp/organism/weights/model.safetensors",
    "grasp/organism/weights/tokenizer.json",
}
MADE = r"PKG-INFO|setup\.cfg|grasp_kernels\.egg-info/.*"  # by setuptools, in an sdist
LIBRARY = "grasp_kernels/_native.so"


def metadata(dist: Dist) -> str:
    """An index takes it and shows its page."""
    files = [dist.sdist, *dist.wheels]
    run([sys.executable, "-m", "twine", "--no-color", "check", "--strict", *files])
    return f"{len(files)} files pass twine check --strict"


def names(dist: Dist) -> str:
    """Names say what they are: pip chooses by them."""
    source = (ROOT / "grasp_kernels" / "__init__.py").read_text()
    plain = re.search(r'__version__ = "(.+)"', source)[1]
    tag = os.environ.get("GITHUB_REF_NAME")
    if os.environ.get("GITHUB_REF_TYPE") == "tag" and tag != f"v{plain}":
        raise Wrong(f"the tag is {tag}, and the version {plain}: grasp_kernels/__init__.py has it")
    version = re.escape(plain)
    wanted = {
        dist.sdist: rf"grasp_kernels-{version}\.tar\.gz",
        dist.pure: rf"grasp_kernels-{version}-py3-none-any\.whl",
        dist.with_cuda: rf"grasp_kernels-{version}\+cu\d{{3}}-py3-none-manylinux_[\w.]+\.whl",
    }
    for file, pattern in wanted.items():
        if file is not None and not re.fullmatch(pattern, file.name):
            raise Wrong(f"{file.name} does not match {pattern}: run `make wheels`")
    return ", ".join(file.name for file in wanted if file is not None)


def sizes(dist: Dist) -> str:
    """Each wheel keeps to its budget."""
    told = []
    for kind, largest in LARGEST.items():
        if (wheel := getattr(dist, kind)) is None:
            continue
        megabytes = wheel.stat().st_size / 1e6
        if megabytes > largest:
            raise Wrong(
                f"{wheel.name} is {megabytes:.2f} MB, more than {largest}: see what is in it "
                "(`unzip -lv`), or raise the budget here with a reason"
            )
        told.append(f"{megabytes:.2f} MB of {largest}")
    return ", ".join(told)


def contents(dist: Dist) -> str:
    """A wheel holds all modules and data, its license, and nothing else."""
    run([sys.executable, "-m", "check_wheel_contents", "--ignore", "W009", *dist.wheels])
    sources = {
        str(file.relative_to(ROOT))
        for package in ("grasp", "grasp_kernels")
        for file in (ROOT / package).rglob("*.py")
    }
    for wheel in dist.wheels:
        held = set(zipfile.ZipFile(wheel).namelist())
        if lacks := (sources | HELD) - held:
            raise Wrong(f"{wheel.name} lacks {sorted(lacks)}: see package-data in pyproject.toml")
        if not any(re.fullmatch(r"[^/]+\.dist-info/licenses/LICENSE", name) for name in held):
            raise Wrong(f"{wheel.name} lacks its license: see license-files in pyproject.toml")
        if odd := {n for n in held if not re.match(r"grasp/|grasp_kernels[/-]", n)}:
            raise Wrong(f"{wheel.name} also holds {sorted(odd)}: see packages in pyproject.toml")
        if (LIBRARY in held) != (wheel == dist.with_cuda):
            raise Wrong(f"{wheel.name} and {LIBRARY} do not belong together: run `make wheels`")
    return f"{len(sources)} modules, data and license in each"


def sdist(dist: Dist) -> str:
    """The sdist holds what git does and nothing made."""
    with tarfile.open(dist.sdist) as archive:
        files = [member.name.partition("/")[2] for member in archive if member.isfile()]
    held = {name for name in files if not re.fullmatch(MADE, name)}
    if (known := building.tracked()) is None:
        return f"{len(held)} files; this is no git checkout to compare them with"
    if known != held:
        raise Wrong(
            f"the sdist lacks {sorted(known - held)} and holds {sorted(held - known)} besides: "
            "see MANIFEST.in, and commit or remove what git does not know"
        )
    return f"{len(held)} files, the same as in git"


def again(dist: Dist) -> str:
    """Built anew, in other folders, all has the same bytes: what is shipped can be verified."""
    with TemporaryDirectory(prefix="elsewhere-") as folder:
        out = Path(folder)
        building.sdist(out)
        building.wheels(dist.sdist, out)
        second = found_in(out)
        pairs = {"sdist": dist.sdist, "pure": dist.pure, "with_cuda": dist.with_cuda}
        for name, first in pairs.items():
            other = getattr(second, name)
            if (first is None) != (other is None):
                raise Wrong(f"{name} was built once of two times: is nvcc the same?")
            if first is not None and first.read_bytes() != other.read_bytes():
                raise Wrong(
                    f"{first.name} is not the same when built again: was it built of this commit? "
                    "If so, something writes times, folders or an order into it (`diffoscope`)"
                )
    return f"{sum(file is not None for file in pairs.values())} files, the same bytes"
