"""Keeps a fine-tune off a subspace.

    every backward       G ← G − U (Uᵀ G)          for each guarded weight's gradient
    every step           W ← W − U (Uᵀ W − C)      C = Uᵀ W when the guard was attached

With `reference`, unlabelled and unrelated prompts, the inputs that each matrix sees on them are
blocked as well, from the other side:

    every backward       G ← G − (G V) Vᵀ
    every step           W ← W − (W V − C) Vᵀ      V: see `bases.inputs`

and U may grow during training: every few steps the leading left singular vectors of the averaged
gradient of KL(base ‖ model) on the prompts join it. With frozen inputs A is put off V once and does
not train (`guard.frozen`), so that no V is kept.
"""

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import grasp_kernels as gk
from grasp.bases.growth import Growth
from grasp.bases.residual import matrix_bases
from grasp.bases.subspaces import Subspaces
from grasp.data import Reference
from grasp.guard import checks
from grasp.guard.certificate import certificate, finite
from grasp.guard.clock import Clock, timed
from grasp.guard.frozen import Frozen, few_for, frozen_of
from grasp.guard.gradients import Gradients
from grasp.guard.guarded import Guarded, Projections, averaged, blocked_bases
from grasp.guard.kinds import weights_of
from grasp.guard.matching import match, nothing
from grasp.guard.residual import hook_residual
from grasp.guard.state import frozen_as, load, save
from grasp.guard.steps import Steps, averages, in_backward, innermost
from grasp.guard.watch import Watch
from grasp.guard.weights import Whole
from grasp.guard.zero import Zero, ZeroGradients, ZeroSteps, find, optimizer_of
from grasp.model import Architecture, inspect, processes, sharding
from grasp.progress import Stage
from grasp_kernels.autocast import set_aside


class Guard:
    """Keep every trained matrix of a decoder off a subspace while anyone's loop trains it.

    The forward pass stays bit for bit what it was. Use it as a context manager; leaving it removes
    all that it attached.

    Args:
        model: a `transformers` decoder, with a PEFT LoRA or with trainable weights, or its engine.
        subspaces: bases in the residual stream, as `discover` finds them.
        optimizer: pin the weights after each of its steps, which makes the guard exact under any
            optimizer; without it the gradients alone are projected, and AdamW's scaling leaks.
        residual: project the gradient that flows back through each block's output too.
        indirect: guard value, gate and up matrices, which write through the frozen writers.
        reference: unlabelled prompts from unrelated topics (strings, token id lists, or a
            `Reference`): what each matrix takes in on them is blocked, and bases of its outputs
            grow, from `subspaces` or from nothing.
        freeze_inputs: put each LoRA's A off the inputs that are blocked, and train B alone: no
            basis of inputs is kept, nothing is projected on that side, and it holds under any
            optimizer. None does so where every A is frozen already.
        growth: with a reference, how: the arguments of `Growth` (read, rank, tokenizer, …).

    Raises:
        ValueError: nothing to block, a model the subspaces were not found in, nothing trainable
            that can be guarded, or what can't be (DoRA, weights trained themselves in 16 bits).
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
        freeze_inputs: bool | None = None,
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
        if freeze_inputs and (self.growth is None or self.growth.read == 0):
            raise ValueError(
                "freeze_inputs=True puts A off inputs, but none are blocked; give reference, and "
                "read above 0"
            )
        self.wrapped, self.model = model, processes.unwrapped(model)
        self.subspaces, self.residual, self.indirect = subspaces, residual, indirect
        self.optimizer = optimizer_of(model, optimizer)
        self._free_rank = None if self.growth is None else self.growth.free_rank  # as asked for
        self.freeze_inputs = freeze_inputs
        self.architecture: Architecture | None = None
        """Of the model, as it was when it was attached."""
        self.guarded: list[Guarded] = []
        self.frozen: list[Frozen] = []
        self.watch = Watch(self.model)
        self.inputs_file: Path | None = None
        """Where the bases of inputs were last saved."""
        self.steps = 0
        self.starting, self.clock = Clock(self.model), Clock(self.model)
        self.gradients = Gradients(self.guarded, model, self.clock)
        self.zero: Zero | None = None
        self._handles: list = []
        self._steps = Steps()
        self._known: list[Whole] = []
        self._named: dict[str, nn.Parameter] = {}  # what is guarded, by the model's own names
        self._weights: Projections | None = None
        self._averages: dict[int, list[gk.Projector]] = {}  # by optimizer

    def __enter__(self) -> "Guard":
        return self.attach()

    def __exit__(self, *error) -> None:
        self.detach()

    def attach(self, state: Path | str | None = None) -> "Guard":
        """What entering does; a parameter has one guard, so one left behind on it is detached.

        Args:
            state: written by `save`, to go on with a run that was cut off. Its optimizer and
                weights must be those of the same step.

        Raises:
            RuntimeError: it is attached already.
            ValueError: as the class says, or weights split over processes, but by FSDP2.
        """
        if self._handles:
            raise RuntimeError("this guard is attached already; detach it first")
        with Stage("Preparing the guard"), self.starting, set_aside():  # as the weights are
            sharding.reshard(self.model)
            sharding.refuse(self.model)
            self.zero = find(self.wrapped, self.optimizer)
            if self.subspaces is not None:
                self.subspaces.check(self.model)
            found = inspect(self.model)
            trained = found.trained()
            checks.refuse_rounded(trained, self.zero is not None)
            checks.refuse_dead_ends(found)
            weights = weights_of([*trained, *found.reading()], self.zero)
            self._known = list(weights.values())
            self.steps, self.inputs_file = 0, None
            if state is None:
                for weight in weights.values():
                    weight.remember()
            self.architecture = found
            self.frozen = self._frozen(found, weights, state)
            self.guarded = match(
                found,
                weights,
                self._written(found),
                grows=self.growth is not None and self.growth.rank > 0,
                reads=self.growth is not None and self.growth.read > 0 and not self.frozen,
            )
            if not (self.guarded or self.frozen):
                raise ValueError(nothing(found))
            kind = Gradients if self.zero is None else ZeroGradients
            self.gradients = kind(self.guarded, self.wrapped, self.clock)
            held = {id(g.parameter) for g in [*self.guarded, *self.frozen]}
            self._named = {n: p for n, p in self.model.named_parameters() if id(p) in held}
            checks.tell_open(found, trained, [*self.guarded, *self.frozen])
            if state is not None:
                load(self, Path(state), self._known)
            elif self.growth is not None:
                self.growth.start(found, [*self.guarded, *self.frozen])
            self.watch = Watch(self.model)
            checks.tell_held(self.guarded, 0 if self.growth is None else self.growth.rank)
            checks.take_over(self, [t.parameter for t in trained])
            try:
                self._hook(found)
            except BaseException:
                self.detach()
                raise
        return self

    def detach(self) -> None:
        """Remove every hook and let what was frozen train; bases and the counts of `leak` stay."""
        if self._handles and self.growth is not None and self.gradients.came and not self.steps:
            warnings.warn(
                "gradients came but no step of a torch optimizer was seen, so no basis grew and "
                "nothing was blocked; pass optimizer=",
                stacklevel=3,
            )
        while self._handles:
            self._handles.pop().remove()
        for f in self.frozen:
            f.release()
        self.gradients.pending.clear()
        self._forget()

    @property
    def divergences(self) -> list[tuple[int, float]]:
        """With a reference: the step and KL(base ‖ model) of each measurement."""
        return [] if self.growth is None else self.growth.divergences

    @property
    def bases(self) -> dict[str, Tensor]:
        """What each guarded parameter is kept off, `[d, k]` by name; empty ones left out.

        Where what is left is kept in its place this is made anew, of up to d² numbers each.
        """
        return blocked_bases(self.guarded)

    @set_aside()
    def leak(self) -> dict[str, dict[str, float]]:
        """For each guarded module: what was blocked, and what got through.

        Returns:
            By name: `rank`; `blocked`, the share of the gradient's energy that lay in the basis
            and was removed; `through`, ‖Uᵀ ΔW‖ / ‖ΔW‖ (or ‖ΔW V‖ / ‖ΔW‖) of the weight's change ΔW
            since training began, a LoRA's update or a weight trained itself.
        """
        self.gradients.count()
        return {g.name: g.leak() for g in [*self.guarded, *self.frozen]}

    @set_aside()
    def certificate(self) -> dict:
        """What was blocked and what got through of the weights as they are now.

        Returns:
            As `certificate.certificate`: whether it `holds`, what got `through`, and `modules`; of
            a drift-guided run also `divergence`, the mean KL(base ‖ model) in nats per token on
            all reference prompts now, and `divergences` during training.

        Raises:
            RuntimeError: it was never attached.
        """
        self._check_guarded()
        self.gradients.count()
        uncovered = [*self.watch.uncovered, *self.replaced()]
        found = certificate(self.guarded, self.frozen, uncovered)
        grows = self.growth is not None and self.growth.rank > 0
        found["stepped"] = bool(self.steps) or not (grows and self.gradients.came)
        found["holds"] = found["holds"] and found["stepped"]
        if self.growth is not None and isinstance(self.growth.reference, Reference):
            found["divergence"] = finite(self.growth.reference.measure(self.model))
            found["divergences"] = [(step, finite(kl)) for step, kl in self.divergences]
        return found

    def replaced(self) -> list[str]:
        """Guarded parameters that the model has others in place of."""
        sharding.reshard(self.model)
        now = dict(self.model.named_parameters())
        return [n for n, p in self._named.items() if n in now and now[n] is not p]

    def is_of(self, model: nn.Module) -> bool:
        """Whether the guarded parameters are a model's."""
        sharding.reshard(model)
        there, held = {id(p) for p in model.parameters()}, [*self.guarded, *self.frozen]
        return bool(held) and all(id(g.parameter) in there for g in held)

    def pin(self) -> None:
        """Hold the weights as they are now: an average of earlier ones, for example, once loaded.

        Raises:
            RuntimeError: it was never attached.
        """
        self._check_guarded()
        sharding.reshard(self.model)
        Projections([g for g in self.guarded if g.basis.shape[1]], gradients=False)()
        self.publish()

    @set_aside()
    def judge_by(self, state: Path | str) -> None:
        """Take the bases of a saved state, such as that of the best model, which is kept.

        Raises:
            ValueError: as `attach`.
        """
        load(self, Path(state), self._known)

    @property
    def split(self) -> bool:
        """Whether weights are split over processes: all must ask for what the guard tells, then."""
        return any(weight.split for weight in self._known)

    def save(self, path: Path | str, *, everyone: bool = False) -> Path:
        """Write bases, pins, averages and the reference: what a resumed run must not make anew.

        The bases of inputs lie in a file of their own beside it, which later states share. Of a
        model that is `split` every process calls this, and the first writes, or `everyone`.

        Raises:
            OSError: it can't be written; an older file stays as it was.
        """
        self.gradients.count()
        return save(self, Path(path), everyone)

    def _check_guarded(self) -> None:
        if not (self.guarded or self.frozen):
            raise RuntimeError("nothing is guarded yet; attach first")

    def _written(self, found: Architecture) -> dict[str, Tensor]:
        if self.subspaces is None:
            return {}
        return matrix_bases(found, self.subspaces, indirect=self.indirect)

    def _frozen(
        self, found: Architecture, weights: dict[tuple, Whole], state: Path | str | None
    ) -> list[Frozen]:
        if self.growth is None or self.growth.read == 0:
            return []
        asked = found.reading(), weights, self.freeze_inputs
        self.growth.free_rank = self._free_rank
        frozen = frozen_of(*asked) if state is None else frozen_as(*asked[:2], Path(state))
        if state is None and any(f.asked for f in frozen) and sharding.is_wrapped(self.wrapped):
            checks.refuse_late(self.freeze_inputs)
            return []
        if not frozen and self._free_rank is None and state is None:
            self.growth.free_rank = few_for(*asked, self.growth.read_rank)
        return frozen

    def _hook(self, found: Architecture) -> None:
        self._handles += self.gradients.hook()
        if self.residual:
            self._handles += hook_residual(found, self.subspaces)
        partners = [g.trained.partner for g in self.guarded if g.partner]
        partners += [f.trained.partner for f in self.frozen]
        self._steps = Steps([*(g.parameter for g in self.guarded), *partners])
        if self.zero is not None:
            self._steps = ZeroSteps(self.zero)
            self._handles.append(self._steps.after_all(self._after_all))
        elif self.optimizer is not None and not self._steps.moves(innermost(self.optimizer)):
            raise ValueError(
                "optimizer holds none of the guarded parameters; pass the one that trains the "
                "model, and none that steps inside the backward pass (layer-wise optimizers)"
            )
        self._handles.append(self._steps.before(self._before_step))
        self._handles.append(self._steps.after(self._after_step))

    def _before_step(self, optimizer: torch.optim.Optimizer) -> None:
        if in_backward():
            raise RuntimeError(
                f"{type(optimizer).__name__} steps inside the backward pass, before its gradients "
                "are projected and bases can grow; let an optimizer step after the backward pass"
            )
        self._steps.begin(optimizer)
        self.gradients.before_step()

    @timed
    @set_aside()
    def _after_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.watch.look(optimizer)
        pins = not (self.optimizer is self.growth is self.zero is None)  # else gradients alone
        if pins:
            self._pin(optimizer)
            if self.steps == 0:  # of A little may be left off V, and rounding be much of that
                self._pin(optimizer)
        if self._steps.end(optimizer) and pins:
            self._after_all(optimizer)

    @timed
    @set_aside()
    def _after_all(self, optimizer: torch.optim.Optimizer) -> None:
        self.steps += 1
        if self.growth is None:
            return
        with self.gradients.deaf():
            grew = self.growth.after_step(self.model, self.guarded, self.steps)
        if grew:
            self._forget()
            self._pin(optimizer)
            self.publish()

    def publish(self) -> None:
        """Let the weights follow what was written in their place."""
        if self.zero is not None:
            self.zero.publish()

    def _pin(self, optimizer: torch.optim.Optimizer) -> None:
        if self._weights is None:
            held = [g for g in self.guarded if g.basis.shape[1]]
            self._weights = Projections(held, gradients=False)
        self._weights()
        if id(optimizer) not in self._averages:
            shown = partial(averages, optimizer)
            self._averages[id(optimizer)] = averaged(self.guarded, shown)
        for projector in self._averages[id(optimizer)]:
            projector()

    def _forget(self) -> None:
        self.gradients.forget()
        self._weights = None
        self._averages.clear()
