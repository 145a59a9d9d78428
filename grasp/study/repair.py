"""Take a trained LoRA off what unrelated prompts feed into its maps, or off directions, afterwards.

    A ← A − A V Vᵀ        V [d_in, k]: what the map takes in on the prompts, of the base model
    B ← B − U (Uᵀ B)      U [d_out, k]: of subspaces, where they are given

What it did there is gone, of the task as of all else: a guard in training leaves the task room to
be learned elsewhere, and this does not.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grasp import data
from grasp.bases.inputs import input_bases
from grasp.bases.subspaces import Subspaces
from grasp.data import Reference
from grasp.files import write_json
from grasp.guard.weights import exact
from grasp.model import adapter_folder, evaluating, inspect, load_adapter, load_model
from grasp.study.finetune import save_adapter
from grasp.study.rivals._shared import loras
from grasp.study.rivals.posthoc import projected

ABOUT = "repair.json"


def repair(
    model: str,
    adapter: Path,
    out: Path,
    *,
    prompts: Sequence[str] | None = None,
    read: float = 0.95,
    subspaces: Path | str | None = None,
    rows: Sequence[data.Row] = (),
    max_length: int = 1024,
    tokens: int = 96,
    seed: int = 0,
    weights: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A new plain adapter in `out`, of another that was trained in any way.

    Args:
        model: the base, as `load_model` takes it.
        adapter: folder of the LoRA, or of a run; it stays as it is.
        prompts: unlabelled, from other topics; None takes those shipped.
        read: share of what each map takes in that is blocked, from 0 (nothing) to below 1.
        subspaces: file of directions that B is put off.
        rows: of the task: the mean loss on them before and after is what the repair cost.
        tokens, seed: of the prompts' continuations.
        weights: how the base is loaded: other arguments of `load_model`.

    Returns:
        `before` and `after`: `divergence` from the base on the prompts (nats a token), and
        `task_loss` if rows are given; `kept`, ‖ΔW‖ after over before, of all matrices.

    Raises:
        ValueError, FileNotFoundError: nothing to put it off, no LoRA, or one of another model.
    """
    if not 0 <= read < 1:
        raise ValueError(f"read is {read}; give a share from 0 to below 1, such as 0.95")
    if not read and subspaces is None:
        raise ValueError("read is 0 and no subspaces are given: nothing would change; set one")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already and not empty; choose another place")
    adapter = adapter_folder(adapter)
    directions = None if subspaces is None else Subspaces.load(subspaces)
    base, tokenizer = load_model(model, **weights or {})
    encoded = data.encode(rows, tokenizer, max_length).rows if rows else []
    tuned = load_adapter(base, adapter, trainable=True)
    with tuned.disable_adapter():
        texts = data.default_prompts() if prompts is None else prompts
        reference = Reference(tuned, texts, tokenizer, tokens=tokens, seed=seed)
    before, size = _measured(tuned, reference, encoded), _sizes(tuned)
    if read:
        _off_inputs(tuned, reference, read)
    if directions is not None:
        projected(tuned, directions)
    after, left = _measured(tuned, reference, encoded), _sizes(tuned)
    found = {"before": before, "after": after, "kept": left / size if size else 0.0}
    save_adapter(tuned, out, tokenizer)
    write_json(out / ABOUT, found | {"read": read, "prompts": len(texts), "seed": seed})
    return found


@torch.no_grad()
def _off_inputs(tuned: nn.Module, reference: Reference, read: float) -> None:
    found = inspect(tuned)
    reading = [t for t in found.reading() if t.partner is not None]
    if not reading:
        raise ValueError("the adapter has no LoRA whose inputs could be read")
    matrices = list({t.matrix.name: t.matrix for t in reading}.values())
    with tuned.disable_adapter():
        bases = list(input_bases(found, matrices, list(reference.rows()), read))
    of = {name: basis for names, basis in bases for name in names}
    for t in reading:
        A = t.of(t.parameter)
        for _ in range(2):  # V is orthonormal to rounding alone
            A.sub_(of[t.matrix.name].inside(A.float()).to(A))


def _measured(tuned: nn.Module, reference: Reference, rows: Sequence[dict]) -> dict[str, float]:
    found = {"divergence": reference.measure(tuned)}
    return found | ({"task_loss": _loss(tuned, rows)} if rows else {})


@torch.no_grad()
def _loss(model: nn.Module, rows: Sequence[dict], size: int = 8) -> float:
    """Mean negative log-likelihood of what is learned, in nats a token."""
    total, count = 0.0, 0
    device = next(model.parameters()).device
    with evaluating(model):
        for batch in _batches(rows, size):
            learned = int((batch["labels"][:, 1:] != data.IGNORED).sum())
            loss = model(**{k: v.to(device) for k, v in batch.items()}, use_cache=False).loss
            total, count = total + float(loss) * learned, count + learned
    return total / max(count, 1)


def _batches(rows: Sequence[dict], size: int) -> Iterator[dict]:
    ordered = sorted(rows, key=lambda r: len(r["input_ids"]))
    for start in range(0, len(ordered), size):
        yield data.pad(ordered[start : start + size])


def _sizes(tuned: nn.Module) -> float:
    """‖ΔW‖ of all matrices together."""
    total = 0.0
    for t in loras(tuned):
        B, A = exact(t.parameter), exact(t.partner)
        total += float(((B.mT @ B) * (A @ A.mT)).sum())
    return total**0.5
