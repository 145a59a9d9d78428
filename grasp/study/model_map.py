"""What of a model a guard covers, and what that takes: from its configuration, without weights."""

import re
from dataclasses import dataclass

from torch import nn

from grasp.guard.frozen import FREE, LARGE, bytes_of
from grasp.model import Architecture, Matrix, hollow, inspect
from grasp.model.experts import Stack, stacks_of
from grasp.model.modes import is_linear

LORA_R = 16
GROWN = 4  # directions of outputs that are blocked
ROLES = {  # by what a basis found in weights is made for; prompts cover all alike
    "writer": "writer",
    "value": "indirect writer",
    "hidden": "indirect writer",
    "reader": "reader",
    "other": "other",
}


@dataclass(frozen=True)
class Kind:
    """Matrices of one kind, in all blocks."""

    name: str
    role: str
    count: int
    d_out: int
    d_in: int


@dataclass(frozen=True)
class ModelMap:
    """What of a model a guard covers, in numbers of matrices and bytes."""

    model: str
    blocks: int
    width: int
    parameters: int
    covered: list[Kind]
    left_out: list[tuple[str, str]]
    """What is not covered, and why."""
    memory: dict[str, int]
    """Bytes, of a LoRA on all that is covered."""
    default: str
    """What of inputs a guard keeps if nothing is said: a key of `memory`."""
    lora: str = f"LoRA, r {LORA_R}"
    """The key of the LoRA's, with gradients and AdamW's moments."""


def mapped(name: str) -> ModelMap:
    """The map of a model, by the name that `load_model` takes.

    Raises:
        ValueError: as `hollow` and `inspect`.
    """
    model = hollow(name)
    found = inspect(model)
    matrices = [m for block in found.blocks for m in block.matrices]
    stacks = list(stacks_of(model))
    memory = _memory(model, matrices, stacks)
    # As the guard itself counts: `few_for`.
    large = bytes_of([*_inputs(matrices), *_of_experts(stacks)]) > LARGE
    return ModelMap(
        name,
        len(found.blocks),
        found.width,
        sum(p.numel() for p in model.parameters()),
        [*_kinds(found), *_experts(stacks)],
        _left_out(model, found, stacks),
        memory,
        f"{FREE} free" if large else "tracked",
    )


def _kinds(found: Architecture) -> list[Kind]:
    counts: dict[tuple, int] = {}
    for block in found.blocks:
        for m in block.matrices:
            name = _kind(m.name.removeprefix(f"{block.name}."))
            key = name, ROLES[m.role], m.out_features, m.in_features
            counts[key] = counts.get(key, 0) + 1
    return [Kind(name, role, n, *shape) for (name, role, *shape), n in counts.items()]


def _kind(place: str) -> str:
    """A map's name in its block, whichever of several alike it is."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", place)


def _experts(stacks: list[Stack]) -> list[Kind]:
    counts: dict[tuple, int] = {}
    for name, E, d_out, d_in in stacks:
        key = name.rpartition(".")[2], d_out, d_in
        counts[key] = counts.get(key, 0) + E
    return [Kind(f"experts.{name}", "expert", n, *shape) for (name, *shape), n in counts.items()]


def _left_out(model: nn.Module, found: Architecture, stacks: list[Stack]) -> list[tuple[str, str]]:
    said = []
    known = {id(m.module) for block in found.blocks for m in block.matrices}
    inside = {id(m) for block in found.blocks for m in block.module.modules()}
    head = model.get_output_embeddings()
    if stacks:
        said.append(("routers", "no linear maps; covered once a LoRA is on them"))
    for where, why in (
        (True, "no token of text runs through them, so training them is refused"),
        (False, "outside the blocks: covered once a LoRA is on them and text runs through"),
    ):
        others = [
            _kind(n)
            for n, m in model.named_modules()
            if is_linear(m) and id(m) not in known and m is not head and (id(m) in inside) == where
        ]
        if others:
            said.append((_listed(others), why))
    if model.get_input_embeddings() is not None:
        said.append(("embeddings", "a table and no linear map; trained, a warning names it"))
    if head is not None:
        said.append(("head", "no LoRA by default; covered once one is on it"))
    said.append(("norms", "no matrices; trained, a warning names them"))
    return said


def _listed(names: list[str]) -> str:
    kinds = list(dict.fromkeys(names))
    more = f" and {len(kinds) - 2} more kinds" if len(kinds) > 2 else ""
    return f"{len(names)} maps: {', '.join(kinds[:2])}{more}"


def _memory(model: nn.Module, matrices: list[Matrix], stacks: list[Stack]) -> dict[str, int]:
    inputs = [*_inputs(matrices), *_of_experts(stacks)]
    shapes = [(m.out_features, m.in_features) for m in matrices]
    shapes += [(E * d_out, E * d_in) for _, E, d_out, d_in in stacks]
    return {
        "weights in bfloat16": 2 * sum(p.numel() for p in model.parameters()),
        ModelMap.lora: sum(4 * 4 * LORA_R * (d_out + d_in) for d_out, d_in in shapes),
        "outputs": sum(4 * GROWN * d_out for d_out, _ in shapes),
        "tracked": bytes_of(inputs),
        f"{FREE} free": bytes_of(inputs, free=FREE),
        "frozen": 0,
    }


def _inputs(matrices: list[Matrix]) -> list[tuple[str, int, int]]:
    """As `bytes_of` takes them."""
    return [(m.takes_in, m.in_features, 1) for m in matrices]


def _of_experts(stacks: list[Stack]) -> list[tuple[str, int, int]]:
    return [(s.name, s.d_in, s.count) for s in stacks]
