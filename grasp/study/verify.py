"""Recompute a certificate from an adapter: from files alone, or from its base model too.

    through = ‖Uᵀ B A‖ / ‖B A‖    or    ‖B A V‖ / ‖B A‖        of each LoRA, in fp64

Nothing of the guard takes part in it. Bases U of outputs lie beside the adapter; V of inputs beside
its run, or they are found again from the base model.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from grasp.files import read_json
from grasp.guard import evidence
from grasp.guard.evidence import EVIDENCE, place
from grasp.guard.trainer import CERTIFICATE, STATE
from grasp.model import adapter_folder
from grasp.study.found_again import (
    ELSEWHERE,
    Again,
    inputs_again,
    orthonormal,
    through,
)

ROOM = 1e-7  # what rounding of another order of sums may add to what is stated
RUN, BESIDE, AGAIN = "run", "adapter", "model"  # where a basis comes from


class _Found(NamedTuple):
    """Of a parameter: how much got through, of a basis of which rank, and where that is from."""

    through: float
    rank: int
    full: bool  # whether it leaves nothing
    source: str
    share: float | None = None  # of inputs that were found again, as `Found`
    energy: float | None = None


def verify(
    adapter: Path,
    guard: Path | None = None,
    *,
    model: str | None = None,
    reference: Path | None = None,
    draw: bool = False,
    dtype: str | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Whether what a certificate says of an adapter is so.

    Args:
        adapter: its folder, or that of a run of `grasp finetune`.
        guard: file of the bases that a run leaves (`guard.safetensors`, or a checkpoint's
            `grasp_guard.safetensors`); None looks for it beside the adapter.
        model: the base, as `load_model` takes it: bases of inputs are found again from it.
        reference: with a model, file of the run's prompts, where they are not those shipped.
        draw: ask the base for its answers to the prompts again, in place of those that came with
            the adapter.
        dtype, device: of the base; the run's dtype if none is given.

    Returns:
        `holds`; `through` (the most of any matrix), `stated` (what the certificate says);
        `matrices`: how many were looked at; `against`: of these, how many by bases of the run's
        files, of the adapter's own, and found again from the model; `elsewhere`: how many of the
        last are not the run's to the last digit, so that `energy`, the most of any, is judged in
        place of `through` (`found_again`); `weights`, `base`: whether these are what the
        certificate is of, None where that is not known; `text`: by which the model was asked;
        `unchecked`: those of which there is no basis; `odd`:
        those that do not keep to their bound or to what is stated, with what was found, and those
        that the certificate does not name.

    Raises:
        FileNotFoundError, ValueError: a file is missing, or is of another run or kind.
    """
    adapter = adapter_folder(adapter)
    if not (adapter / CERTIFICATE).exists():
        raise FileNotFoundError(f"no certificate ({CERTIFICATE}) in {adapter}")
    certificate = read_json(adapter / CERTIFICATE)
    raw = _factors(adapter)
    factors = {name: (B.double(), A.double()) for name, (B, A) in raw.items()}
    _refuse_others(adapter, certificate, factors)
    found, again = _beside_it(adapter, guard, factors, needed=model is None), None
    if model is not None:
        options = {"reference": reference, "dtype": dtype, "device": device}
        again = _with_model(model, adapter, certificate, factors, draw, options)
        found |= _of_inputs(again, certificate, factors)
    odd: dict[str, Any] = {}
    worst, unchecked, elsewhere = 0.0, [], []
    for name, said in certificate["modules"].items():
        if name not in found:
            if said["rank"]:
                unchecked.append(name)
            continue
        other = _is_elsewhere(found[name], said)
        if other:
            elsewhere.append(found[name].energy)
        else:
            worst = max(worst, found[name].through)
        if not _as_stated(found[name], said, name in certificate["unmoved"], other):
            odd[name] = {"found": found[name].through, "stated": said["through"]}
            odd[name] |= {"energy": found[name].energy} if other else {"bound": said["bound"]}
    looked = {n: f for n, f in found.items() if n in certificate["modules"]}
    if not looked:
        raise ValueError("none of the certificate's matrices has a basis in these files")
    named = set(map(place, certificate["modules"]))
    odd |= {name: {"found": None, "stated": None} for name in factors if name not in named}
    finite = all(bool(T.isfinite().all()) for pair in factors.values() for T in pair)
    weights = _same_weights(certificate, {n: raw[n] for n in named})
    base = None if again is None else again.same_base
    sources = [f.source for f in looked.values()]
    return {
        "holds": certificate["holds"] and finite and not odd and False not in (weights, base),
        "through": worst,
        "stated": certificate["through"],
        "matrices": len(looked),
        "against": {source: sources.count(source) for source in (RUN, BESIDE, AGAIN)},
        "elsewhere": len(elsewhere),
        "energy": max(elsewhere, default=None),
        "weights": weights,
        "base": base,
        "text": None if again is None else again.text,
        "unchecked": unchecked,
        "odd": odd,
    }


def _refuse_others(adapter: Path, certificate: Mapping[str, Any], factors: Mapping) -> None:
    """Refuse what files do not tell."""
    for name, said in certificate["modules"].items():
        if place(name) not in factors:
            raise ValueError(f"{adapter} has no LoRA for {name}, which its certificate names")
        if "moved" in said:
            raise ValueError(
                f"{name} did not begin at 0, so that an adapter's files do not tell its change; "
                "judge it with Guard.certificate in training"
            )


def _beside_it(
    adapter: Path, guard: Path | None, factors: Mapping[str, tuple[Tensor, Tensor]], needed: bool
) -> dict[str, _Found]:
    """What bases in files say: the run's, and what of theirs is missing by the adapter's own."""
    own, there = adapter / EVIDENCE, _beside(adapter) if guard is None else guard
    bases: dict[str, tuple[Tensor, str, str]] = {}
    if own.exists():
        outputs, _ = evidence.read(own)
        bases = {name: (orthonormal(U), "outputs", BESIDE) for name, U in outputs.items()}
    if there.exists() or guard is not None or (needed and not own.exists()):
        bases |= {name: (D, kind, RUN) for name, (D, kind) in _bases(there).items()}
    found = {}
    for name, (D, kind, source) in bases.items():
        if place(name) in factors:
            d, n = D.shape
            rank = d - n if kind == "left" else n
            full = rank == d
            found[name] = _Found(through(*factors[place(name)], D, kind), rank, full, source)
    return found


def _with_model(
    model: str,
    adapter: Path,
    certificate: Mapping[str, Any],
    factors: Mapping[str, tuple[Tensor, Tensor]],
    draw: bool,
    options: dict[str, Any],
) -> Again:
    """What of inputs is found again."""
    if certificate.get("text") is None or not certificate["settings"].get("read"):
        raise ValueError(
            "this certificate does not say by which text inputs were found (it is of an earlier "
            "version, or blocks none); leave --model out"
        )
    text = None
    if (adapter / EVIDENCE).exists() and not draw:
        _, text = evidence.read(adapter / EVIDENCE)
    return inputs_again(model, adapter, certificate, factors, text, **options)


def _of_inputs(again: Again, certificate: Mapping[str, Any], factors: Mapping) -> dict[str, _Found]:
    """By the names of a certificate's parameters."""
    found = {}
    for name in (n for n in certificate["modules"] if ".lora_A." in n and place(n) in again.inputs):
        f, d = again.inputs[place(name)], factors[place(name)][1].shape[1]
        found[name] = _Found(f.through, f.rank, f.rank == d, AGAIN, f.share, f.energy)
    return found


def _is_elsewhere(found: _Found, said: Mapping[str, Any]) -> bool:
    """Whether a basis was found again, and is not the run's to the last digit."""
    return found.source == AGAIN and (found.rank, found.share) != (said["rank"], said["share"])


def _as_stated(found: _Found, said: Mapping[str, Any], unmoved: bool, elsewhere: bool) -> bool:
    if elsewhere:
        return found.energy <= ELSEWHERE
    if found.rank != said["rank"]:
        return False
    if unmoved:  # nothing but rounding, which has no share
        return found.full or found.through <= ROOM
    stated = said["through"] or 0.0
    return found.through <= said["bound"] + ROOM and abs(found.through - stated) <= ROOM


def _same_weights(certificate: Mapping[str, Any], raw: Mapping) -> bool | None:
    """Whether the adapter's weights are those that the certificate is of."""
    said = certificate.get("weights_sha256")
    return None if said is None else evidence.weights_digest(raw) == said


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
            found[name.removesuffix(".lora_A.weight")] = (B, A)
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
            exact[id(D)] = orthonormal(D)
    return {name: (exact[id(D)], kind) for name, (D, kind) in found.items()}


def _beside(adapter: Path) -> Path:
    checkpoints = sorted(
        adapter.glob(f"checkpoint-*/{STATE}"), key=lambda p: -int(p.parent.name.rsplit("-", 1)[-1])
    )
    places = [adapter.parent / "guard.safetensors", adapter / STATE, *checkpoints]
    return next((p for p in places if p.exists()), places[0])
