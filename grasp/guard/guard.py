"""Keeps a fine-tune off a subspace.

    every backward       G ← G − U (Uᵀ G)          for each guarded weight's gradient
    every step           W ← W − U (Uᵀ W − C)      C = Uᵀ W when the guard was attached

With `reference`, unlabelled and unrelated prompts, the inputs that each matrix sees on them are
blocked as well, from the other side:

    every backward       G ← G − (G V) Vᵀ
    every step           W ← W − (W V − C) Vᵀ      V: see `bases.inputs`

and U may grow during training: every few steps the leading left singular vectors of the averaged
gradient of KL(base ‖ model) on the prompts join it.
"""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

import grasp_kernels as gk
from grasp.bases.growth import Growth
from grasp.bases.residual import matrix_bases
from grasp.bases.subspaces import Subspaces
from grasp.data import Reference
from grasp.files import write_bytes
from grasp.guard.gradients import Gradients
from grasp.guard.guarded import SAVED, Guarded, Projections
from grasp.guard.steps import Steps
from grasp.model import Architecture, Trained, inspect, processes


class Guard:
    """Keep every trained matrix of a decoder off a subspace while anyone's loop trains it.

    The forward pass stays bit for bit what it was. Use it as a context manager; leaving it removes
    all that it attached.

    Args:
        model: a `transformers` decoder, with a PEFT LoRA or with trainable weights.
        subspaces: bases in the residual stream, as `discover` finds them.
        optimizer: pin the weights after each of its steps, which makes the guard exact under any
            optimizer; without it the gradients alone are projected, and AdamW's scaling leaks.
        residual: project the gradient that flows back through each block's output too.
        indirect: guard value, gate and up matrices, which write through the frozen writers.
        reference: unlabelled prompts from unrelated topics (strings, token id lists, or a
            `Reference`): what each matrix takes in on them is blocked, and bases of its outputs
            grow, from `subspaces` or from nothing.
        growth: with a reference, how: the arguments of `Growth` (read, rank, tokenizer, …).

    Raises:
        ValueError: nothing to block, a model the subspaces were not found in, nothing trainable
            that can be guarded, or an adapter whose start rules the guarantee out (DoRA, PiSSA).
    """

    def __init__(
        self,
        model: nn.Module,
        subspaces: Subspaces | None = None,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        residual: bool = False,
        indirect: bool = True,
        reference: Reference | Sequence | None = None,
        **growth,
    ):
        if subspaces is None and reference is None:
            raise ValueError(
                "give subspaces (from grasp.discover) or reference (a list of prompts, such as "
                "grasp.default_prompts())"
            )
        if residual and subspaces is None:
            raise ValueError("residual=True projects along subspaces; give them")
        if growth and reference is None:
            raise ValueError(f"{min(growth)} says how a reference is used; give reference too")
        self.growth = None if reference is None else Growth(reference, **growth)
        if subspaces is None and self.growth.read == self.growth.rank == 0:
            raise ValueError("read and rank are 0 without subspaces: nothing is blocked; set one")
        self.model = processes.unwrapped(model)
        self.subspaces, self.optimizer = subspaces, optimizer
        self.residual, self.indirect = residual, indirect
        self.guarded: list[Guarded] = []
        self.steps = 0
        self._handles: list = []
        self.gradients = Gradients(self.guarded)
        self._weights: Projections | None = None

    def __enter__(self) -> "Guard":
        return self.attach()

    def __exit__(self, *error) -> None:
        self.detach()

    def attach(self, state: Path | str | None = None) -> "Guard":
        """What entering does; for callers without a `with` block.

        Args:
            state: written by `save`, to go on with a run that was cut off. Its optimizer and
                weights must be those of the same step.

        Raises:
            RuntimeError: it is attached already.
            ValueError: as the class says, or weights that are split over processes.
        """
        if self._handles:
            raise RuntimeError("this guard is attached already; detach it first")
        processes.refuse_sharded(self.model)
        if self.subspaces is not None:
            self.subspaces.check(self.model)
        found = inspect(self.model)
        trained = found.trained()
        self.guarded = self._match(found, trained)
        self.gradients = Gradients(self.guarded)
        self._warn(found, trained)
        if state is not None:
            self._load(Path(state))
        else:
            for g in self.guarded:
                self._check_start(g)
            if self.growth is not None:
                self.growth.start(self.model, self.guarded)
        try:
            self._hook(found)
        except BaseException:
            self.detach()
            raise
        return self

    def detach(self) -> None:
        """Remove every hook; the bases and the counts of `leak` stay."""
        if self._handles and self.growth is not None and self.gradients.came and not self.steps:
            warnings.warn(
                "gradients came but no step of a torch optimizer was seen, so no basis grew and "
                "nothing was blocked; pass optimizer=",
                stacklevel=3,
            )
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.gradients.pending.clear()
        self._forget()

    @property
    def divergences(self) -> list[tuple[int, float]]:
        """With a reference: the step and KL(base ‖ model) of each measurement."""
        return [] if self.growth is None else self.growth.divergences

    @property
    def bases(self) -> dict[str, Tensor]:
        """What each guarded parameter is kept off, `[d, k]` by name; empty ones left out."""
        return {g.name: g.basis for g in self.guarded if g.basis.shape[1]}

    def leak(self) -> dict[str, dict[str, float]]:
        """For each guarded module: what was blocked, and what got through.

        Returns:
            By name: `rank`; `blocked`, the share of the gradient's energy that lay in the basis
            and was removed; `through`, ‖Uᵀ ΔW‖ / ‖ΔW‖ of a LoRA's update, or ‖Uᵀ ΔW‖ / ‖W‖ of a
            weight trained itself.
        """
        self.gradients.count()
        return {g.name: g.leak() for g in self.guarded}

    def certificate(self) -> dict:
        """What was blocked and what got through by module, and how far the model moved.

        Returns:
            `modules` as `leak`; of a drift-guided run also `divergence`, the mean KL(base ‖ model)
            in nats per token on all reference prompts now, and `divergences` during training.
        """
        found: dict = {"modules": self.leak()}
        if self.growth is not None and isinstance(self.growth.reference, Reference):
            found["divergence"] = self.growth.reference.measure(self.model)
            found["divergences"] = self.divergences
        return found

    def save(self, path: Path | str) -> Path:
        """Write bases, pins, averages and the reference: what a resumed run must not make anew.

        Raises:
            OSError: it can't be written; an older file stays as it was.
        """
        self.gradients.count()
        tensors = {
            f"{key}.{g.name}": tensor.clone().contiguous()  # a shared basis is stored for each
            for g in self.guarded
            for key, tensor in g.saved().items()
        }
        if self.growth is not None:
            tensors |= self.growth.state_dict()
        names = [g.name for g in self.guarded]
        about = {"steps": self.steps, "divergences": self.divergences, "guarded": names}
        return write_bytes(path, save(tensors, metadata={"grasp_guard": json.dumps(about)}))

    def _load(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})["grasp_guard"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}
        except (SafetensorError, KeyError, OSError) as error:
            raise ValueError(f"{path} is no saved guard ({error})") from error
        if odd := {g.name for g in self.guarded} ^ set(about["guarded"]):
            odd = min(odd)
            raise ValueError(f"{path} is of another guard: {odd} is in one of them only")
        self.steps = about["steps"]
        for g in self.guarded:
            kept = {key: tensors.get(f"{key}.{g.name}") for key in SAVED}
            g.restore(kept)
        if self.growth is not None:
            self.growth.load_state_dict(tensors)
            self.growth.start(self.model, [g for g in self.guarded if g.remade])
            self.growth.divergences = [tuple(d) for d in about["divergences"]]

    def _match(self, found: Architecture, trained: list[Trained]) -> list[Guarded]:
        bases: dict[str, Tensor] = {}
        if self.subspaces is not None:
            bases = matrix_bases(found, self.subspaces, indirect=self.indirect)
        guarded = []
        for t in trained:
            grows = self.growth is not None and self.growth.rank > 0 and t.parameter.ndim > 1
            if t.matrix.name not in bases and not grows:
                continue
            size = t.matrix.out_features
            guarded.append(Guarded.of(t, bases.get(t.matrix.name, torch.zeros(size, 0))))
        if self.growth is not None and self.growth.read > 0:
            guarded += [Guarded.of(t, torch.zeros(t.size, 0)) for t in found.reading()]
        if not guarded:
            names = [t.name for t in trained] or found.untracked()
            raise ValueError(
                "the guard matches nothing that is trained: "
                + (
                    f"only {', '.join(names[:3])} … can be"
                    if names
                    else "no parameter requires grad"
                )
                + "; train attention and MLP matrices of the blocks that the subspaces name"
            )
        return guarded

    def _check_start(self, g: Guarded) -> None:
        """UᵀΔW = s (Uᵀ B) A stays 0 only if Uᵀ B starts there, for a basis that grows any U."""
        if g.trained.partner is None or g.trained.holds == "inputs":
            return
        B = g.parameter.detach().float()
        start = B if self.growth is not None else g.pinned
        if float(start.norm()) > 1e-4 * float(B.norm()):
            raise ValueError(
                f"{g.name} does not start at 0 (PiSSA, OLoRA, or an adapter trained before): its A "
                "would still move the factor; merge it and start from a fresh LoRA"
            )

    def _warn(self, found: Architecture, trained: list[Trained]) -> None:
        covered = {id(g.parameter) for g in self.guarded}
        open_ways = [
            t.name
            for t in trained
            if id(t.parameter) not in covered and t.matrix.role in ("writer", "value", "hidden")
        ] + found.untracked()
        if open_ways:
            warnings.warn(
                "the factor can still be written through trained modules that the guard does not "
                f"cover: {', '.join(open_ways[:8])}{' …' if len(open_ways) > 8 else ''}",
                stacklevel=4,
            )

    def _hook(self, found: Architecture) -> None:
        self._handles += self.gradients.hook()
        if self.residual:
            for block in found.blocks:
                if block.index in self.subspaces:
                    U = self.subspaces[block.index].to(next(block.module.parameters()).device)
                    self._handles.append(block.module.register_forward_hook(_residual_hook(U)))
        steps = Steps(_innermost(self.optimizer), [g.parameter for g in self.guarded])
        if self.optimizer is not None and not steps.moves(steps.optimizer):
            raise ValueError(
                "optimizer holds none of the guarded parameters; pass the one that trains the model"
            )
        # Without an optimizer bases grow between two steps of whichever moves what is guarded.
        if self.optimizer is not None or self.growth is not None:
            self._handles.append(steps.after(self._after_step))

    def _after_step(self) -> None:
        self.steps += 1
        self._pin()
        if self.growth is not None and self.growth.after_step(self.model, self.guarded, self.steps):
            self._forget()
            self._pin()

    def _pin(self) -> None:
        if self._weights is None:
            held = [g for g in self.guarded if g.basis.shape[1]]
            self._weights = Projections(held, gradients=False)
        self._weights()

    def _forget(self) -> None:
        self.gradients.forget()
        self._weights = None


def _innermost(optimizer):
    """The torch optimizer inside accelerate's wrapper, which has no hooks of its own."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _residual_hook(U: Tensor):
    def hook(module, args, output):
        if isinstance(output, tuple):
            return (gk.project_gradient(output[0], U), *output[1:])
        return gk.project_gradient(output, U)

    return hook
