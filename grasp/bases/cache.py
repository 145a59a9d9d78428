"""What a start has found, on disk: the next one of the same model and prompts takes it up.

An entry is named by all that it depends on: every weight of the model, its configuration, the token
ids, and the options. Each part is written as soon as it is found, so that a start that was killed
goes on.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from grasp.files import write_bytes
from grasp.model import lora_factors
from grasp.progress import Stage

VARIABLE = "GRASP_CACHE"
OFF = ("", "0", "off", "false", "no")
WRITING = 3600  # seconds after which nobody writes a part any more


def folder() -> Path | None:
    """Where entries lie: `GRASP_CACHE`, or a folder of the user's cache; None if that is off."""
    chosen = os.environ.get(VARIABLE)
    if chosen is not None:
        return None if chosen.lower() in OFF else Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "grasp"


class Entry:
    """Parts of one kind, of one model and setting.

    Args:
        kind: a folder's name.
        about: what the entry depends on, as JSON can hold it; None keeps and finds nothing.
    """

    def __init__(self, kind: str, about: object | None):
        base = None if about is None else folder()
        key = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()
        self.path = None if base is None else base / kind / key[:32]

    def parts(self) -> Iterator[tuple[dict, dict[str, Tensor]]]:
        """Facts and tensors of each part that is whole."""
        if self.path is None or not self.path.is_dir():
            return
        for path in sorted(self.path.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    facts = json.loads((file.metadata() or {})["facts"])
                    tensors = {name: file.get_tensor(name) for name in file.keys()}
            except (SafetensorError, KeyError, OSError, ValueError):
                continue  # it is found anew, and written over
            with suppress(OSError):
                os.utime(path)  # when it was last of use: `survey`
            yield facts, tensors

    def keep(self, name: str, facts: dict, tensors: dict[str, Tensor]) -> None:
        """Write a part; a disk that is full or closed to us costs the next start, not this one."""
        if self.path is None:
            return
        whole = {k: T.detach().cpu().contiguous() for k, T in tensors.items()}
        digest = hashlib.sha256(name.encode()).hexdigest()[:16]
        content = save(whole, metadata={"facts": json.dumps(facts)})
        try:
            write_bytes(self.path / f"{digest}.safetensors", content)
        except OSError:
            self.path = None

    def drop(self) -> None:
        """Delete it."""
        if self.path is not None:
            shutil.rmtree(self.path, ignore_errors=True)


class Survey(NamedTuple):
    """What is kept on disk."""

    path: Path
    bytes: int
    damaged: list[Path]  # parts that can't be read, and what a killed process left half-written
    unused: list[Path]  # whole parts that served no start for long


def survey(days: float) -> Survey | None:
    """What is kept, with what served no start for so many days; None where nothing is."""
    base = folder()
    if base is None or not base.is_dir():
        return None
    now, size = time.time(), 0
    damaged: list[Path] = []
    unused: list[Path] = []
    for path in sorted(p for p in base.glob("*/*/*") if p.is_file()):
        age, size = now - path.stat().st_mtime, size + path.stat().st_size
        if path.suffix != ".safetensors":
            if age > WRITING:
                damaged.append(path)
        elif not _is_whole(path):
            damaged.append(path)
        elif age > days * 86400:
            unused.append(path)
    return Survey(base, size, damaged, unused)


def _is_whole(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return "facts" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def fingerprint(model: nn.Module) -> list:
    """What tells a model from every other: its kind, configuration, and a digest of each weight.

    A LoRA's A does nothing while B is 0, and is left out.
    """
    idle = {id(A) for _, A, B, _ in lora_factors(model) if not bool(B.detach().any())}
    config = model.config.to_dict() if hasattr(model.config, "to_dict") else {}
    for name in ("_name_or_path", "name_or_path", "transformers_version"):
        config.pop(name, None)
    weights = [*model.named_parameters(), *model.named_buffers()]
    digests = []
    with Stage("Looking for an earlier start of this model", len(weights), "weights") as stage:
        for name, T in weights:
            if id(T) not in idle:
                digests.append((name, digest(T)))
            stage.update()
    return [type(model).__name__, config, digests]


def digest(T: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    T = T.detach().cpu().contiguous()
    return hashlib.sha256(T.flatten().view(torch.uint8).numpy()).hexdigest()
