"""The kernels as the Kernel Hub has them: loaded beside the package, and the same each time."""

import pytest
import torch

import grasp_kernels as gk
from release import hub


def test_hub(tmp_path, monkeypatch):
    """Beside the package itself, with operators of its own."""
    kernels = pytest.importorskip("kernels")
    hub.laid_out(tmp_path)
    theirs = kernels.get_local_kernel(tmp_path)
    assert theirs is not gk and theirs.__name__.startswith("_grasp_kernels_universal_")
    T, U = torch.randn(5, 8), torch.eye(8)[:, :2]
    assert torch.equal(theirs.project(T, U), gk.project(T, U))
    compiled = torch.compile(theirs.project, backend="eager")(T, U)
    assert torch.equal(compiled, gk.project(T, U))
    assert hasattr(getattr(torch.ops, theirs.__name__), "project")
    assert sorted(theirs.__all__) == sorted(gk.__all__)


def test_what_the_hub_gets_is_of_this_content_alone(tmp_path):
    first = hub.laid_out(tmp_path / "1")
    second = hub.laid_out(tmp_path / "2")
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes()
        assert "grasp::" not in file.read_text() and "ops.grasp." not in file.read_text()
    assert {f.name for f in first.glob("*.py")} == {f.name for f in hub.PACKAGE.glob("*.py")}
    assert hub.identity({"a.py": "1"}) != hub.identity({"a.py": "2"})
