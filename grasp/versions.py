"""Which versions of what are installed, and which are asked for."""

import re
from importlib.metadata import PackageNotFoundError, requires, version

RUN = ("grasp-kernels", "torch", "transformers", "peft", "trl", "accelerate")


def installed(name: str) -> str | None:
    """A package's version; None if it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def versions(names: tuple[str, ...] = RUN) -> dict[str, str]:
    """Of those that are installed, by package: by default of what a fine-tune runs."""
    return {name: found for name in names if (found := installed(name)) is not None}


def wanted(extra: str = "hf") -> dict[str, str]:
    """The packages that an extra and grasp itself ask for, each with its oldest version."""
    try:
        lines = requires("grasp-kernels") or []
    except PackageNotFoundError:
        return {}
    named = [re.match(r"([\w.-]+)>=([\w.]+)(?:;.*extra == \"(\w+)\")?", line) for line in lines]
    return {m[1]: m[2] for m in named if m and m[3] in (None, extra)}


def lacking(extra: str = "hf") -> list[str]:
    """The packages of an extra that are not installed."""
    return [name for name in wanted(extra) if installed(name) is None]
