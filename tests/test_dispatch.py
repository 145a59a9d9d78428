"""One place chooses; what it refused it explains; what was asked for by name runs or says why."""

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import grasp_kernels as gk
from grasp_kernels import dispatch, native
from grasp_kernels.testing import orthonormal

T, V = orthonormal(8, 4, seed=9).mT.contiguous(), orthonormal(8, 2)


def test_explains_choice_and_refusals():
    text = gk.explain(T, V)
    assert text.splitlines()[0] == "project: reference"
    assert "cuda refused: needs CUDA tensors, got cpu" in text
    assert "triton refused: needs CUDA tensors, got cpu" in text


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_asked_for_by_name_or_refused(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with gk.backend(name), pytest.raises(RuntimeError, match=f"'{name}' can't run project"):
        gk.project(T, V)
    gk.project(T, V)
    monkeypatch.setenv("GRASP_BACKEND", name)
    with pytest.raises(RuntimeError, match="can't run"):
        gk.project_(T.clone(), V)
    with gk.backend("reference"):
        gk.project(T, V)


def test_unknown_name(monkeypatch):
    with pytest.raises(ValueError, match="cuda, triton, reference"), gk.backend("numpy"):
        pass
    monkeypatch.setenv("GRASP_BACKEND", "fast")
    with pytest.raises(ValueError, match="GRASP_BACKEND is 'fast'"):
        gk.project(T, V)


def on(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix and a basis that say they are there: shapes without numbers."""
    with FakeTensorMode():
        return torch.empty(64, 32, device=device), torch.empty(32, 4, device=device)


@pytest.fixture
def machine(monkeypatch):
    """Has torch say what it would with the given hardware; returns the devices asked about."""

    def set_up(hip=None, capability=(9, 0), missing=None, built=False) -> list[torch.device]:
        asked = []
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda d: asked.append(d) or capability
        )
        monkeypatch.setattr(native, "missing", lambda: missing)
        monkeypatch.setattr(native, "built", lambda: built)
        monkeypatch.setattr(dispatch, "_has_triton", lambda: True)
        return asked

    def forget():
        dispatch.hardware.cache_clear()
        dispatch._warn_of_a_fault.cache_clear()

    forget()
    yield set_up
    forget()


@pytest.mark.parametrize(
    "hip, capability, reason",
    [
        ("6.4.1", (9, 4), "built for ROCm 6.4.1"),
        (None, (7, 5), "needs compute capability 8.0, and cuda:0 has 7.5"),
        (None, (6, 1), "needs compute capability 8.0, and cuda:0 has 6.1"),
    ],
)
def test_hardware_that_no_kernel_is_for(machine, monkeypatch, hip, capability, reason):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    machine(hip, capability)
    lines = gk.explain(*on("cuda")).splitlines()
    assert lines[0] == "project: reference"
    assert [line.split()[0] for line in lines[1:]] == ["cuda", "triton"]
    assert all(reason in line for line in lines[1:])
    assert dispatch.choose("orthonormalize_", on("cuda")[1]) == "reference"
    for name in ("cuda", "triton"):
        with gk.backend(name), pytest.raises(RuntimeError, match=reason):
            dispatch.choose("project", *on("cuda"))


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_hardware_that_kernels_are_for(machine, capability):
    asked = machine(None, capability, missing="not built")
    pairs = [on("cuda") for _ in range(5)]
    assert {dispatch.choose("project", *pair) for pair in pairs} == {"triton"}
    assert asked == [torch.device("cuda", 0)]  # once a device
    assert "cuda refused: not built" in gk.explain(*pairs[0])


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_other_devices_run_the_reference(machine, device):
    asked = machine()
    assert dispatch.choose("project", *on(device)) == "reference"
    assert f"triton refused: needs CUDA tensors, got {device}" in gk.explain(*on(device))
    assert not asked


class AppleSilicon(TorchDispatchMode):
    """Refuses what the device can't hold, as it does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.device.type == "mps" and t.dtype == torch.float64:
                raise TypeError(f"{func}: MPS has no float64")
        return out


def test_nothing_is_fp64_on_mps(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other: self)  # needs the device itself
    with FakeTensorMode(), AppleSilicon():
        W = torch.empty(32, 4, device="mps")
        with pytest.raises(TypeError, match="MPS has no float64"):
            W.double()
        ranks = gk.orthonormalize_([W, W.bfloat16()])
        assert {r.device.type for r in ranks} == {"mps"}


def test_a_library_that_fails_is_heard_of_once(machine):
    machine(missing="_native.so does not load", built=True)
    with pytest.warns(RuntimeWarning, match="can't be used: _native.so does not load") as heard:
        for _ in range(3):
            assert dispatch.choose("project", *on("cuda")) == "triton"
    assert len(heard) == 1 and "\n" not in str(heard[0].message)


def test_a_library_that_was_never_built_is_no_fault(machine):
    machine(missing="the library is not built", built=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose("project", *on("cuda")) == "triton"


def test_an_operation_without_a_kernel_is_refused(monkeypatch):
    """Where the device would do."""
    assert ("cuda", "orthonormalize_") in dispatch.WITHOUT
    monkeypatch.setattr(dispatch, "WITHOUT", {("triton", "orthonormalize_")})
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with gk.backend("triton"), pytest.raises(RuntimeError, match="no kernel for orthonormalize_"):
        gk.orthonormalize_(T.clone())
