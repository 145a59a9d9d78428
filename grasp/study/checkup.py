"""What commonly goes wrong on a machine: found, said with what to do, mended where that is safe.

No check loads a model, and none changes anything: a finding's `mend` does, when it is asked to.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from grasp.bases import cache
from grasp.model.precision import device_of
from grasp.study.model_map import ModelMap
from grasp.versions import installed, wanted
from grasp_kernels import dispatch, native

NEWEST_TRIED = "2.13"  # torch
LONG = 90  # days after which what is kept of a start counts as unused
SPARE = 2 * 10**9  # bytes of disk that a run and its checkpoints want
CLUSTERS = (9, 0)  # compute capability from which there is a CUDA kernel


@dataclass
class Finding:
    """What is wrong, in words, what to do, and how it is mended, if that is safe to do unasked."""

    what: str
    do: str
    command: str | None = None
    mend: Callable[[], str] | None = None
    """Does it, and says what it did; None where a person has to."""
    note: bool = False
    """Whether it is no fault, but good to know."""


def checkup(found: ModelMap | None = None) -> list[Finding]:
    """All findings on this machine, faults first.

    Args:
        found: of a model that is to be trained here.
    """
    checks = (_packages(), _accelerator(), _kernels(), _kept(), _leftovers(), _room(found))
    return sorted((f for check in checks for f in check), key=lambda f: f.note)


def _packages() -> Iterator[Finding]:
    for name, oldest in wanted().items():
        there = installed(name)
        if there is not None and _version(there) >= _version(oldest):
            continue
        what = f"{name} is missing" if there is None else f"{name} {there} is too old"
        command = _install(f"{name}>={oldest}", upgrade=there is not None)
        mend = None if name == "torch" else lambda c=command: _run(c)
        yield Finding(f"{what}; {oldest} or newer is needed.", "Install it.", _shown(command), mend)
    if (trl := installed("trl")) is not None and (oldest := wanted("dev").get("trl")):
        if _version(trl) < _version(oldest):
            command = _shown(_install(f"trl>={oldest}", upgrade=True))
            yield Finding(
                f"trl {trl} is older than {oldest}, the oldest tried.", "Update.", command
            )
    if installed("bitsandbytes") is None:
        yield Finding(
            "bitsandbytes is not installed: load_in_4bit and load_in_8bit need it.",
            "Install it if you want them.",
            _shown(_install(f"bitsandbytes>={wanted('qlora').get('bitsandbytes', '0.49')}")),
            note=True,
        )
    if _version(torch.__version__)[:2] > _version(NEWEST_TRIED):
        yield Finding(
            f"torch {torch.__version__} is newer than {NEWEST_TRIED}, the newest tried.",
            "The self-test says whether projections are right; where they are not, take an older.",
            _shown(_install(f"torch=={NEWEST_TRIED}.*")),
            note=True,
        )


def _accelerator() -> Iterator[Finding]:
    if torch.cuda.is_available() or not driver():
        return
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    linux = sys.platform == "linux"
    if torch.version.cuda is None and torch.version.hip is None:
        yield Finding(
            "There is an NVIDIA driver, but this torch is built for processors alone.",
            "Install torch with CUDA: pytorch.org gives the line for your driver"
            + ("; on Linux this is it as a rule" if linux else "")
            + ". torch is never replaced by --fix.",
            "pip install --force-reinstall torch" if linux else None,
        )
    elif hidden is not None and hidden.strip() in ("", "-1"):
        yield Finding(
            f"CUDA_VISIBLE_DEVICES={hidden!r} hides the GPU.",
            "Take it out of the environment.",
            "set CUDA_VISIBLE_DEVICES="
            if sys.platform == "win32"
            else "unset CUDA_VISIBLE_DEVICES",
        )
    elif torch.version.cuda is not None:
        yield Finding(
            f"There is an NVIDIA driver, but torch's CUDA {torch.version.cuda} finds no GPU by it.",
            "Look at what the driver says; if its CUDA is older than torch's, update the driver or "
            "install a torch for that CUDA.",
            "nvidia-smi",
        )


def driver() -> bool:
    """Whether an NVIDIA driver is on this machine."""
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def _kernels() -> Iterator[Finding]:
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return
    capability = torch.cuda.get_device_capability()
    if capability < dispatch.OLDEST:
        yield Finding(
            f"{torch.cuda.get_device_name()} has compute capability {_dotted(capability)}, and the "
            f"kernels need {_dotted(dispatch.OLDEST)}.",
            "Plain PyTorch runs in their place: right, and slower. There is nothing to do.",
            note=True,
        )
        return
    if reason := native.elsewhere("Triton"):
        if find_spec("triton") is None:  # others build it for Windows
            yield Finding(
                f"Plain PyTorch runs in place of kernels: {reason}.",
                "It is right, and slower. There is nothing to do.",
                note=True,
            )
        return
    if installed("triton") is None:
        command = _install("triton")
        yield Finding(
            "triton is missing beside a GPU, so that plain PyTorch runs in place of kernels.",
            "Install it.",
            _shown(command),
            lambda: _run(command),
        )
    if capability >= CLUSTERS and (reason := native.missing()):
        able = shutil.which("nvcc") and (_checkout() / "setup.py").exists()
        yield Finding(
            f"The CUDA kernel does not run, and Triton's does in its place: {reason}.",
            "Build it for this torch." if able else "Install the CUDA toolkit, then build it.",
            native.BUILD.partition(" (")[0],
            _build if able else None,
            note=not native.built(),
        )


def _checkout() -> Path:
    return native.LIBRARY.parent.parent


def _build() -> str:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return _run(command, cwd=_checkout(), env=os.environ | {"GRASP_CUDA": "1"})


def _kept() -> Iterator[Finding]:
    """Of starts: they are never cleaned up by themselves."""
    if (there := cache.survey(LONG)) is None:
        return
    where = f"What starts have found is kept in {there.path}: {size(there.bytes)}"
    if there.damaged:
        yield Finding(
            f"{where}, of which {len(there.damaged)} files are damaged or were never finished.",
            "They are passed over. Remove them.",
            "grasp doctor --fix",
            lambda: _remove(there.damaged),
        )
    if there.unused:
        yield Finding(
            f"{where}, of which {len(there.unused)} files ({size(_bytes(there.unused))}) served no "
            f"start for {LONG} days.",
            "Remove them: what is asked for again is found again.",
            "grasp doctor --fix",
            lambda: _remove(there.unused),
        )
    if not (there.damaged or there.unused):
        remove = "rmdir /s" if sys.platform == "win32" else "rm -r"
        all_of_it = f"{remove} {there.path}"
        yield Finding(f"{where}.", "It may be removed at any time.", all_of_it, note=True)


def _leftovers() -> Iterator[Finding]:
    part = native.LIBRARY.with_name(f"{native.LIBRARY.name}.part")
    if part.exists():
        yield Finding(
            f"A build of the CUDA library was cut off and left {part.name}.",
            "Remove it.",
            "grasp doctor --fix",
            lambda: _remove([part]),
        )


def clear_kernels() -> str:
    """Remove what Triton has compiled: a damaged kernel gives nonsense, and is compiled anew."""
    place = os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"
    if not Path(place).is_dir():
        return f"Nothing of Triton's is kept in {place}."
    shutil.rmtree(place)
    return f"Removed what Triton had compiled ({place})."


def _room(found: ModelMap | None) -> Iterator[Finding]:
    """Memory and disk, for a named model."""
    if found is None:
        return
    weights = found.memory["weights in bfloat16"]
    beside = found.memory[found.lora] + found.memory["outputs"] + found.memory[found.default]
    free, where = free_memory()
    if weights + beside > free:
        quarter = weights // 3  # nf4 with its scales; embeddings stay as they are
        fits = quarter + beside <= free
        yield Finding(
            f"{found.model} takes about {size(weights)} in bfloat16, a LoRA with its guard "
            f"{size(beside)}, and {size(free)} of {where} is free.",
            f"In 4 bits it takes about {size(quarter)}."
            if fits
            else "It does not fit here, in 4 bits either: take a smaller model, or several GPUs.",
            f"grasp finetune --model {found.model} --load_in_4bit" if fits else None,
        )
    left = shutil.disk_usage(Path.cwd()).free
    if left < (need := SPARE + found.memory[found.default]):
        yield Finding(
            f"{size(left)} of disk is free here, and a run may want {size(need)} with its bases "
            "and checkpoints.",
            "Free some, or write elsewhere.",
            "grasp finetune --output_dir ELSEWHERE",
        )


def free_memory() -> tuple[int, str]:
    """Bytes that are free where a model would lie, and where that is."""
    if (kind := device_of().type) in ("cuda", "xpu"):
        return getattr(torch, kind).mem_get_info()[0], "the GPU's memory"
    import psutil  # accelerate's

    return psutil.virtual_memory().available, "memory"


def size(count: float) -> str:
    """Bytes, in words."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB" if count < 1000 else f"{count:,.0f} GB"


def _remove(files: list[Path]) -> str:
    count = _bytes(files)
    for file in files:
        file.unlink(missing_ok=True)
        if not any(file.parent.iterdir()):
            file.parent.rmdir()
    return f"Removed {len(files)} files, {size(count)}."


def _bytes(files: list[Path]) -> int:
    return sum(f.stat().st_size for f in files if f.exists())


def _install(requirement: str, upgrade: bool = False) -> list[str]:
    more = ["--upgrade"] if upgrade else []
    return [sys.executable, "-m", "pip", "install", *more, requirement]


def _shown(command: list[str]) -> str:
    *words, requirement = command[2:]
    quote = '"' if sys.platform == "win32" else "'"  # cmd knows no other, and > writes a file there
    return " ".join([*words, f"{quote}{requirement}{quote}"])


def _run(command: list[str], **options) -> str:
    """Run it, and say what came of it; torch stays the one that is there."""
    if "pip" in command:
        command = [*command, f"torch=={torch.__version__}"]
    done = subprocess.run(command, capture_output=True, text=True, **options)
    said = " ".join(command[1:])
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "nothing was said").splitlines()[-1]
        return f"Tried {said}, which failed: {last}"
    return f"Did {said}. Start anew to use it."


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text.partition("+")[0])[:3])


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
