"""LLaMA-Factory, guarded: python examples/llama_factory/train.py examples/llama_factory/lora.yaml

`llamafactory-cli` takes no callbacks, `run_exp` does. On several GPUs: torchrun in python's place.
"""

import argparse
from pathlib import Path

import yaml
from llamafactory.train.tuner import run_exp

from grasp import GraspCallback, default_prompts


def main(arguments: list[str] | None = None, **changed) -> None:
    """
    Args:
        changed: keys of LLaMA-Factory, in place of the file's.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("--prompts", help="a file of one prompt a line, from unrelated topics")
    args = parser.parse_args(arguments)
    config = yaml.safe_load(Path(args.config).read_text()) | changed
    run_exp(config, callbacks=[GraspCallback(reference=args.prompts or default_prompts())])


if __name__ == "__main__":
    main()
