"""The start of a guarded run: the base model's answers to the prompts, and what each map takes in.

Both are kept on disk (`cache`) and taken up by the next start of the same model and prompts.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

import grasp_kernels as gk
from grasp.bases.cache import Entry, fingerprint, folder
from grasp.bases.inputs import Read, input_bases
from grasp.bases.spectrum import InputBasis
from grasp.data import Reference, tokenized
from grasp.model import Architecture, Trained, processes, sharding
from grasp.progress import tell
from grasp_kernels.matrices import in_vectors

VERSION = 5  # of what is kept: raise it when what is found, or how, is another


class Reading(Protocol):
    """A trained parameter that is kept off a basis of its map's inputs, as `guard` has it."""

    trained: Trained

    def take(self, basis: InputBasis) -> None:
        """Be kept off it from now on."""

    def start(self) -> str:
        """What comes of that depends on this, besides the model and its prompts."""

    def found(self) -> tuple[dict, dict[str, Tensor]]:
        """What came of it; `V`, or `W`, is the same for all with one input that hold it."""

    def take_up(self, facts: dict, tensors: dict[str, Tensor]) -> None:
        """Come to what `found` gave."""


class Options(Protocol):
    """How bases of inputs are found: see `Growth`."""

    read: float
    read_rank: int | None
    free_rank: int | None
    quick: bool | None
    directions: str
    seed: int


def known(model: nn.Module) -> list | None:
    """What a model is known by; None where nothing is kept of it.

    That is so in several processes, which would all have to find the same on their disks.
    """
    if folder() is None or processes.several() or sharding.is_split(model):
        return None
    return fingerprint(model)


def base_digest(of: list | None) -> str | None:
    """SHA-256 of what a model is known by, its LoRAs left out."""
    if of is None:
        return None
    own = [(name, found) for name, found in of[-1] if ".lora_" not in name]
    return hashlib.sha256(json.dumps(own).encode()).hexdigest()


def kept_reference(model: nn.Module, of: list | None, prompts, tokenizer, **options) -> Reference:
    """A `Reference`, as it was made of this model and these prompts before, if it was.

    Args:
        of: what the model is `known` by.
    """
    rows = tokenized(prompts, tokenizer)
    about = None if of is None else [VERSION, of, rows, sorted(options.items())]
    entry = Entry("reference", about)
    for _, tensors in entry.parts():
        tell(f"The model's answers to the prompts are taken from an earlier start ({folder()}).")
        return Reference.from_state_dict(tensors, options["batch"])
    device = next(model.parameters()).device.type  # which decides how many are drawn at a time
    groups = _Groups(None if about is None else [*about, device])
    reference = Reference(model, rows, kept=groups, **options)
    entry.keep("reference", {}, reference.state_dict())
    groups.entry.drop()
    return reference


class _Groups:
    """What is drawn before the reference is whole."""

    def __init__(self, about: list | None):
        self.entry = Entry("drawn", about)

    def found(self) -> Iterator[tuple[list[int], list[list[int]], list[Tensor]]]:
        for facts, tensors in self.entry.parts():
            count = len(facts["prompts"])
            tell(f"{count} of the model's answers are taken from a start that was stopped.")
            yield facts["prompts"], facts["said"], [tensors["top"], tensors["base"]]

    def keep(self, prompts: list[int], said: list[list[int]], leading: list[Tensor]) -> None:
        facts = {"prompts": prompts, "said": said}
        self.entry.keep(str(prompts[0]), facts, dict(zip(("top", "base"), leading, strict=True)))


def start(
    found: Architecture,
    of: list | None,
    takers: Mapping[str, Sequence[Reading]],
    rows: Sequence[Read],
    options: Options,
) -> None:
    """Find what each map takes in, and keep what is trained off it.

    Args:
        found: the model.
        of: what it is `known` by.
        takers: who is kept off what a map takes in, by the map's name.
        rows: as `input_bases`.
    """
    generator = torch.Generator().manual_seed(options.seed)
    device = next(found.model.parameters()).device
    entry = Entry("inputs", _about(of, device.type, takers, rows, options))
    waiting, all_ = dict(takers), len(takers)
    for facts, tensors in entry.parts():
        tensors = {
            name: in_vectors(T.to(device)) if name in ("V", "W") else T.to(device)
            for name, T in tensors.items()
        }
        for name in facts:
            for g in waiting.pop(name, ()):
                own = {k.removeprefix(f"{g.trained.name}/"): T for k, T in tensors.items()}
                g.take_up(facts[name][g.trained.name], own)
    matrices = {m.name: m for block in found.blocks for m in block.matrices}
    matrices |= {m.name: m for m in found.outside}
    if len(waiting) < all_:
        taken = f"{all_ - len(waiting)} of {all_} inputs of its layers"
        tell(f"What the model takes in at {taken} is known from an earlier start ({folder()}).")
    if not waiting:
        return
    bases = input_bases(
        found,
        [matrices[name] for name in waiting],
        rows,
        options.read,
        rank=options.read_rank,
        bottom=options.directions == "bottom",
        quick=options.quick,
        free=options.free_rank,
    )
    for names, basis in bases:
        if options.directions == "random":
            basis = replace(basis, directions=random_like(basis.directions, generator))
        (directions,) = processes.from_first([basis.directions])
        # And what is said of it: rounding may differ from one process to the next.
        said = {name: getattr(basis, name) for name in ("complement", "share", "sample")}
        said = processes.object_from_first(said)
        basis = replace(basis, directions=in_vectors(directions), **said)
        facts: dict[str, dict] = {}
        tensors: dict[str, Tensor] = {}
        for name in names:
            facts[name] = {}
            for g in takers[name]:
                g.take(basis)
                facts[name][g.trained.name], own = g.found()
                shared = {"V", "W"} & own.keys()
                tensors |= {k: own[k] for k in shared}
                tensors |= {f"{g.trained.name}/{k}": own[k] for k in own.keys() - shared}
        entry.keep(names[0], facts, tensors)


def _about(
    of: list | None,
    device: str,
    takers: Mapping[str, Sequence[Reading]],
    rows: Sequence[Read],
    options: Options,
) -> list | None:
    if of is None or options.directions != "drift":
        return None
    starts = [(name, g.trained.name, g.start()) for name, all_ in takers.items() for g in all_]
    chosen = [options.read, options.read_rank, options.free_rank, options.quick]
    return [VERSION, of, list(rows), chosen, device, starts]


def random_like(V: Tensor, generator: torch.Generator) -> Tensor:
    """As many orthonormal directions as `V [d, k]` has, drawn at random."""
    drawn = torch.randn(V.shape, generator=generator).to(V)
    gk.orthonormalize_(drawn)
    return drawn
