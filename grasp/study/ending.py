"""What a fine-tune came to, in a few lines."""

from pathlib import Path

from grasp.files import read_json
from grasp.guard.record import at_most
from grasp.guard.trainer import CERTIFICATE

ABOUT = "finetune.json"  # a run's settings, and whether it is done
LOG = "log.json"  # its loss, and what else was logged


def came_to(out: Path) -> list[str]:
    """Of a run in a folder: what was learned, how far the model moved elsewhere, at what cost."""
    said = _learned(read_json(out / LOG) if (out / LOG).exists() else [])
    if (out / CERTIFICATE).exists():
        said += _guarded(read_json(out / CERTIFICATE))
    return said


def ending(out: Path) -> list[str]:
    """What a run came to, and what to do next."""
    model, adapter = read_json(out / ABOUT)["settings"]["model"], out / "adapter"
    command = f"grasp evaluate --model {model} --adapter {adapter} --out {out / 'scores.json'}"
    return [*came_to(out), f"Next: {command}"]


def _learned(log: list[dict]) -> list[str]:
    losses = [(line["step"], line["loss"]) for line in log if "loss" in line]
    if len(losses) < 2:
        return [f"Learned: the loss was {loss:.3g}." for _, loss in losses]
    (first, before), (last, after) = losses[0], losses[-1]
    return [f"Learned: the loss was {before:.3g} at step {first}, {after:.3g} at step {last}."]


def _guarded(found: dict) -> list[str]:
    said = []
    if found.get("divergence") is not None:
        said.append(
            f"Elsewhere: on {_prompts(found)} prompts from other topics the model "
            f"moved by {found['divergence']:.2g} nats a token (KL)."
        )
    if found["holds"]:
        said.append(
            f"Guarantee: holds. No more than {at_most(found['through'])} of any matrix's change "
            "lies in what was blocked."
        )
    else:
        said.append("Guarantee: DOES NOT HOLD. The warning above and grasp.json say why.")
    if (cost := found.get("cost")) is None:  # of an earlier version
        return said
    share = cost["step_seconds"] / max(cost["training_seconds"], 1e-9)
    said.append(
        f"Cost of the guard: {share:.0%} of {cost['training_seconds']:.0f} s of training, "
        f"{cost['start_seconds']:.0f} s before it, {cost['bases_bytes'] / 1e9:.1g} GB of memory."
    )
    return said


def _prompts(found: dict) -> str:
    return str(found.get("settings", {}).get("prompts", "the"))
