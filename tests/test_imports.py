"""Imports go down only, and the slow ones happen when they are needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = ("files", "versions", "progress")
FLOORS = (
    *FILES,
    "model",
    "data",
    "bases",
    "guard",
    "integrations",
    "study",
    "organism",
    "cli",
)
ALONE = {"json", "os", "tempfile", "pathlib", "typing", "importlib", "collections"}
ALONE |= {"re", "contextlib", "contextvars", "shutil", "sys", "threading", "time", "tqdm"}


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = file.relative_to(ROOT).parts[: -node.level] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{module}.{a.name}" for a in node.names} | {module}
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


def test_kernels_run_from_any_place():
    """By relative imports alone, as a kernel hub loads them under a name of its own."""
    for file in (ROOT / "grasp_kernels").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level or not node.module.startswith("grasp_kernels"), file
            elif isinstance(node, ast.Import):
                assert not any(a.name.startswith("grasp_kernels") for a in node.names), file


def test_a_folder_imports_what_is_below_it():
    folders = {f.name for f in (ROOT / "grasp").iterdir() if (f / "__init__.py").exists()}
    assert folders == set(FLOORS) - set(FILES)
    for n, folder in enumerate(FLOORS[len(FILES) :], len(FILES)):
        for file in (ROOT / "grasp" / folder).rglob("*.py"):
            inside = {name.split(".")[1] for name in imported(file) if name.startswith("grasp.")}
            public = {name for name in inside if name not in FLOORS}
            assert inside - public <= set(FLOORS[: n + 1]), file
            assert folder == "cli" or not public, file  # the package's own names are for users
    for name in FILES:
        assert {n.split(".")[0] for n in imported(ROOT / "grasp" / f"{name}.py")} <= ALONE


def test_nothing_needs_another_tool():
    for file in (ROOT / "grasp").rglob("*.py"):
        if file.parent.name != "integrations":
            names = imported(file)
            assert not {n for n in names if n.split(".")[0] in ("axolotl", "llamafactory")}, file
            assert not {n for n in names if n.startswith("grasp.integrations")}, file


def test_the_package_loads_at_once():
    """Over torch itself, in seconds of a processor: a busy machine changes nothing."""
    code = (
        "import time, torch; start = time.process_time(); import grasp; "
        "print(time.process_time() - start)"
    )
    spent = [
        float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)
        for _ in range(3)
    ]
    assert min(spent) <= 0.3


def test_package_loads_without_transformers():
    assert not loaded_by("import grasp") & {"transformers", "peft", "matplotlib"}


@pytest.mark.parametrize("file", sorted((ROOT / "grasp").rglob("*.py")), ids=lambda f: f.stem)
def test_floors_of_grasp(file):
    names = imported(file)
    assert not {n for n in names if n.split(".")[0] in ("benchmarks", "tests")}
    if (file.parent.name, file.stem) not in (("guard", "trainer"), ("guard", "fit")):
        assert not {n for n in names if n.startswith("transformers") and "Trainer" in n}
    if file.parent.name != "model":
        attributes = {
            n.attr for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Attribute)
        }
        known_elsewhere = {"lora_A", "lora_B", "base_layer", "scaling", "o_proj", "down_proj", "nf"}
        assert not attributes & known_elsewhere
