"""One place chooses; what it refused it explains; what was asked for by name runs or says why."""

import pytest

import grasp_kernels as gk
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
