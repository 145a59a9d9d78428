"""What a release is made of: metadata, README on an index page, the sdist, and its checks.

`make check-wheels` looks at what is built, and takes minutes; here is what seconds can tell.
"""

import gzip
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement

import grasp_kernels as gk
from release import check, files, library, nvrtc, wheels
from release.dist import Dist, Wrong, found_in

ROOT = Path(__file__).parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text()
COMPILER = shutil.which("c++") or shutil.which("g++")
WHEEL = f"grasp_kernels-{gk.__version__}-py3-none-any.whl"
WITH_CUDA = f"grasp_kernels-{gk.__version__}+cu130-py3-none-manylinux_2_34_x86_64.whl"
SDIST = f"grasp_kernels-{gk.__version__}.tar.gz"


@pytest.fixture
def arguments(monkeypatch) -> dict:
    """What setup.py gives setuptools."""
    given: dict = {}
    monkeypatch.setattr(setuptools, "setup", lambda **options: given.update(options))
    monkeypatch.setenv("GRASP_CUDA", "0")
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    return given


def test_readme_leads_somewhere_from_an_index_page(arguments):
    page, readme = arguments["long_description"], (ROOT / "README.md").read_text()
    assert arguments["long_description_content_type"] == "text/markdown"
    without_code = re.sub(r"```.*?```", "", page, flags=re.S)
    links = re.findall(r"(!?)\[[^][]*\]\(([^)]+)\)", without_code)
    assert len(links) == readme.count("](") and all(to.startswith("https://") for _, to in links)
    home = re.search(r'Homepage = "(.+)"', PROJECT)[1]
    ours = [(image, to) for image, to in links if to.startswith(f"{home}/")]
    assert len(ours) > 10
    for image, to in ours:
        place, _, path = to.removeprefix(f"{home}/").partition("/main/")
        assert place == ("raw" if image else "blob") and (ROOT / path.partition("#")[0]).exists()
    code = re.findall(r"```.*?```", readme, re.S)
    assert re.findall(r"```.*?```", page, re.S) == code  # as it is


def test_metadata():
    assert "License ::" not in PROJECT  # an index refuses it beside a license expression
    assert 'license = "Apache-2.0"' in PROJECT and "The grasp-kernels authors" in PROJECT
    assert 'version = { attr = "grasp_kernels.__version__" }' in PROJECT
    assert f"## {gk.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    urls = re.findall(r'^\w+ = "(https://[^"]+)"', PROJECT, re.M)
    home, *others = urls
    assert len(others) >= 3 and all(url.startswith(f"{home}/") for url in others)


def test_an_sdist_holds_what_git_does(tmp_path):
    """And so all that tests read."""
    if (known := wheels.tracked()) is None:
        pytest.skip("no git checkout to compare it with")
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path)]
    env = {**os.environ, "GRASP_CUDA": "0"}
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
    (sources,) = tmp_path.glob("*/SOURCES.txt")
    held = {line for line in sources.read_text().splitlines() if "egg-info" not in line}
    assert known <= held


def archive(path: Path, names: list[str], mode: int, mtime: int) -> Path:
    with tarfile.open(path, "w:gz") as file:
        for name in names:
            (path.parent / "one").write_text(name)
            (path.parent / "one").chmod(mode)
            os.utime(path.parent / "one", (mtime, mtime))
            file.add(path.parent / "one", name)
    return path


def test_an_archive_tells_neither_when_nor_by_whom(tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    first = archive(tmp_path / "1.tar.gz", ["a", "b"], 0o600, 1)
    second = archive(tmp_path / "2.tar.gz", ["b", "a"], 0o664, 2)
    made = [wheels.repacked(f, tmp_path / f"{f.name}.made") for f in (first, second)]
    assert first.read_bytes() != second.read_bytes()
    assert made[0].read_bytes() == made[1].read_bytes()
    with tarfile.open(made[0]) as file:
        assert [(m.name, m.mtime, m.mode) for m in file] == [
            ("a", 1700000000, 0o644),
            ("b", 1700000000, 0o644),
        ]
    with gzip.open(made[0]) as file:
        assert file.read(1) and file.mtime == 1700000000


def test_what_is_built_does_not_tell_who_may_read_it(tmp_path):
    before = os.umask(0o077)
    try:
        wheels.run([sys.executable, "-c", "open('made', 'w')"], cwd=tmp_path)
    finally:
        os.umask(before)
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o644


def made(folder: Path, *names: str) -> Dist:
    """A release, with wheels that hold all that they must but no library."""
    for name in names:
        (folder / name).touch()
        if name.endswith(".whl"):
            packages = [ROOT / package for package in ("grasp", "grasp_kernels")]
            held = [str(f.relative_to(ROOT)) for p in packages for f in p.rglob("*.py")]
            with zipfile.ZipFile(folder / name, "w") as wheel:
                for file in (*held, *files.HELD, "grasp_kernels-1.dist-info/licenses/LICENSE"):
                    wheel.writestr(file, "")
    return found_in(folder)


def test_one_release_at_a_time(tmp_path):
    with pytest.raises(Wrong, match="not one release: run `make wheels`"):
        found_in(tmp_path)
    assert made(tmp_path, SDIST, WHEEL).wheels == [tmp_path / WHEEL]
    assert made(tmp_path, WITH_CUDA).with_cuda == tmp_path / WITH_CUDA
    with pytest.raises(Wrong, match="not one release"):
        made(tmp_path, WITH_CUDA.replace("cu130", "cu129"))


def test_checks_of_files_have_teeth(tmp_path, monkeypatch):
    dist = made(tmp_path, SDIST, WHEEL, WITH_CUDA)
    assert files.names(dist) and files.sizes(dist)
    untagged = Dist(dist.sdist, dist.pure, tmp_path / WITH_CUDA.replace("+cu130", ""))
    with pytest.raises(Wrong, match="does not match"):
        files.names(untagged)
    monkeypatch.setenv("GITHUB_REF_TYPE", "tag")
    monkeypatch.setenv("GITHUB_REF_NAME", "v0.0.9")
    with pytest.raises(Wrong, match=f"the tag is v0.0.9, and the version {gk.__version__}"):
        files.names(dist)
    monkeypatch.setattr(files, "LARGEST", {"pure": 1e-6})
    with pytest.raises(Wrong, match="or raise the budget"):
        files.sizes(dist)
    monkeypatch.setattr(files, "run", lambda *_: "")
    with pytest.raises(Wrong, match="do not belong together"):
        files.contents(dist)
    only_pure = Dist(dist.sdist, dist.pure, None)
    assert files.contents(only_pure)
    with zipfile.ZipFile(dist.pure, "a") as wheel:
        wheel.writestr("tests/__init__.py", "")
    with pytest.raises(Wrong, match=r"also holds \['tests/__init__.py'\]"):
        files.contents(only_pure)
    monkeypatch.setattr(files, "HELD", {"grasp/no_such.txt"})
    with pytest.raises(Wrong, match=r"lacks \['grasp/no_such.txt'\]"):
        files.contents(only_pure)


def test_a_check_says_its_line_and_how_long_it_took(tmp_path, monkeypatch):
    dist = made(tmp_path, SDIST, WHEEL)

    def fails(dist):
        raise Wrong("it is wrong: mend it")

    monkeypatch.setitem(check.CHECKS, "names", check.always(fails))
    well, line = check.outcome("names", dist)
    assert not well and re.fullmatch(r"FAILED +names: it is wrong: mend it \(\d+ s\)", line)
    well, line = check.outcome("abi", dist)
    assert well and line == "skipped  abi: there is no wheel with CUDA"
    monkeypatch.setattr(sys, "argv", ["check", "--dist", str(tmp_path), "names", "sizes"])
    with pytest.raises(SystemExit, match="failed: names"):
        check.main()
    monkeypatch.setattr(sys, "argv", ["check", "--dist", str(tmp_path), "sizes"])
    check.main()


def test_contributing_tells_each_check():
    told = (ROOT / "CONTRIBUTING.md").read_text()
    assert not [name for name in check.CHECKS if f"| `{name}` |" not in told]


def test_the_makefile_can_take_an_older_torch(tmp_path):
    command = ["make", "--no-print-directory", "-n", "test", "TORCH=2.11.0", f"VENV={tmp_path}/v"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (line,) = [x for x in said.splitlines() if x.startswith("sed ")]
    (tmp_path / "v").mkdir()
    subprocess.run(line, shell=True, cwd=ROOT, check=True)
    pins = (tmp_path / "v" / "constraints.txt").read_text().splitlines()
    assert [p for p in pins if re.match("(torch|triton)==", p)] == ["torch==2.11.0"]
    assert any(p.startswith("transformers==") for p in pins)
    assert f"-c {tmp_path}/v/constraints.txt" in said


@pytest.mark.parametrize("python", re.findall(r"Python :: (3\.\d+)", PROJECT))
def test_every_python_has_its_pins(python):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line.partition("#")[0]) for line in lines if line.partition("#")[0].strip()]
    here = [p.name for p in pins if not p.marker or p.marker.evaluate({"python_version": python})]
    assert sorted(here) == sorted({p.name for p in pins})  # one each


def test_cuda_12_compiles_every_kernel(tmp_path):
    """For one architecture, where that takes no time; `make check-wheels` takes all."""
    try:
        compiler = nvrtc.Compiler()
    except SystemExit as error:
        pytest.skip(str(error))
    sources = sorted((ROOT / "csrc").glob("*.cu"))
    assert sources and all(nvrtc.kernels(compiler(source, "80")) for source in sources)
    (tmp_path / "bad.cu").write_text("__global__ void f() { wgmma(); }")
    with pytest.raises(SystemExit, match="bad.cu does not compile for 80 by CUDA 12:(.|\n)*wgmma"):
        list(nvrtc.compiled(tmp_path))
    (tmp_path / "bad.cu").write_text("template <int N> __global__ void never_named() {}")
    with pytest.raises(SystemExit, match="bad.cu has no kernel"):
        list(nvrtc.compiled(tmp_path))


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("needs", "text", "wrong"),
    [
        (["torch"], "", None),
        ([], "", "does not name libtorch.so"),
        (["torch", "cudart"], "", r"needs \['cudart'\]"),
        (["torch"], "/home/us/site-packages/torch/include/a.h", "names folders of this machine"),
    ],
)
def test_what_the_library_asks_for_is_seen(tmp_path, needs, text, wrong):
    link = [COMPILER, "-shared", "-fPIC", "-x", "c++", "-o"]
    (tmp_path / "none.cpp").touch()
    (tmp_path / "one.cpp").write_text(f'extern "C" const char* said() {{ return "{text}"; }}')
    for name in needs:
        made = [*link, tmp_path / f"lib{name}.so", f"-Wl,-soname,lib{name}.so"]
        subprocess.run([*made, tmp_path / "none.cpp"], check=True)
    named = ["-Wl,--no-as-needed", "-L", tmp_path, *(f"-l{name}" for name in needs)]
    subprocess.run([*link, tmp_path / "one.so", tmp_path / "one.cpp", *named], check=True)
    with zipfile.ZipFile(tmp_path / WITH_CUDA, "w") as wheel:
        wheel.write(tmp_path / "one.so", library.MEMBER)
    dist = Dist(tmp_path / SDIST, tmp_path / WHEEL, tmp_path / WITH_CUDA)
    if wrong is None:
        assert "libtorch.so" in library.needed(dist)
    else:
        with pytest.raises(Wrong, match=wrong):
            library.needed(dist)
