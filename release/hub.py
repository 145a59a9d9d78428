"""Lay `grasp_kernels` out as a kernel for the Kernel Hub, into dist/hub: `python -m release.hub`.

Python alone, for any torch ("torch-universal"): Triton compiles where it runs, and the CUDA library
stays in wheels. Several versions may be loaded into one process, and beside the package itself, so
the operators' names are made its own.
"""

import argparse
import hashlib
import json
import re
import shutil
import sys
from base64 import b64encode
from pathlib import Path
from tempfile import TemporaryDirectory

from release.wheels import DIST, ROOT, run

PACKAGE = ROOT / "grasp_kernels"
VERSION = 0  # of the kernel's interface; 0 by convention before it is stable
CARD = """---
license: apache-2.0
library_name: kernels
tags:
- kernel
---
# grasp-kernels

Projections of weights and gradients off a subspace, in Triton and in plain PyTorch.

```python
from kernels import get_local_kernel

gk = get_local_kernel("dist/hub")
gk.project_(weights, basis)  # in place, without the component along the basis
```
"""
LOADED = """
import sys
from pathlib import Path
import torch
from kernels import get_local_kernel
import grasp_kernels as gk

theirs = get_local_kernel(Path(sys.argv[1]))
T, U = torch.randn(5, 8), torch.eye(8)[:, :2]
project = torch.compile(theirs.project, backend="eager")
assert theirs is not gk and torch.equal(project(T, U), gk.project(T, U))
print(theirs.__name__)
"""


def renamed(source: str, name: str) -> str:
    """A module whose operators are `torch.ops.<name>`'s, and not `torch.ops.grasp`'s."""
    source = re.sub(r"\bgrasp(_native)?::", rf"{name}\1::", source)
    return re.sub(r"\bops\.grasp(_native)?\.", rf"ops.{name}\1.", source)


def identity(files: dict[str, str]) -> str:
    """A module's name that no other version has."""
    content = json.dumps(files, sort_keys=True).encode()
    return f"_grasp_kernels_universal_{hashlib.sha256(content).hexdigest()[:7]}"


def laid_out(out: Path) -> Path:
    """Write the kernel into an empty folder; returns where its one variant is."""
    files = {file.name: file.read_text() for file in sorted(PACKAGE.glob("*.py"))}
    name = identity(files)
    variant = out / "build" / "torch-universal"
    variant.mkdir(parents=True)
    for file, source in files.items():
        (variant / file).write_text(renamed(source, name))
    (variant / "metadata.json").write_text(json.dumps(metadata(variant, name), indent=2) + "\n")
    (out / "README.md").write_text(CARD)
    shutil.copy(ROOT / "LICENSE", out)
    return variant


def metadata(variant: Path, name: str) -> dict:
    digests = {
        file.name: b64encode(hashlib.sha256(file.read_bytes()).digest()).decode()
        for file in sorted(variant.glob("*.py"))
    }
    return {
        "name": "grasp-kernels",
        "id": name,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},  # the least that it runs on: a universal one has none
        "digest": {"algorithm": "sha256", "files": digests},
    }


def loaded() -> str:
    """The name of a kernel that is laid out, loaded and run beside the package."""
    with TemporaryDirectory() as folder:
        laid_out(Path(folder))
        said = run([sys.executable, "-c", LOADED, folder], cwd=ROOT, env={"HF_HUB_OFFLINE": "1"})
    return said.split()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DIST / "hub")
    out = parser.parse_args().out
    shutil.rmtree(out, ignore_errors=True)
    variant = laid_out(out)
    files = [file for file in out.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    print(f"{variant}: {len(files)} files, {size / 1e3:.0f} KB")


if __name__ == "__main__":
    main()
