"""Which versions of what are installed."""

from importlib.metadata import PackageNotFoundError, version

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
