"""A certificate as it is written: first what a reader wants to know, module by module last."""

from collections.abc import Mapping
from decimal import ROUND_UP, Context
from typing import Any

from grasp.guard.evidence import about_text
from grasp.model import base_name, loaded_as
from grasp.versions import versions

SETTINGS = (
    "read",
    "read_rank",
    "free_rank",
    "rank",
    "quick",
    "tokens",
    "batch",
    "every",
    "refresh",
    "grow",
    "tolerance",
    "directions",
    "seed",
)


def cost(guard) -> dict[str, float]:
    """What a guard took: seconds of its start and in its steps, bytes of what it keeps."""
    kept = {g.basis.untyped_storage().data_ptr(): g.basis.nbytes for g in guard.guarded}
    return {
        "start_seconds": guard.starting.seconds,
        "step_seconds": guard.clock.seconds,
        "bases_bytes": sum(kept.values()),
    }


def record(found: Mapping[str, Any], guard, training_seconds: float) -> dict[str, Any]:
    """What a certificate says, in the order of a reader: summary, verdict, cost, modules."""
    found = dict(found)
    modules, model = found.pop("modules"), guard.architecture.model
    found["cost"] = cost(guard) | {"training_seconds": training_seconds}
    return {
        "summary": summary(found, len(modules)),
        "holds": found.pop("holds"),
        **found,
        "model": base_name(model) or None,
        "loaded": loaded_as(model),
        "model_sha256": None if guard.growth is None else guard.growth.base,
        "text": about_text(guard),
        "settings": settings(guard),
        "versions": versions(),
        "modules": modules,
    }


def summary(found: Mapping[str, Any], modules: int) -> str:
    """The verdict in words."""
    if not found["holds"]:
        return "The guarantee does not hold: see through, finite, uncovered and modules."
    said = [
        f"The guarantee holds: of the change of each of {modules} matrices no more than "
        f"{at_most(found['through'])} got through."
    ]
    if found.get("divergence") is not None:
        said.append(
            f"On the prompts the model moved by {found['divergence']:.3g} nats a token (KL)."
        )
    return " ".join(said)


def at_most(value: float) -> str:
    """A number in two digits, rounded up, so that it is no more than what is said."""
    return f"{float(Context(prec=2, rounding=ROUND_UP).create_decimal_from_float(value)):.2g}"


def settings(guard) -> dict[str, Any]:
    """How the guard was made."""
    found: dict[str, Any] = {"residual": guard.residual, "subspaces": guard.subspaces is not None}
    if guard.growth is not None:
        found |= {name: getattr(guard.growth, name) for name in SETTINGS}
        found["freeze_inputs"] = bool(guard.frozen)
        found["prompts"] = len(guard.growth.reference.ids)
    return found
