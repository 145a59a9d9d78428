"""GRASP: fine-tune without picking up what nobody asked for."""

from importlib import import_module

from grasp.bases.discover import discover
from grasp.bases.subspaces import Subspaces
from grasp.data import Reference, default_prompts, draw
from grasp.guard import Guard, init_lora_null
from grasp.study.compare import compare
from grasp.study.evaluate import evaluate
from grasp.versions import installed

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
    return [*globals(), "GraspCallback", "__version__"]


def __getattr__(name: str):
    if name == "GraspCallback":  # imported when first used: it loads transformers' Trainer
        return import_module("grasp.guard.trainer").GraspCallback
    if name == "__version__":
        return installed("grasp-kernels")
    raise AttributeError(f"module 'grasp' has no attribute {name!r}")
