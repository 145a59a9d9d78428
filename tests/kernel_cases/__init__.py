"""Every kernel, a file each: what may be launched, and the launches whose speed is predicted.

To add a kernel: a file with `cases(chip)`, which gives a `Case` for each launch, and `jobs()`, all
configurations that its launcher can choose, and a line in `FAMILIES`.
"""

from . import factors, orthonormalize, project_cuda, strips

FAMILIES = {
    "strips": strips,
    "factors": factors,
    "project_cuda": project_cuda,
    "orthonormalize": orthonormalize,
}
