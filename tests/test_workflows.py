"""CI's files: what they run, what they may do, and that they are right."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
HERE = Path(sys.executable).parent
ACTIONLINT = shutil.which("actionlint", path=f"{HERE}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda f: f.stem)
def test_ci_runs_what_runs_here(workflow):
    """Targets of the Makefile, but for what there is nothing to do with here."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    content = yaml.safe_load(workflow.read_text())
    assert content["permissions"] == {"contents": "read"} and content["concurrency"]["group"]
    for job in content["jobs"].values():
        for step in job.get("steps", ()):
            if "run" in step and not re.match("dnf |gh release ", step["run"]):
                assert re.fullmatch(r"make ([\w-]+)( [A-Z]+=\S*( }})?.*)?", step["run"].strip())
                assert step["run"].split()[1] in targets
            if "uses" in step:
                assert re.search(r"@(release/)?v\d+$|:\d+\.\d+\.\d+$", step["uses"]), step
        uploads = [s for s in job.get("steps", ()) if "pypi-publish" in s.get("uses", "")]
        trusted = job.get("permissions", {}).get("id-token") == "write"
        assert trusted == bool(uploads) == ("environment" in job)


@pytest.mark.skipif(ACTIONLINT is None, reason="no actionlint")
def test_workflows_are_right(tmp_path):
    assert WORKFLOWS
    bad = tmp_path / "bad.yml"
    bad.write_text(WORKFLOWS[0].read_text().replace("runs-on", "run-on"))
    for found, status in ((WORKFLOWS, 0), ([bad], 1)):
        done = subprocess.run([ACTIONLINT, "-no-color", *found], capture_output=True, text=True)
        assert done.returncode == status, done.stdout
