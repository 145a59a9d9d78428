"""Discover without any prompts: short fine-tunes that lack the capacity for the task, in rounds.

round n: train rank-1 LoRAs under a guard on what is known, one for each seed; the leading left
singular vectors of their writers' updates join the subspace; stop when it is full, or when they
write less than a set share of what the first round wrote.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from grasp.bases.discover import discover
from grasp.bases.subspaces import Subspaces
from grasp.model import inspect, lora_update

ShortRun = Callable[[Subspaces | None, int], nn.Module]


def discover_in_rounds(
    short_run: ShortRun,
    *,
    rank: int = 8,
    rounds: int = 4,
    per_round: int = 2,
    seeds: int = 3,
    seed: int = 0,
    stop_below: float = 0.25,
    per_block: bool = False,
    on_round: Callable[[int, Subspaces, float], None] | None = None,
) -> Subspaces:
    """The union of what short fine-tunes write to, each round kept off what is known.

    Args:
        short_run: trains a fresh low-rank LoRA kept off the given subspaces (None at first), with
            the given seed, and returns the PEFT model.
        rank: largest k.
        rounds: at most.
        per_round: directions that join in a round.
        seeds: short runs in a round; their updates stand side by side.
        seed: the first of them.
        stop_below: a round whose updates' norm is less than this share of the first's ends it.
        per_block: a subspace for each block.
        on_round: called with the round, the subspaces so far and the norm's share.

    Raises:
        ValueError: as `discover`.
    """
    known: Subspaces | None = None
    first = 0.0
    for n in range(rounds):
        models = [short_run(known, seed + n * seeds + s) for s in range(seeds)]
        written = sum(_written(m) for m in models) / seeds
        first = first or written
        if known is not None and written < stop_below * first:
            break
        room = rank - (known.rank if known is not None else 0)
        found = discover(models, min(per_round, room), per_block=per_block)
        known = found if known is None else known.union(found)
        if on_round is not None:
            on_round(n, known, written / first)
        if known.rank >= rank:
            break
    source = {"method": "rounds", "rounds": n + 1, "per_round": per_round, "seeds": seeds}
    return replace(known, source=source)


def _written(model: nn.Module) -> float:
    """The norm of all the writers' updates, in the residual stream."""
    total = 0.0
    for block in inspect(model).blocks:
        for writer in block.of_role("writer"):
            update = lora_update(writer)
            if update is not None:
                B, A = update
                total += float(torch.linalg.multi_dot([A @ A.mT, B.mT @ B]).diagonal().sum())
    return total**0.5
