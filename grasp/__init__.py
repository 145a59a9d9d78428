"""GRASP: fine-tune without picking up what nobody asked for."""

from importlib import import_module
from typing import TYPE_CHECKING

from grasp.versions import installed, lacking

if TYPE_CHECKING:
    from grasp.bases.discover import discover
    from grasp.bases.subspaces import Subspaces
    from grasp.data import Reference, default_prompts, draw
    from grasp.guard import Guard, init_lora_null
    from grasp.guard.trainer import GraspCallback
    from grasp.study.compare import compare
    from grasp.study.evaluate import evaluate

PLACES = {  # imported when first used: torch takes seconds, and so does transformers' Trainer
    "GraspCallback": "grasp.guard.trainer",
    "Guard": "grasp.guard",
    "Reference": "grasp.data",
    "Subspaces": "grasp.bases.subspaces",
    "compare": "grasp.study.compare",
    "default_prompts": "grasp.data",
    "discover": "grasp.bases.discover",
    "draw": "grasp.data",
    "evaluate": "grasp.study.evaluate",
    "init_lora_null": "grasp.guard",
}

__all__ = [
    "GraspCallback",
    "Guard",
    "Reference",
    "Subspaces",
    "compare",
    "default_prompts",
    "discover",
    "draw",
    "evaluate",
    "init_lora_null",
]


def __dir__() -> list[str]:
    return [*globals(), *PLACES, "__version__"]


def __getattr__(name: str):
    if name in PLACES:
        try:
            return getattr(import_module(PLACES[name]), name)
        except ModuleNotFoundError as error:
            if lacks := lacking():
                raise ModuleNotFoundError(
                    f"grasp.{name} needs {', '.join(lacks)}, which are missing: "
                    "pip install 'grasp-kernels[hf]'",
                    name=error.name,
                ) from error
            raise
    if name == "__version__":
        return installed("grasp-kernels")
    raise AttributeError(f"module 'grasp' has no attribute {name!r}")
