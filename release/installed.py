"""Checks of a wheel as a user has it: in an empty environment, with no source beside it."""

import json
import os
import shutil
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from release.dist import Dist, Wrong
from release.wheels import ROOT, run, unpacked

TESTS = (
    "test_arguments.py",
    "test_autograd.py",
    "test_certificate.py",
    "test_files.py",
    "test_guard.py",
    "test_project.py",
    "test_projector.py",
    "test_subspaces.py",
)
OF_THE_LIBRARY = "test_native.py"
PACKAGES = ("grasp", "grasp_kernels")
WHERE = "import grasp, grasp_kernels as gk; print(grasp.__file__, gk.__file__, sep='\\n')"


class Environment:
    """A virtual environment with one wheel, and a folder to run in that has none of our source."""

    def __init__(self, folder: Path, wheel: Path, sdist: Path):
        self.wheel = wheel
        self.bin = folder / "env" / "bin"
        venv.create(folder / "env", with_pip=True, symlinks=True)
        (folder / "sdist").mkdir()
        self.tree = unpacked(sdist, folder / "sdist")
        for package in PACKAGES:  # what is imported is the wheel's
            shutil.rmtree(self.tree / package)

    def install(self, extra: str = "", *more: str) -> None:
        requirement = f"grasp-kernels{extra} @ {self.wheel.as_uri()}"
        pip = [self.bin / "python", "-m", "pip", "install", "--quiet"]
        pip += ["--disable-pip-version-check", "-c", ROOT / "constraints.txt"]
        run([*pip, requirement, *more])

    def __call__(self, *command: str | Path, fails: bool = False, **env: str) -> str:
        """Run a command of the environment where tests lie."""
        program, *words = command
        path = os.pathsep.join([str(self.bin), os.environ.get("PATH", os.defpath)])
        clean = {"PYTHONPATH": "", "PATH": path, "GRASP_CACHE": "off", "OMP_NUM_THREADS": "1"}
        return run([self.bin / program, *words], fails, cwd=self.tree, env={**clean, **env})

    def library(self) -> Path | None:
        (package,) = self.bin.parent.glob("lib/python*/site-packages/grasp_kernels")
        return next(package.glob("_native.so"), None)


@contextmanager
def environment(wheel: Path, sdist: Path) -> Iterator[Environment]:
    with TemporaryDirectory(prefix="installed-") as folder:
        yield Environment(Path(folder), wheel, sdist)


def pure(dist: Dist) -> str:
    """The wheel that an index serves, from nothing to a demo."""
    with environment(dist.pure, dist.sdist) as env:
        bare = _bare(env)
        return f"{bare}; {_whole(env, TESTS)}"


def with_cuda(dist: Dist) -> str:
    """The wheel with the library, which loads here with the one symbol that a CPU torch lacks."""
    with environment(dist.with_cuda, dist.sdist) as env:
        env.install("[hf]", "pytest", "hypothesis")
        library = env.library()
        if library is None:
            raise Wrong(f"{dist.with_cuda.name} installs no library: run `make wheels`")
        return _whole(env, (*TESTS, OF_THE_LIBRARY), GRASP_LIBRARY=str(library))


def _bare(env: Environment) -> str:
    """With torch alone the kernels run, and the command line says what it needs."""
    env.install()
    gk = "import torch, grasp_kernels as gk; print(gk.explain(torch.zeros(4, 4), torch.eye(4, 1)))"
    if "project: reference" not in env("python", "-c", gk):
        raise Wrong("grasp_kernels does not project where torch alone is installed")
    if "pip install 'grasp-kernels[hf]'" not in (said := env("grasp", "doctor", fails=True)):
        raise Wrong(f"grasp does not say what to install where torch alone is: {said}")
    return "bare: kernels run"


def _whole(env: Environment, tests: tuple[str, ...], **more: str) -> str:
    env.install("[hf]", "pytest", "hypothesis")
    places = env("python", "-c", WHERE).split()
    if not all(Path(place).is_relative_to(env.bin.parent) for place in places):
        raise Wrong(f"tests would run against {places}, not against the wheel: unset PYTHONPATH")
    about = json.loads(env("grasp", "doctor", "--json"))
    if "right in" not in about["self-test"]:
        raise Wrong(f"grasp doctor finds projections wrong: {about['self-test']}")
    env("grasp", "demo", "--seeds", "1", "--out", "demo")
    if not any((env.tree / "demo").rglob("report.html")):
        raise Wrong("grasp demo wrote no report: run it by hand in an environment like this")
    files = [f"tests/{name}" for name in tests]
    said = env("python", "-m", "pytest", "-p", "no:cacheprovider", "--durations=0", *files, **more)
    return f"doctor, demo; {said.strip().splitlines()[-1].strip('= ')} against the wheel"
