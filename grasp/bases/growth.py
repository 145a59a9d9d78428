"""How the bases of a guarded run are found on unlabelled, unrelated prompts.

Inputs: at the start, what each matrix takes in on the prompts (`inputs`). Outputs: while the run
trains, the leading left singular vectors of the averaged gradient of KL(base ‖ model) on them.
"""

import re
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

import grasp_kernels as gk
from grasp.bases.start import (
    Reading,
    base_digest,
    kept_reference,
    known,
    random_like,
    start,
)
from grasp.data import Continued, Reference
from grasp.model import Architecture, Trained, asking, evaluating, processes, sharding

DIRECTIONS = ("drift", "random", "shuffled", "bottom")


class Growing(Protocol):
    """A trained parameter whose basis may grow, as `guard.guarded` has it."""

    trained: Trained
    basis: Tensor  # [d, k]
    average: Tensor | None  # of the drift gradient, of what this process holds of the parameter

    def widen(self, basis: Tensor) -> None:
        """Take a basis whose leading columns are the present one's."""

    def laid(self, G: Tensor) -> Tensor:
        """What this process keeps of a gradient."""

    def drift(self) -> Tensor | None:
        """The average, of the parameter's shape."""


def check(
    read: float,
    read_rank: int | None,
    free_rank: int | None,
    rank: int,
    every: int,
    refresh: int,
    grow: int,
) -> None:
    """Refuse arguments of `Growth` that are out of their range.

    Raises:
        ValueError: names the argument, what came, and what to give.
    """
    for name, value in (("every", every), ("refresh", refresh), ("grow", grow)):
        if value < 1:
            raise ValueError(f"{name} is {value}; give 1 or more")
    if rank < 0:
        raise ValueError(f"rank is {rank}; give 0 or more")
    for name, value in (("read_rank", read_rank), ("free_rank", free_rank)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; give 1 or more, or None for no limit")
    if not 0 <= read < 1:
        raise ValueError(f"read is {read}; give a share from 0 up to 1, such as 0.97")


class Growth:
    """Finds bases from a reference and lets them grow.

    Args:
        reference: unlabelled prompts from unrelated topics: strings, token id lists, a `Reference`.
        read: share of the energy of each matrix's inputs that is blocked, measured on prompts of
            the reference that are held out, from 0 (none) up to 1.
        read_rank: largest k of such a basis; None sets no limit.
        free_rank: most directions of a matrix's inputs that are left to learn in. Where more would
            be, so many are drawn at random among them and all others blocked (of inputs wider
            than 1024, among those that hold little, without finding all that would be left), so
            that they are what is kept, and not what is blocked: 64 take a hundredth of the memory
            in a large model. None sets no limit.
        quick: look for them on the reference's own tokens alone. Else the model draws more, up to
            eight for each dimension of the widest input, while a basis holds less on held-out
            prompts than on its own. None is quick on a CPU.
        rank: largest k of a basis that grows; 0 lets none grow.
        tokenizer: for prompts that are strings.
        tokens: of the base model's continuation of each prompt that are looked at.
        drifted: continuations that a plain fine-tune gave (`grasp.draw`), looked at as well: text
            in which its drift shows.
        batch: prompts in each measurement.
        every: steps between two measurements of the drift gradient, while a basis has room; when
            all are full the divergence alone is measured, every `every · refresh` steps.
        refresh: steps between two growths.
        grow: directions that join at each growth.
        tolerance: bases grow only while KL(base ‖ model), in nats per token and averaged since the
            last growth, is above this.
        decay: of the average of drift gradients.
        directions: "drift", or a control with as many directions at the same steps: "random";
            "shuffled", which gives each matrix those of its like in another block; or "bottom", the
            last singular vectors in place of the leading ones.
        seed: of the prompts' order and of random directions.

    Raises:
        ValueError: an argument out of its range, or `drifted` that `draw` did not make, or given
            with a reference made already.
    """

    def __init__(
        self,
        reference: Reference | Sequence,
        *,
        read: float = 0.95,
        read_rank: int | None = None,
        free_rank: int | None = None,
        quick: bool | None = None,
        rank: int = 4,
        tokenizer=None,
        tokens: int = 96,
        drifted: Sequence[Continued] = (),
        batch: int = 8,
        every: int = 2,
        refresh: int = 4,
        grow: int = 2,
        tolerance: float = 0.0,
        decay: float = 0.9,
        directions: str = "drift",
        seed: int = 0,
    ):
        if directions not in DIRECTIONS:
            raise ValueError(f"directions is {directions!r}; choose among {', '.join(DIRECTIONS)}")
        check(read, read_rank, free_rank, rank, every, refresh, grow)
        for name, value in (("tokens", tokens), ("batch", batch)):
            if value < 1:
                raise ValueError(f"{name} is {value}; give 1 or more")
        if drifted and isinstance(reference, Reference):
            raise ValueError("reference is made already; give drifted when you make it")
        if any(isinstance(text, str) or len(text) != 2 for text in drifted):
            raise ValueError(
                "drifted holds something other than (ids, labels); give what grasp.draw returns"
            )
        if isinstance(reference, Reference):
            reference = reference.copy()  # whose order of prompts goes on by itself
        self.reference, self.tokenizer, self.drifted = reference, tokenizer, drifted
        self.read, self.quick = read, quick
        self.read_rank, self.free_rank = read_rank, free_rank
        self.rank, self.directions = rank, directions
        self.tokens, self.batch, self.seed = tokens, batch, seed
        self.every, self.refresh, self.grow = every, refresh, grow
        self.tolerance, self.decay = tolerance, decay
        self.generator = torch.Generator().manual_seed(seed)
        self.divergences: list[tuple[int, float]] = []
        """The step and KL(base ‖ model) of each measurement."""
        self.base: str | None = None
        """What the model is told apart by, if it was looked at; None where it was not."""

    def start(self, found: Architecture, guarded: Sequence[Reading]) -> None:
        """Look at the model before its run: its answers to the prompts, and what it takes in there.

        It is looked at as it is, adapters and all: training has not moved it yet.
        """
        of = known(found.model)
        self.base = base_digest(of)
        if not isinstance(self.reference, Reference):
            self.reference = kept_reference(
                found.model,
                of,
                self.reference,
                self.tokenizer,
                tokens=self.tokens,
                batch=self.batch,
                seed=self.seed,
                drifted=self.drifted,
            )
        if processes.several():
            self.reference = _of_first(self.reference)
        shuffled = _elsewhere(guarded) if self.directions == "shuffled" else {}
        reading = [g for g in guarded if g.trained.holds == "inputs"]
        if not reading:
            return
        takers: dict[str, list[Reading]] = {}
        for g in reading:
            source = shuffled.get(g.trained.name, g)
            takers.setdefault(source.trained.matrix.name, []).append(g)
        start(found, of, takers, list(self.reference.rows()), self)

    def after_step(self, model: nn.Module, guarded: Sequence[Growing], step: int) -> bool:
        """Measure and grow when it is time; whether a basis grew, so that weights must follow."""
        growing = [g for g in guarded if _has_room(g, self.rank)]
        if not growing:
            # Nothing needs the drift gradient any more; how far the model moves is still said.
            if step % (self.every * self.refresh) == 0:
                with evaluating(model), torch.no_grad():
                    self._divergence(model, step)
            return False
        if step % self.every == 0:
            self._measure(model, growing, step)
        return step % self.refresh == 0 and self._widen(growing, step)

    def state_dict(self) -> dict[str, Tensor]:
        state = {f"reference.{k}": v for k, v in self.reference.state_dict().items()}
        return state | {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.generator.set_state(state["generator"])
        found = {
            key.removeprefix("reference."): tensor
            for key, tensor in state.items()
            if key.startswith("reference.")
        }
        self.reference = Reference.from_state_dict(found, self.batch)

    def _measure(self, model: nn.Module, growing: Sequence[Growing], step: int) -> None:
        """Average the gradient of the divergence from the base on a few of the prompts."""
        parameters = [g.trained.parameter for g in growing]
        with evaluating(model), asking(parameters), torch.enable_grad():
            gradients = sharding.gradients(lambda: self._divergence(model, step), parameters, model)
        finite = processes.on_all([D is not None and bool(D.isfinite().all()) for D in gradients])
        for g, D, counts in zip(growing, gradients, finite, strict=True):
            if counts:
                D = g.trained.of(g.laid(D.float()))
                g.average = D if g.average is None else torch.lerp(D, g.average, self.decay)

    def _divergence(self, model: nn.Module, step: int) -> Tensor:
        divergence = self.reference.divergence(model, self.reference.sample())
        self.divergences.append((step, float(processes.from_first([divergence.detach()])[0])))
        return divergence

    def _widen(self, growing: Sequence[Growing], step: int) -> bool:
        """Let the leading directions of the averaged drift gradient join each basis."""
        recent = [kl for at, kl in self.divergences if at > step - self.refresh]
        if not recent or sum(recent) / len(recent) <= self.tolerance:
            return False
        growing = [g for g in growing if g.average is not None]
        shuffled = _elsewhere(growing) if self.directions == "shuffled" else {}
        fresh = processes.from_first(
            [self._fresh(g, shuffled.get(g.trained.name, g)) for g in growing]
        )
        grown = [torch.cat([g.basis, new], 1) for g, new in zip(growing, fresh, strict=True)]
        for g, W, rank in zip(growing, grown, gk.orthonormalize_(grown), strict=True):
            g.widen(W[:, : int(rank)])
        return True

    def _fresh(self, g: Growing, source: Growing) -> Tensor:
        count = min(self.grow, self.rank - g.basis.shape[1])
        fresh = _leading(g, count, source, bottom=self.directions == "bottom")
        return random_like(fresh, self.generator) if self.directions == "random" else fresh


def _has_room(g: Growing, rank: int) -> bool:
    if g.trained.holds == "inputs" or len(g.trained.shape) == 1:
        return False
    return g.basis.shape[1] < min(rank, g.basis.shape[0])


def _leading(g: Growing, count: int, source: Growing, bottom: bool = False) -> Tensor:
    """Leading directions of the averaged drift gradient outside the basis: `[d_out, count]`.

    For a control `source`, which has the average, is its like in another block, or the directions
    are the last that the average has, `bottom`.
    """
    D = source.drift()
    D = D if g.trained.side == "left" else D.mT  # [d_out, n]
    D = D - g.basis @ (g.basis.mT @ D)
    if min(D.shape) > 256 and not bottom:
        U, S = _range(D, count + 4)
    else:
        U, S, _ = torch.linalg.svd(D, full_matrices=False)
    if bottom:
        there = int((S > 1e-5 * S[0]).sum())  # the basis was taken out, which leaves noise
        return U[:, max(0, there - count) : there]
    return U[:, : int((S[:count] > 0).sum())]


def _range(D: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Leading left singular vectors `[d, count]` and values, by a random range finder.

    torch's own draws from the global generator, and dropout after it would be another. Source:
    Halko et al., arXiv:0909.4061, algorithm 4.4.
    """
    drawn = torch.randn(D.shape[1], count, generator=torch.Generator().manual_seed(0)).to(D)
    Q = torch.linalg.qr(D @ drawn).Q
    for _ in range(2):
        Q = torch.linalg.qr(D @ torch.linalg.qr(D.mT @ Q).Q).Q
    U, S, _ = torch.linalg.svd(Q.mT @ D, full_matrices=False)
    return Q @ U, S


def _elsewhere(guarded: Sequence) -> dict:
    """For each its like half of the blocks further on.

    Raises:
        ValueError: one has no like.
    """
    kinds: dict[tuple, list[Growing]] = {}
    for g in guarded:
        kind = (re.sub(r"\.\d+\.", ".", g.trained.name), g.trained.holds, g.trained.shape)
        kinds.setdefault(kind, []).append(g)
    if lone := [like[0].trained.name for like in kinds.values() if len(like) == 1]:
        raise ValueError(
            f"directions='shuffled' finds no other block with a matrix like {lone[0]}; leave it out"
        )
    return {
        g.trained.name: like[(i + len(like) // 2) % len(like)]
        for like in kinds.values()
        for i, g in enumerate(like)
    }


def _of_first(reference: Reference) -> Reference:
    """The first process's: the others drew theirs from logits that may differ in the last bit."""
    state = reference.state_dict()
    state = dict(zip(state, processes.from_first(list(state.values())), strict=True))
    return Reference.from_state_dict(state, reference.batch)
