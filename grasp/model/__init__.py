"""A decoder: what it is made of, how it is loaded, and the processes that train it."""

from grasp.model import memory, partitions, processes, sharding
from grasp.model.architecture import (
    Architecture,
    Block,
    Matrix,
    Trained,
    base_name,
    lora_factors,
    lora_update,
)
from grasp.model.hollow import hollow
from grasp.model.loading import (
    adapted,
    adapter_folder,
    known_as,
    load_adapter,
    load_model,
    load_tokenizer,
    loaded_as,
    with_lora,
)
from grasp.model.modes import asking, base_model, evaluating, given, resting, unfused
from grasp.model.probe import inspect

__all__ = [
    "Architecture",
    "Block",
    "Matrix",
    "Trained",
    "adapted",
    "adapter_folder",
    "asking",
    "base_model",
    "base_name",
    "evaluating",
    "given",
    "hollow",
    "inspect",
    "known_as",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "loaded_as",
    "lora_factors",
    "lora_update",
    "memory",
    "partitions",
    "processes",
    "resting",
    "sharding",
    "unfused",
    "with_lora",
]
