"""A LoRA's A put off what its map takes in, and not trained: nothing is left to hold.

    A ← s A (I − V Vᵀ)      ⇒      ΔW V = B A V = 0, whatever becomes of B

under any optimizer, in any number of processes, and V need not be kept. s keeps ‖A‖ what it was,
so that B learns at a rate that does not depend on how much was taken out. Of A V, which rounding
leaves, the Gram matrix is kept: with it ‖ΔW V‖² = tr(B (A V)(A V)ᵀ Bᵀ) for any B.
"""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grasp.bases.cache import digest
from grasp.bases.growth import Growth
from grasp.bases.spectrum import InputBasis
from grasp.guard.weights import Whole, exact
from grasp.model import Trained, inspect, lora_factors

LARGE = 2**30  # bytes of bases of inputs above which they are not kept, if nothing else is said
FREE = 64  # directions that are left free in their place
LITTLE = 1e-2  # of ‖A‖: if no more is left off V it stays as small
FILLED = 0.7  # of d: how many directions a basis has, about, with the default read


@dataclass
class Frozen:
    """A LoRA's A that does not train, with what is known of it."""

    trained: Trained  # the A, that holds inputs
    weight: Whole
    partner: Whole  # the B
    asked: bool  # whether it asked for gradients before
    rank: int = 0
    share: float | None = None
    """Of the energy of its map's inputs on held-out prompts, what V holds."""
    left: Tensor | None = None
    """(A V)(A V)ᵀ `[r, r]` fp64."""
    size: float = 0.0
    """‖A V‖ / ‖A‖ before A was put off V."""
    digest: str = ""

    @property
    def name(self) -> str:
        return self.trained.name

    @property
    def parameter(self) -> nn.Parameter:
        return self.trained.parameter

    def take(self, basis: InputBasis) -> None:
        """Put A off a basis, and freeze it."""
        with torch.no_grad():
            A = exact(self.weight.now())
            inside = basis.inside(A)
            size = A.norm()
            self.size = float(inside.norm() / size)
            for _ in range(2):  # V is orthonormal to rounding alone, and little may be left of A
                A = A - basis.inside(A)
            self.weight.put(A * (size / A.norm()) if A.norm() > LITTLE * size else A)
            left = basis.inside(exact(self.weight.now()))
        self.left = (left @ left.mT).cpu()
        self.rank, self.share = basis.rank, basis.share
        self.freeze()
        self.digest = digest(self.weight.now())

    def freeze(self) -> None:
        """Take A out of training; an optimizer passes over what has no gradient."""
        self.parameter.requires_grad_(False)
        self.parameter.grad = None

    def release(self) -> None:
        """Let A train again, if it did."""
        self.parameter.requires_grad_(self.asked)

    @property
    def still(self) -> bool:
        """Whether A is bit for bit what it was when it was put off V."""
        return digest(self.weight.now()) == self.digest

    def start(self) -> str:
        """What a kept finding depends on besides the model and its prompts: the A of now."""
        return digest(self.weight.now())

    def found(self) -> tuple[dict, dict[str, Tensor]]:
        """What `take` came to, as facts and tensors."""
        return self.saved(), {"A": self.weight.now(), "left": self.left}

    def take_up(self, facts: dict, tensors: dict[str, Tensor]) -> None:
        """Come to what `found` gave."""
        with torch.no_grad():
            self.weight.put(tensors["A"])
        self.restore(facts, tensors["left"])

    def leak(self) -> dict[str, float]:
        """As of what is tracked; no gradient comes, so none is blocked."""
        return {"rank": self.rank, "blocked": 0.0, "through": self.through()}

    def through(self) -> float:
        """‖ΔW V‖ / ‖ΔW‖."""
        A, B = exact(self.weight.now()), exact(self.partner.now())
        inner = (B.mT @ B).cpu()
        size = float((inner * (A @ A.mT).cpu()).sum().clamp_min(0).sqrt())
        inside = float((inner * self.left).sum().clamp_min(0).sqrt())
        return inside / size if size else inside

    def saved(self) -> dict:
        """What a resumed run must not make anew, but for `left`."""
        return {"rank": self.rank, "share": self.share, "size": self.size, "digest": self.digest}

    def restore(self, saved: dict, left: Tensor) -> None:
        """Take back what `saved` gave."""
        self.rank, self.share, self.size = saved["rank"], saved["share"], saved["size"]
        self.digest, self.left = saved["digest"], left
        self.freeze()


def frozen_of(
    reading: Sequence[Trained], weights: dict[tuple, Whole], freeze: bool | None
) -> list[Frozen]:
    """Of what reads inputs, what is to be frozen.

    Args:
        reading: parameters that are kept off inputs.
        weights: all that are trained, by their keys, as they were remembered.
        freeze: what was asked for; None takes those that do not train as they are.

    Raises:
        ValueError: freezing was asked for, and one is no LoRA whose B is 0.
    """
    for t in reading:
        fresh = _is_fresh(t, weights)
        if not fresh and freeze:
            raise ValueError(
                f"freeze_inputs=True, but {t.name} "
                + (
                    "is no LoRA's A"
                    if t.partner is None
                    else "goes on from an adapter that learned"
                )
                + "; train a fresh LoRA, or leave freeze_inputs out"
            )
        if not fresh:
            return []
    already = all(not t.parameter.requires_grad for t in reading)
    if not freeze and (freeze is False or not already):
        return []
    return [
        Frozen(t, weights[t.key], weights[t.partner_key], t.parameter.requires_grad)
        for t in reading
    ]


def few_for(
    reading: Sequence[Trained],
    weights: dict[tuple, Whole],
    freeze: bool | None,
    rank: int | None,
) -> int | None:
    """To how many free directions a matrix is kept, if nobody said and bases would be large.

    Args:
        reading, weights, freeze: as `frozen_of`.
        rank: largest k of a basis; None sets no limit.
    """
    fresh = all(_is_fresh(t, weights) and t.parameter.requires_grad for t in reading)
    size = bytes_of([(t.matrix.takes_in, t.size, 1) for t in reading], rank)
    if freeze is not None or size <= LARGE or not fresh:
        return None
    warnings.warn(
        f"bases of inputs would take about {size / 2**30:.1f} GiB: of what is not blocked, {FREE} "
        f"random directions of each matrix's inputs are left to learn in (free_rank={FREE}) and "
        "kept in their place; give another free_rank, or read_rank, the most that are blocked",
        stacklevel=4,
    )
    return FREE


def _is_fresh(t: Trained, weights: dict[tuple, Whole]) -> bool:
    """Whether it is of a LoRA whose B is 0."""
    return t.partner is not None and weights[t.key].kept is None


def bytes_of(
    inputs: Iterable[tuple[str, int, int]], rank: int | None = None, free: int | None = None
) -> int:
    """How much bases of inputs will take, about: of what is blocked or what is left, the smaller.

    Args:
        inputs: of each matrix what tells its input from others' (`Matrix.takes_in`), d, and how
            many experts it is of.
        rank: largest k of a basis; None sets no limit.
        free: most directions that are left; None sets no limit.
    """
    each = [(d, count, min(FILLED * d, rank or d)) for _, d, count in set(inputs)]
    return int(sum(4 * d * min(k, d - k, free or d) * count for d, count, k in each))


def init_lora_null(
    model: nn.Module,
    prompts: Sequence,
    tokenizer=None,
    *,
    read: float = 0.95,
    read_rank: int | None = None,
    tokens: int = 96,
    quick: bool | None = None,
    seed: int = 0,
) -> dict[str, dict]:
    """Put each LoRA's A off what its map takes in on unrelated prompts, and freeze it.

        A ← s A (I − V Vᵀ)      ⇒      ΔW V = B A V = 0, ‖A‖ as it was

    It is all that a guard does on the side of inputs: train B in any way afterwards.

    Args:
        model: with a LoRA whose B is 0.
        prompts, tokenizer, tokens, seed: as `Reference`.
        read, read_rank, quick: as `Guard`.

    Returns:
        By the names of the A: `rank`, k of V; `share`, of the energy of inputs on held-out prompts
        what V holds; `before`, ‖A V‖ / ‖A‖ until now.

    Raises:
        ValueError: no LoRA, one that has learned, prompts that can't be read, or `read` outside 0
            to 1.
    """
    if not 0 < read < 1:
        raise ValueError(f"read is {read}; give a share above 0 and below 1, such as 0.95")
    found = inspect(model)
    reading = found.reading()
    weights = {t.key: Whole(t) for t in [*found.trained(), *reading]}
    for weight in weights.values():
        weight.remember()
    frozen = frozen_of(reading, weights, True)
    if not frozen:
        raise ValueError("model has no LoRA that trains; add one first (peft.get_peft_model)")
    options = {"read": read, "read_rank": read_rank, "quick": quick, "tokens": tokens, "seed": seed}
    Growth(prompts, tokenizer=tokenizer, rank=0, **options).start(found, frozen)
    return {f.name: {"rank": f.rank, "share": f.share, "before": f.size} for f in frozen}


def freeze_early(model: nn.Module, freeze: bool | None) -> None:
    """Freeze each LoRA's A before a trainer wraps the model, if that is asked for.

    A wrapper for several processes waits for gradients of all that asks for them when it is made.
    """
    factors = lora_factors(model)
    if freeze and all(B.is_meta or not bool(B.detach().any()) for _, _, B, _ in factors):
        for _, A, _, _ in factors:
            A.requires_grad_(False)
