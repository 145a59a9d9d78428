"""Recompute a certificate from files alone: an adapter's weights, and the bases beside its run.

    through = ‖Uᵀ B A‖ / ‖B A‖    or    ‖B A V‖ / ‖B A‖        of each LoRA, in fp64

Nothing of the guard takes part in it, and no model is loaded.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from grasp.files import read_json
from grasp.guard.trainer import CERTIFICATE, STATE
from grasp.model import adapter_folder

ROOM = 1e-7  # what rounding of another order of sums may add to what is stated


def verify(adapter: Path, guard: Path | None = None) -> dict[str, Any]:
    """Whether what a certificate says of an adapter is so.

    Args:
        adapter: its folder, or that of a run of `grasp finetune`.
        guard: file of the bases that a run leaves (`guard.safetensors`, or a checkpoint's
            `grasp_guard.safetensors`); None looks for it beside the adapter.

    Returns:
        `holds`, `through` (the most of any matrix), `stated` (what the certificate says),
        `matrices` (how many were looked at), `unchecked` (those of which the files hold no basis:
        of a frozen A none is kept), `odd`: those that do not keep to their bound or to what is
        stated, with what was found, and those that the certificate does not name.

    Raises:
        FileNotFoundError, ValueError: a file is missing, or is of another run or kind.
    """
    adapter = adapter_folder(adapter)
    if not (adapter / CERTIFICATE).exists():
        raise FileNotFoundError(f"no certificate ({CERTIFICATE}) in {adapter}")
    certificate = read_json(adapter / CERTIFICATE)
    factors = _factors(adapter)
    bases = _bases(_beside(adapter) if guard is None else guard)
    odd: dict[str, Any] = {}
    worst, looked, unchecked = 0.0, 0, []
    for name, said in certificate["modules"].items():
        if (place := _place(name)) not in factors:
            raise ValueError(f"{adapter} has no LoRA for {name}, which its certificate names")
        if name not in bases:
            if said["rank"]:
                unchecked.append(name)
            continue
        looked += 1
        found = _through(*factors[place], *bases[name])
        bound, stated = said["bound"], said["through"]
        if name in certificate["unmoved"]:  # nothing but rounding, which has no share
            full = said["rank"] == len(bases[name][0])
            bound, stated, found = 0.0, 0.0, 0.0 if full else found
        worst = max(worst, found)
        if not (found <= bound + ROOM and abs(found - (stated or 0.0)) <= ROOM):
            odd[name] = {"found": found, "stated": said["through"], "bound": said["bound"]}
    if not looked:
        raise ValueError("none of the certificate's matrices has a basis in these files")
    named = {_place(name) for name in certificate["modules"]}
    odd |= {place: {"found": None, "stated": None} for place in factors if place not in named}
    finite = all(bool(T.isfinite().all()) for pair in factors.values() for T in pair)
    return {
        "holds": certificate["holds"] and finite and not odd,
        "through": worst,
        "stated": certificate["through"],
        "matrices": looked,
        "unchecked": unchecked,
        "odd": odd,
    }


def _through(B: Tensor, A: Tensor, basis: Tensor, kind: str) -> float:
    D = B @ A
    size = float(D.norm())
    if kind == "outputs":
        inside = basis.mT @ D
    else:
        inside = D @ basis
        if kind == "left":  # the basis is of what is left, so what got through is the rest
            inside = D - inside @ basis.mT
    return float(inside.norm()) / size if size else 0.0


def _factors(adapter: Path) -> dict[str, tuple[Tensor, Tensor]]:
    file = adapter / "adapter_model.safetensors"
    if not file.exists():
        raise FileNotFoundError(f"no weights of a LoRA in {adapter} ({file.name} is not there)")
    there = load_file(file)
    found = {}
    for name, A in there.items():
        if name.endswith(".lora_A.weight"):
            B = there.get(name.replace(".lora_A.", ".lora_B."))
            if B is None:
                raise ValueError(f"{file} has {name} without its B")
            found[name.removesuffix(".lora_A.weight")] = (B.double(), A.double())
    return found


def _bases(guard: Path) -> dict[str, tuple[Tensor, str]]:
    """Of each matrix a basis, orthonormal to fp64, and what it is of: outputs, inputs, or left."""
    if not guard.exists():
        raise FileNotFoundError(f"no bases at {guard}; give --guard the file that the run left")
    try:
        with safe_open(guard, framework="pt") as file:
            if any(key.startswith("start") for key in file.keys()):
                raise ValueError(
                    f"{guard} is of weights that did not begin at 0, of which an adapter's files "
                    "do not tell the change; judge them with Guard.certificate in training"
                )
            found = {
                key.removeprefix("basis."): (file.get_tensor(key), "outputs")
                for key in file.keys()
                if key.startswith("basis.")
            }
        inputs = guard.with_name(f"{guard.stem}_inputs.safetensors")
        if inputs.exists():
            with safe_open(inputs, framework="pt") as file:
                about = json.loads((file.metadata() or {})["grasp_inputs"])
                kept = {key: file.get_tensor(key) for key in file.keys()}
            for name, owner in about["same"].items():
                found[name] = (kept[owner], "left" if name in about["inside"] else "inputs")
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{guard} holds no bases of a guard ({error})") from error
    exact: dict[int, Tensor] = {}  # one that several matrices share is made orthonormal once
    for D, _ in found.values():
        if id(D) not in exact:
            exact[id(D)] = torch.linalg.qr(D.double()).Q if D.shape[1] else D.double()
    return {name: (exact[id(D)], kind) for name, (D, kind) in found.items()}


def _beside(adapter: Path) -> Path:
    checkpoints = sorted(
        adapter.glob(f"checkpoint-*/{STATE}"), key=lambda p: -int(p.parent.name.rsplit("-", 1)[-1])
    )
    places = [adapter.parent / "guard.safetensors", adapter / STATE, *checkpoints]
    return next((p for p in places if p.exists()), places[0])


def _place(name: str) -> str:
    """Of a parameter, `block.q_proj.lora_A.default`, the map that it belongs to."""
    for factor in (".lora_A.", ".lora_B."):
        name = name.partition(factor)[0]
    return name
