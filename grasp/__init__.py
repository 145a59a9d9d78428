"""GRASP: fine-tune without picking up what nobody asked for."""

from importlib import import_module

from grasp.compare import compare
from grasp.data import default_prompts
from grasp.discover import discover
from grasp.drift import Reference, draw
from grasp.evaluate import evaluate
from grasp.guard import Guard
from grasp.subspaces import Subspaces

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
]


def __getattr__(name: str):
    if name == "GraspCallback":  # imported when first used: it loads transformers' Trainer
        return import_module("grasp.trainer").GraspCallback
    raise AttributeError(f"module 'grasp' has no attribute {name!r}")
