"""Write a file whole or not at all."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

WIDTH = 100  # columns, beyond which an object takes a line for each key


def write_bytes(path: Path | str, content: bytes) -> Path:
    """Write through a temporary file beside `path`, so that a full disk leaves the old one.

    Raises:
        OSError: naming the path and the reason; nothing half-written stays behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        os.unlink(temporary)
        raise OSError(
            error.errno, f"can't save {path} ({error.strerror}); free space or choose another place"
        ) from error
    return path


def write_text(path: Path | str, text: str) -> Path:
    return write_bytes(path, text.encode())


def write_json(path: Path | str, content: Any) -> Path:
    """Write JSON to be read and compared by people too: what a list holds takes a line each.

    Raises:
        ValueError: the content holds NaN or infinity.
        OSError: as `write_bytes`.
    """
    return write_text(path, _json(content) + "\n")


def _json(content: Any, indent: str = "") -> str:
    line = json.dumps(content, allow_nan=False)
    inner = indent + "  "
    if isinstance(content, dict) and len(indent + line) > WIDTH:
        lines = [f"{json.dumps(str(k))}: {_json(v, inner)}" for k, v in content.items()]
        opening, closing = "{}"
    elif isinstance(content, (list, tuple)) and any(isinstance(v, (dict, list)) for v in content):
        lines = [json.dumps(v, allow_nan=False) for v in content]
        opening, closing = "[]"
    else:
        return line
    joined = f",\n{inner}".join(lines)
    return f"{opening}\n{inner}{joined}\n{indent}{closing}"


def read_json(path: Path | str) -> Any:
    """Read JSON, or say which file is not.

    Raises:
        ValueError: the file holds no JSON.
        FileNotFoundError: there is no such file.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON ({error}); delete it or give another") from error
