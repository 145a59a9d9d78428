"""Imports go down only, and the slow ones happen when they are needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{a.name}" for a in node.names} | {node.module}
    return names


def loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(' '.join(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(out.stdout.split())


def test_kernels_need_torch_alone():
    assert not loaded_by("import grasp_kernels") & {"triton", "transformers", "peft", "grasp"}
    for file in (ROOT / "grasp_kernels").glob("*.py"):
        tops = {n.split(".")[0] for n in imported(file)}
        assert not tops & {"grasp", "transformers", "peft", "benchmarks", "tests"}, file


def test_package_loads_without_transformers():
    assert not loaded_by("import grasp") & {"transformers", "peft", "matplotlib"}


@pytest.mark.parametrize("file", sorted((ROOT / "grasp").rglob("*.py")), ids=lambda f: f.stem)
def test_floors_of_grasp(file):
    names = imported(file)
    assert not {n for n in names if n.split(".")[0] in ("benchmarks", "tests")}
    if file.name != "trainer.py":
        assert not {n for n in names if n.startswith("transformers") and "Trainer" in n}
    if file.name != "architecture.py":
        attributes = {
            n.attr for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Attribute)
        }
        known_elsewhere = {"lora_A", "lora_B", "base_layer", "scaling", "o_proj", "down_proj", "nf"}
        assert not attributes & known_elsewhere
