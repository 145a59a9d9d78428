"""What is in dist/, as checks see it."""

from dataclasses import dataclass
from pathlib import Path


class Wrong(Exception):
    """A check failed: what was found, and what to do."""


@dataclass
class Dist:
    """The files of a release; no wheel with CUDA where none was built."""

    sdist: Path
    pure: Path
    with_cuda: Path | None

    @property
    def wheels(self) -> list[Path]:
        return [wheel for wheel in (self.pure, self.with_cuda) if wheel is not None]


def found_in(folder: Path) -> Dist:
    """The release in a folder.

    Raises:
        Wrong: it has too few files or too many.
    """
    kinds = ("*.tar.gz", "*-any.whl", "*linux*.whl")
    files = [sorted(folder.glob(f"grasp_kernels-{kind}")) for kind in kinds]
    counts = [len(these) for these in files]
    if counts[:2] != [1, 1] or counts[2] > 1:
        names = [file.name for these in files for file in these]
        raise Wrong(f"{folder} holds {names}, not one release: run `make wheels`")
    return Dist(files[0][0], files[1][0], files[2][0] if files[2] else None)
