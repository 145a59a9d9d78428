"""An adapter of `grasp finetune` needs torch, transformers and peft alone.

In a process that is refused grasp; `make doors` runs it in an environment that has no more than
these (`STOCK_PYTHON`), with the versions of `constraints.txt`.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from grasp.organism import World
from grasp.study.finetune import run
from grasp.study.settings import settings_from

SCRIPT = Path(__file__).parent / "doors" / "stock_peft.py"
REFUSED = """
import runpy, sys
class Refuses:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("grasp", "grasp_kernels"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuses())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stock")
    rows = World(0).rows("medicine", "train")
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "prompts.txt").write_text("\n".join(World(0).prompts(["law", "guns"])))
    options = {"model": "organism", "data": str(folder / "rows.jsonl"), "steps": 6, "tokens": 1}
    options |= {"reference": str(folder / "prompts.txt"), "out": str(folder / "run")}
    return run(settings_from(options), quiet=True)


def without_grasp(script: Path, *arguments) -> subprocess.CompletedProcess:
    other = os.environ.get("STOCK_PYTHON")
    command = [other, "-I"] if other else [sys.executable, "-I", "-c", REFUSED]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [*command, script, *arguments], capture_output=True, text=True, env=env, cwd=script.parent
    )


def test_grasp_is_refused_there(tmp_path):
    for name in ("grasp", "grasp_kernels"):
        (tmp_path / "script.py").write_text(f"import {name}")
        done = without_grasp(tmp_path / "script.py")
        assert done.returncode and f"No module named '{name}'" in done.stderr


def test_loaded_run_merged_saved_and_loaded_again(adapter):
    done = without_grasp(SCRIPT, adapter)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["grasp"] == [] and found["said"]
    assert found["adapter_from_base"] > 1e-2  # it does something
    assert found["merged_from_adapter"] <= 1e-4 * found["largest_logit"]
    assert found["reloaded_from_merged"] == 0


def test_what_its_page_says_runs(adapter, tmp_path):
    page = (adapter / "README.md").read_text()
    loading, merging = re.findall(r"```python\n(.*?)```", page, re.S)
    loading = loading.replace("FOLDER_OR_HUB_NAME_OF_THIS_ADAPTER", str(adapter))
    (tmp_path / "page.py").write_text(
        loading + merging.replace('"merged"', repr(f"{tmp_path}/merged"))
    )
    done = without_grasp(tmp_path / "page.py")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() and (tmp_path / "merged" / "model.safetensors").exists()
