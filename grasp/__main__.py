import sys

from grasp import progress


def main() -> None:
    """Run the command line; where it will take long, something stands on the screen at once."""
    long = sys.argv[1:2] == ["finetune"] and "--help" not in sys.argv
    with progress.speaking(0 if long else None), progress.Stage("Loading PyTorch"):
        from grasp.cli import main as run
    run()


if __name__ == "__main__":
    main()
