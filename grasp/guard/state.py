"""What a guarded run is resumed from: a file of its own, and one of the inputs' bases beside it."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialised
from torch import Tensor

from grasp.bases.spectrum import complement
from grasp.files import write_bytes
from grasp.guard.frozen import Frozen
from grasp.guard.guarded import SAVED, Guarded
from grasp.guard.weights import Whole
from grasp.model import Trained, processes
from grasp_kernels.matrices import in_vectors

if TYPE_CHECKING:
    from grasp.guard.guard import Guard

SAME = 1e-4  # of a sketch: two bases that differ by less are one


def save(guard: "Guard", path: Path, everyone: bool = False) -> Path:
    """Write a guard's state; what `load` takes.

    Args:
        everyone: of split weights, which all processes save together, each writes a file, not the
            first alone.
    """
    tensors = {
        f"{key}.{g.name}": tensor.clone().contiguous()  # a shared basis is stored for each
        for g in guard.guarded
        for key, tensor in g.saved().items()
        if not (_is_of_inputs(g) and key in ("basis", "pinned"))
    }
    tensors |= {f"sketch.{g.name}": _sketch(g) for g in guard.guarded if _is_of_inputs(g)}
    starts = {id(g.weight): g for g in reversed(guard.guarded) if g.weight.kept is not None}
    tensors |= {f"start.{g.name}": g.weight.whole(g.weight.kept) for g in starts.values()}
    others = {
        id(g.partner): g
        for g in guard.guarded
        if g.partner and g.partner.kept is not None and id(g.partner) not in starts
    }
    tensors |= {
        f"start of partner.{g.name}": g.partner.whole(g.partner.kept) for g in others.values()
    }
    if guard.growth is not None:
        tensors |= guard.growth.state_dict()
    tensors |= {f"left.{f.name}": f.left for f in guard.frozen}
    about = {
        "steps": guard.steps,
        "divergences": guard.divergences,
        "guarded": [g.name for g in guard.guarded],
        "shares": {g.name: g.share for g in guard.guarded},
        "frozen": {f.name: f.saved() for f in guard.frozen},
        "free_rank": None if guard.growth is None else guard.growth.free_rank,
    }
    try:
        if everyone or not guard.split or processes.is_first():
            _save_inputs(guard, _beside(path))
            write_bytes(path, serialised(tensors, metadata={"grasp_guard": json.dumps(about)}))
    finally:
        if guard.split:
            processes.wait()  # it is there for all when one goes on
    return path


def load(guard: "Guard", path: Path, weights: Sequence[Whole]) -> None:
    """Take up what `save` wrote.

    Raises:
        ValueError: the file is no guard's, or another's; or the inputs' bases are not beside it and
            what is found anew is not the same.
    """
    about, tensors = _read(path)
    if odd := {g.name for g in guard.guarded} ^ set(about["guarded"]):
        odd = min(odd)
        raise ValueError(f"{path} is of another guard: {odd} is in one of them only")
    guard.steps = about["steps"]
    for f in guard.frozen:
        f.restore(about["frozen"][f.name], tensors[f"left.{f.name}"])
        if not f.still:
            raise ValueError(
                f"{f.name} is not what it was in the run that {path} is of; load the adapter that "
                "was saved with it before attaching"
            )
    for g in guard.guarded:
        for weight, key in ((g.weight, "start"), (g.partner, "start of partner")):
            if (kept := tensors.get(f"{key}.{g.name}")) is not None:
                weight.kept = weight.own(kept)
    for g in guard.guarded:
        g.share = about["shares"].get(g.name)
        if _is_of_inputs(g):
            g.pinned = g.coefficients(g.weight.start())
            saved = g.saved() | {
                k: t for k in SAVED if (t := tensors.get(f"{k}.{g.name}")) is not None
            }
            g.restore(saved)
        else:
            g.restore({key: tensors.get(f"{key}.{g.name}") for key in SAVED})
    if guard.growth is None:
        return
    guard.growth.free_rank = about["free_rank"]
    guard.growth.load_state_dict(tensors)
    inputs = [g for g in guard.guarded if _is_of_inputs(g)]
    if _beside(path).exists():
        _load_inputs(inputs, _beside(path))
    else:
        with _at_start(guard, weights):
            guard.growth.start(guard.architecture, inputs)
    for g in inputs:
        if (sketch := tensors.get(f"sketch.{g.name}")) is None:
            raise ValueError(f"{path} is of an earlier version of grasp-kernels; start anew")
        sketch = sketch.to(g.basis)
        if float((_sketch(g).to(sketch) - sketch).norm()) > SAME * float(sketch.norm()):
            raise ValueError(
                f"{_beside(path)} is missing or of another run, and what {g.name} takes in is not "
                "what it was; put the file back, or use the model and prompts of that run"
            )
    guard.growth.divergences = [tuple(d) for d in about["divergences"]]


def frozen_as(reading: Sequence[Trained], weights: dict[tuple, Whole], path: Path) -> list[Frozen]:
    """Of what reads inputs, what a saved run had frozen.

    Raises:
        ValueError: the file is no guard's.
    """
    about, _ = _read(path)
    return [
        Frozen(t, weights[t.key], weights[t.partner_key], t.parameter.requires_grad)
        for t in reading
        if t.name in about["frozen"]
    ]


def _read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["grasp_guard"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, KeyError, OSError) as error:
        raise ValueError(f"{path} is no saved guard ({error})") from error
    if "free_rank" not in about:
        raise ValueError(f"{path} is of an earlier version of grasp-kernels; start anew")
    return about, tensors


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.stem}_inputs.safetensors")


def _is_of_inputs(g: Guarded) -> bool:
    """Whether its basis is found once and never grows, and is pinned to what is known."""
    return g.trained.holds == "inputs" and g.trained.partner is not None


def _sketch(g: Guarded) -> Tensor:
    """V Vᵀ x for a set x `[d]`: the same for two bases of one subspace alone."""
    x = torch.randn(g.basis.shape[0], generator=torch.Generator().manual_seed(0)).to(g.basis)
    along = g.basis @ (g.basis.mT @ x)
    return (x - along if g.inside else along).cpu()


def _save_inputs(guard: "Guard", path: Path) -> None:
    inputs = [g for g in guard.guarded if _is_of_inputs(g)]
    if not inputs:
        return
    before = guard.inputs_file
    if before is not None and before.exists() and before != path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        try:
            os.link(before, path)  # they never change, so that checkpoints can share one file
        except OSError:
            shutil.copyfile(before, path)
    elif before != path or not path.exists():
        owners = {g.basis.data_ptr(): g.name for g in reversed(inputs)}
        own = [g for g in inputs if owners[g.basis.data_ptr()] == g.name]
        tensors = {g.name: g.basis.contiguous() for g in own}
        same = {g.name: owners[g.basis.data_ptr()] for g in inputs}
        about = {"same": same, "inside": [g.name for g in inputs if g.inside]}
        # One entry: of several the order is another each time, and every process writes the same.
        write_bytes(path, serialised(tensors, metadata={"grasp_inputs": json.dumps(about)}))
    guard.inputs_file = path


def _load_inputs(inputs: Sequence[Guarded], path: Path) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["grasp_inputs"])
            same, inside = about["same"], about["inside"]
            bases = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, KeyError, OSError) as error:
        raise ValueError(f"{path} holds no bases of inputs ({error})") from error
    moved: dict[tuple, Tensor] = {}
    for g in inputs:
        stays = g.name in inside and g.may_be_inside
        key = same[g.name], g.device, stays
        if key not in moved:
            basis = bases[key[0]].to(g.device)
            moved[key] = complement(basis) if g.name in inside and not stays else in_vectors(basis)
        g.hold(moved[key], stays)


@contextmanager
def _at_start(guard: "Guard", weights: Sequence[Whole]) -> Iterator[None]:
    """Every trained weight as it was when training began: the base of the run."""
    now = [(w, w.local.detach().clone()) for w in weights]
    with torch.no_grad():
        for weight, _ in now:
            if weight.kept is not None or weight.trained.holds == "outputs":
                weight.local.copy_(weight.start())
    guard.publish()
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value in now:
                weight.local.copy_(value)
        guard.publish()
