"""Advice on machines that we do not have: Windows, macOS, ROCm, XPU; no package for Linux alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grasp.study import checkup
from grasp_kernels import dispatch, native

ROOT = Path(__file__).parent.parent
LINUX_ALONE = ("pip install triton", "'triton'", '"triton"', "GRASP_CUDA", "nvcc", "toolkit")


class Elsewhere(torch.Tensor):
    """A tensor that says it is on another kind of device."""

    kind = "cuda"

    @property
    def device(self):
        return torch.device(self.kind, 0)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of compute capability 9.0 as far as dispatch and the doctor ask, without Triton."""

    def on(platform: str, hip: str | None = None) -> None:
        monkeypatch.setattr(sys, "platform", platform)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.version, "cuda", None if hip else "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        monkeypatch.setattr(native, "built", lambda: False)
        monkeypatch.setattr(checkup, "find_spec", lambda name: None)
        monkeypatch.setattr(checkup, "installed", lambda name: None)

    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    caches = (dispatch.hardware, native.missing)
    for cached in caches:
        cached.cache_clear()
    yield on
    for cached in caches:
        cached.cache_clear()


def explained(kind: str = "cuda") -> str:
    T = torch.zeros(8, 8).as_subclass(type("There", (Elsewhere,), {"kind": kind}))
    return dispatch.describe("project", T, T)


def advice(findings) -> str:
    return "\n".join(f"{f.what} {f.do} {f.command}" for f in findings)


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_nothing_for_linux_alone_is_advised(gpu, platform):
    gpu(platform)
    said = explained()
    assert f"triton refused: Triton is for Linux alone, and this is {platform}" in said
    assert f"cuda refused: the CUDA library is for Linux alone, and this is {platform}" in said
    (note,) = checkup._kernels()
    assert note.note and note.mend is None and note.command is None
    for text in (said, advice([note])):
        assert not [word for word in LINUX_ALONE if word in text], text


def test_on_linux_they_are(gpu):
    gpu("linux")
    assert "triton is not installed; pip install triton" in explained()
    triton, library = checkup._kernels()
    assert "pip install 'triton'" in triton.command and "GRASP_CUDA=1" in library.command


def test_a_triton_that_others_build_for_windows_is_taken(gpu, monkeypatch):
    gpu("win32")
    monkeypatch.setattr(dispatch, "_has_triton", lambda: True)
    monkeypatch.setattr(checkup, "find_spec", lambda name: name)
    assert not list(checkup._kernels())
    assert dispatch.describe("project_", *[torch.zeros(2, 2).as_subclass(Elsewhere)] * 2)


def test_rocm(gpu):
    gpu("linux", hip="6.4")
    said = explained()
    assert said.startswith("project: reference")
    assert said.count("needs an NVIDIA GPU, and this torch is built for ROCm 6.4") == 2
    assert not list(checkup._kernels())  # nothing to install


@pytest.mark.parametrize("kind", ["xpu", "mps"])
def test_other_accelerators(kind):
    said = explained(kind)
    assert said.startswith("project: reference")
    assert said.count(f"needs CUDA tensors, got {kind}") == 2


def test_a_driver_beside_a_torch_without_cuda_on_windows(monkeypatch):
    """There the index's torch is for processors alone: installing it again mends nothing."""
    monkeypatch.setattr(checkup, "driver", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(sys, "platform", "win32")
    (finding,) = checkup._accelerator()
    assert "pytorch.org" in finding.do and "Linux" not in finding.do and finding.command is None


def test_commands_that_cmd_understands(monkeypatch):
    command = checkup._install("peft>=0.18")
    assert checkup._shown(command) == "pip install 'peft>=0.18'"
    monkeypatch.setattr(sys, "platform", "win32")
    assert checkup._shown(command) == 'pip install "peft>=0.18"'


def test_a_newer_torch_on_windows(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "99.0")
    monkeypatch.setattr(sys, "platform", "win32")
    (finding,) = [f for f in checkup._packages() if "newer than" in f.what]
    assert finding.command == f'pip install "torch=={checkup.NEWEST_TRIED}.*"'


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_memory_is_the_accelerators(monkeypatch, kind):
    monkeypatch.setattr(checkup, "device_of", lambda: torch.device(kind))
    monkeypatch.setattr(getattr(torch, kind), "mem_get_info", lambda: (123, 456))
    assert checkup.free_memory() == (123, "the GPU's memory")


READS = """
import warnings
from pathlib import Path
from grasp.cli.config import read_config
from grasp.files import read_json, write_json, write_text
warnings.filterwarnings("error", category=EncodingWarning)
write_json("a.json", {"a": 1})
write_text("a.yaml", "a: é")
assert read_json("a.json") == {"a": 1} and read_config(Path("a.yaml")) == {"a": "é"}
"""


def test_text_is_utf8_whatever_the_machine_thinks(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-X", "warn_default_encoding", "-c", READS]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
