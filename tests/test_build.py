"""How setup.py builds the library: on a small tree, with the C++ compiler in nvcc's place."""

import os
import select
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILER = shutil.which("c++") or shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

NVCC = f"""#!/bin/sh
[ "$1" = --list-gpu-arch ] && {{ echo compute_90; exit; }}
[ "$1" = --help ] && exit
for word; do
  shift
  case $word in
    -gencode=*|-Xcompiler|-Xlinker|-cudart|static|-nodlink|--keep|--keep-dir=*) ;;
    -fPIC,*) set -- "$@" -fPIC ;;
    cu) set -- "$@" c++ ;;
    --no-as-needed) set -- "$@" -Wl,$word ;;
    *) set -- "$@" "$word" ;;
  esac
done
eval "$BEFORE"
exec {COMPILER} "$@"
"""
FILES = {
    "setup.py": (ROOT / "setup.py").read_text(),
    "pyproject.toml": '[project]\nname = "small"\nversion = "1"\ndynamic = ["readme"]\n'
    '[tool.setuptools]\npackages = ["grasp_kernels"]\n',
    "README.md": "Small.\n",
    "grasp_kernels/__init__.py": "",
    "csrc/one.cuh": "constexpr int ONE = 1;\n",
    "csrc/one.cu": '#include "one.cuh"\nint one() { return ONE; }\n',
    "csrc/two.cu": "int two() { return 2; }\n",
    "csrc/bindings.cpp": "int one(), two();\nint three() { return one() + two(); }\n",
    "csrc/emulate.cpp": "#error for tests alone\n",
    "cuda/bin/nvcc": NVCC,
}
WITHOUT = {  # what setup.py looks for, taken away
    "nvcc": "shutil.which = lambda name, **k: None if name == 'nvcc' else which(name, **k)",
    "ninja": "shutil.which = lambda name, **k: None if name == 'ninja' else which(name, **k)",
    "torch": "importlib.util.find_spec = lambda name: None",
    "Linux": "import setuptools, sysconfig; sysconfig.get_config_vars(); sys.platform = 'other'",
    "setuptools": "import setuptools; setuptools.__version__ = '65.5.0'",
}


@pytest.fixture
def tree(tmp_path) -> Path:
    folder = tmp_path / "a $tree"  # with what ninja's files must escape
    for name, text in FILES.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (folder / "cuda/bin/nvcc").chmod(0o755)
    return folder


def settings(tree: Path, **env: str) -> dict[str, str]:
    home = {"GRASP_CUDA": "1", "CUDA_HOME": str(tree / "cuda")}
    return {**os.environ, **home, **env}


def build(tree: Path, *words: str, without: str | None = None, **env: str):
    hide = WITHOUT[without] if without else ""
    code = "import importlib.util, runpy, shutil, sys; which = shutil.which\n"
    code += f"{hide}\nrunpy.run_path('setup.py')"
    command = [sys.executable, "-c", code, *(words or ("build_ext", "--build-lib", "lib"))]
    done = subprocess.run(
        command, cwd=tree, env=settings(tree, **env), capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def library(tree: Path) -> Path:
    return tree / "lib/grasp_kernels/_native.so"


def compiled(said: str) -> set[str]:
    return {line.split("/")[-1].strip("'") for line in said.splitlines() if "] nvcc" in line}


def left_half_written(tree: Path) -> list[Path]:
    return list(tree.rglob("*.part"))


def test_an_unchanged_tree_does_nothing(tree):
    status, said = build(tree)
    assert status == 0, said
    assert compiled(said) == {"one.cu", "two.cu", "bindings.cpp", "_native.so"}
    before = library(tree).stat()
    status, said = build(tree)
    assert status == 0 and "no work to do" in said and not compiled(said)
    assert library(tree).stat() == before


def test_what_changed_is_made_anew_and_nothing_else(tree):
    build(tree)
    (tree / "csrc/one.cuh").write_text("constexpr int ONE = 11;\n")
    assert compiled(build(tree)[1]) == {"one.cu", "_native.so"}
    (tree / "csrc/three.cu").write_text("int four() { return 4; }\n")
    assert compiled(build(tree)[1]) == {"three.cu", "_native.so"}
    said = build(tree, GRASP_CUDA_ARCHS="80")[1]  # other flags
    assert compiled(said) >= {"one.cu", "two.cu", "three.cu", "bindings.cpp", "_native.so"}


def test_a_source_that_fails_stops_all(tree):
    build(tree)
    before = library(tree).read_bytes()
    (tree / "csrc/two.cu").write_text("#error this is no good\n")
    status, said = build(tree)
    assert status != 0 and "this is no good" in said
    assert "GRASP_CUDA=0 installs without the CUDA library" in said
    assert library(tree).read_bytes() == before and not left_half_written(library(tree).parent)


def test_a_linker_that_fails_leaves_no_library(tree):
    fails = 'case "$*" in *-shared*) for o; do :; done; echo half > "$o"; exit 1;; esac'
    status, said = build(tree, BEFORE=fails)
    assert status != 0 and "GRASP_CUDA=0" in said and not list(tree.rglob("*.so"))


def test_in_place(tree):
    status, said = build(tree, "build_ext", "--inplace")
    assert status == 0, said
    assert [f.name for f in (tree / "grasp_kernels").iterdir() if "_native" in f.name] == [
        "_native.so"
    ]
    assert not left_half_written(tree)


def test_as_many_compilers_as_wanted(tree):
    counts = 'mkdir "$ONE" || echo > "$ONE.two"; sleep 0.2; rmdir "$ONE"'
    status, said = build(tree, MAX_JOBS="1", BEFORE=counts, ONE=str(tree / "busy"))
    assert status == 0 and not (tree / "busy.two").exists(), said
    status, said = build(tree, MAX_JOBS="none")
    assert status != 0 and "MAX_JOBS is 'none'; give a number" in said


def runs(pid: str) -> bool:
    try:
        return Path("/proc", pid, "stat").read_text().rsplit(")")[-1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_ctrl_c_leaves_no_process(tree):
    """Python alone hears of it here, as from `kill`: a terminal tells ninja too."""
    fifo = tree / "started"
    os.mkfifo(fifo)
    heard = os.open(fifo, os.O_RDWR)
    process = subprocess.Popen(
        [sys.executable, "setup.py", "build_ext"],
        cwd=tree,
        env=settings(
            tree, BEFORE='echo $$ > "$FIFO"; exec sleep 600', FIFO=str(fifo), MAX_JOBS="2"
        ),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    started = b""
    while started.count(b"\n") < 2:
        assert select.select([heard], [], [], 120)[0], "no compiler started"
        started += os.read(heard, 4096)
    os.close(heard)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) != 0
    assert not [pid for pid in started.split() if runs(pid.decode())]


@pytest.mark.parametrize(
    "lacks, remedy",
    [
        ("nvcc", "no nvcc: install the CUDA toolkit or set CUDA_HOME"),
        ("ninja", "no ninja: pip install ninja"),
        ("torch", "no torch >= 2.11 to import: install it and use --no-build-isolation"),
        ("Linux", "no Linux: it is built for that alone"),
    ],
)
def test_what_is_lacking_is_said(tree, lacks, remedy):
    env = {"CUDA_HOME": ""} if lacks == "nvcc" else {}
    status, said = build(tree, without=lacks, **env)
    assert status != 0 and f"GRASP_CUDA=1, but {remedy}" in said
    status, said = build(tree, without=lacks, GRASP_CUDA="auto", **env)
    assert status == 0 and f"the CUDA library is left out: {remedy}" in said
    assert not list(tree.rglob("*.so"))


def test_a_setuptools_that_knows_less(tree):
    status, said = build(tree, without="setuptools", GRASP_CUDA="0")
    assert status != 0 and "pip install --upgrade 'setuptools>=77'" in said
    assert "Traceback" not in said


def test_wishes_that_are_none(tree):
    status, said = build(tree, GRASP_CUDA="yes")
    assert status != 0 and "choose auto, 0 or 1" in said
    status, said = build(tree, GRASP_CUDA_ARCHS="9.0")
    assert status != 0 and "GRASP_CUDA_ARCHS has '9.0'; write it like 80,90a,100" in said
    status, said = build(tree, GRASP_CUDA="0")
    assert status == 0 and not list(tree.rglob("*.so"))


def test_a_wheel_for_any_python(tree):
    status, said = build(tree, "bdist_wheel")
    assert status == 0, said
    (wheel,) = (tree / "dist").iterdir()
    assert wheel.name.startswith("small-1-py3-none-linux_")
    assert "grasp_kernels/_native.so" in zipfile.ZipFile(wheel).namelist()
    status, said = build(tree, "bdist_wheel", "--dist-dir", "without", GRASP_CUDA="0")
    assert [f.name for f in (tree / "without").iterdir()] == ["small-1-py3-none-any.whl"]


def test_the_version_says_which_cuda_it_is_for(tree):
    """Of an sdist too, whose setup.cfg says that there is no tag."""
    (tree / "setup.cfg").write_text("[egg_info]\ntag_build = \ntag_date = 0\n")
    status, said = build(tree, "bdist_wheel", GRASP_CUDA="0", GRASP_VERSION_TAG="+cu130")
    assert status == 0, said
    assert [f.name for f in (tree / "dist").iterdir()] == ["small-1+cu130-py3-none-any.whl"]
