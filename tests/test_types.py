"""A user's type checker sees the packages' annotations, and is content with what README tells."""

import inspect
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

import grasp_kernels as gk

ROOT = Path(__file__).parent.parent
SAMPLE = """
import torch
from torch import Tensor, nn

import grasp
import grasp_kernels as gk


def kernels(model: nn.Module, T: Tensor, V: Tensor) -> Tensor:
    with gk.backend("reference"):
        out: Tensor = gk.project(T, V, T @ V, side="left", check=True)
    gradients = [p.grad for p in model.parameters()]
    gk.project_(gradients, V)
    gk.project_(T, V, side="right")
    gk.project_([T, T], [V, V], [T, T])
    projector = gk.Projector([T], V, measure=True, check=True)
    projector()
    projector(gradients)
    energies: Tensor = projector.energies()
    ranks: list[Tensor] = gk.orthonormalize_([V], rtol=1e-6)
    text: str = gk.explain(T, V)
    print(text, energies, ranks)
    return gk.project_gradient(out, V[:, 0])


def guarded(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    subspaces: grasp.Subspaces = grasp.Subspaces.load("persona.safetensors")
    with grasp.Guard(model, subspaces, optimizer=optimizer) as guard:
        print(guard.leak())
"""
WRONG = "import grasp_kernels as gk\n\ngk.explain(1, side='up')\n"


def test_annotations_are_shipped():
    told = (ROOT / "pyproject.toml").read_text()
    for package in ("grasp", "grasp_kernels"):
        assert (ROOT / package / "py.typed").exists()
        (line,) = [x for x in told.splitlines() if x.startswith(f"{package} = [")]
        assert "py.typed" in line


def test_every_public_function_is_annotated():
    for name in gk.__all__:
        public = getattr(gk, name)
        functions = [public]
        if inspect.isclass(public):
            methods = inspect.getmembers(public, inspect.isfunction)
            called = ("__init__", "__call__")
            functions = [f for n, f in methods if n in called or not n.startswith("_")]
        for function in map(inspect.unwrap, functions):
            asked = set(inspect.signature(function).parameters) - {"self"}
            assert asked | {"return"} <= set(get_type_hints(function)), function


def test_a_strict_type_checker_accepts_what_a_user_writes(tmp_path):
    pytest.importorskip("mypy")
    files = {"right.py": SAMPLE, "wrong.py": WRONG}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    # From their source the packages' insides would be judged too, which no user sees.
    options = ["--strict", "--follow-imports", "silent", "--cache-dir", str(tmp_path)]
    command = [sys.executable, "-m", "mypy", *options, *(str(tmp_path / name) for name in files)]
    said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout
    errors = [line for line in said.splitlines() if "error:" in line]
    assert len(errors) == 3 and all("wrong.py:3" in line for line in errors), said
    assert '"int"; expected "Tensor"' in said and "Literal" in said
