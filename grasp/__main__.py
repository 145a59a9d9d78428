"""The command line; where what it needs is not all installed, what it says of that."""

import platform
import sys
import warnings

from grasp import progress
from grasp.versions import installed, lacking

GET = "pip install 'grasp-kernels[hf]'   (in a checkout: pip install '.[hf]')"


def main() -> None:
    """Run the command line; where it will take long, something stands on the screen at once."""
    long = sys.argv[1:2] == ["finetune"] and "--help" not in sys.argv
    try:
        with progress.speaking(0 if long else None), progress.Stage("Loading PyTorch"):
            from grasp.cli import main as run
        run()
    except ModuleNotFoundError:
        if not (lacks := lacking()):
            raise
        sys.exit(bare(sys.argv[1:], lacks))


def bare(words: list[str], lacks: list[str]) -> int:
    """Answer with torch alone.

    Returns:
        The exit code: 0 where what was asked for is answered.
    """
    if words == ["--version"]:
        print(f"grasp-kernels {installed('grasp-kernels')}")
        return 0
    if words and words[0] == "doctor":
        print("\n".join(f"{name:12} {value}" for name, value in kernels().items()))
    said = (
        f"grasp: not all of what the commands need is installed. Missing: {', '.join(lacks)}.\n"
        f"To get it: {GET}\nThe kernels (import grasp_kernels) need torch alone."
    )
    asked = not words or "--help" in words
    print(said, file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 1


def kernels() -> dict[str, str]:
    """What the kernels run on here, and whether they are right."""
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # which nothing here needs
    import torch

    import grasp_kernels as gk
    from grasp_kernels.selftest import self_test

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        right = self_test(device)
    except AssertionError as error:
        right = f"WRONG: {error}"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton") or "not installed",
        "backend": gk.explain(torch.zeros(8, 8, device=device), torch.eye(8, 2, device=device)),
        "self-test": right,
    }


if __name__ == "__main__":
    main()
