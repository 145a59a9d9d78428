"""What was measured, a line of JSON as soon as it is known: what comes later can't take it away."""

import json
import math
import os
from pathlib import Path

FILE = "gpu_check.jsonl"


class Lines:
    """Appends to a file that several processes write to, one after another."""

    def __init__(self, path: Path, **common):
        self.path, self.common = Path(path), common

    def add(self, **found) -> dict:
        """Write one line, on the disk when this returns; infinity and NaN as words."""
        line = plain(self.common | found)
        with self.path.open("ab") as file:
            if self._broken():
                file.write(b"\n")
            file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        return line

    def _broken(self) -> bool:
        """Whether a process died in the middle of its line."""
        with self.path.open("rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return False
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"

    def read(self) -> list[dict]:
        return read(self.path)


def plain(value):
    """As JSON has it; `float` gives back what JSON has no number for: "Infinity", "NaN"."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value if isinstance(value, (str, int, float)) or value is None else str(value)


def read(path: Path) -> list[dict]:
    """All lines that are whole; of a part that was run again, what it said the last time."""
    found: list[dict] = []
    for text in Path(path).read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if not isinstance(line, dict) or "part" not in line:
            continue
        if "begins" in line:
            found = [f for f in found if f["part"] != line["part"]]
        else:
            found.append(line)
    return found
