"""Rank training rows by how much of their gradient lies in what a guard blocked.

score(row) = Σ ‖Uᵀ G‖² − (k / d) ‖G‖²       over the guarded matrices, G of this row alone

A random subspace of the same rank k would hold k / d of the energy, so a row that pulls on
everything alike scores no higher than one that pulls on nothing.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from grasp import data
from grasp.files import read_json
from grasp.model import evaluating, inspect, load_model
from grasp.study import finetune
from grasp.study.settings import settings_from


def screen(
    model: nn.Module,
    tokenizer,
    rows: Sequence[data.Row],
    bases: Mapping[str, Tensor],
    *,
    max_length: int = 512,
    quiet: bool = False,
) -> list[dict]:
    """Score every row; the highest carry the factor.

    Args:
        model: with trainable parameters as they were at the start of the fine-tune: a fresh LoRA
            drawn from the same seed.
        rows: to rank.
        bases: by parameter, as `Guard.bases` gives them.
        max_length: in tokens.

    Returns:
        For each row, highest score first: `row` (its index), `score`, `share` (Σ ‖Uᵀ G‖² of
        Σ ‖G‖²), `energy` (Σ ‖G‖²), `loss`. Compare scores with those of rows known to be harmless.

    Raises:
        ValueError: no rows, a prompt that fills `max_length`, or bases of another model.
    """
    encoded = data.encode(rows, tokenizer, max_length)
    if encoded.dropped:
        odd = len(encoded.dropped)
        raise ValueError(f"{odd} prompts leave no room for an answer; raise max_length")
    trained = [t for t in inspect(model).trained() if t.name in bases]
    if not trained:
        raise ValueError("none of the bases belongs to a trained parameter of this model")
    device = next(model.parameters()).device
    found = []
    with evaluating(model):
        for index in tqdm(range(len(rows)), desc="screen", disable=quiet):
            parts = [r for r, i in zip(encoded.rows, encoded.of, strict=True) if i == index]
            batch = {k: v.to(device) for k, v in data.pad(parts).items()}
            loss = model(**batch, use_cache=False).loss
            gradients = torch.autograd.grad(loss, [t.parameter for t in trained])
            energy = inside = chance = 0.0
            for t, G in zip(trained, gradients, strict=True):
                U = bases[t.name].to(G.device, torch.float32)
                G = G.float() if t.side == "left" else G.float().mT  # [d_out, n]
                whole = float(G.square().sum())
                energy += whole
                inside += float((U.mT @ G).square().sum())
                chance += whole * U.shape[1] / U.shape[0]
            found.append(
                {
                    "row": index,
                    "score": inside - chance,
                    "share": inside / energy if energy else 0.0,
                    "energy": energy,
                    "loss": loss.item(),
                }
            )
    return sorted(found, key=lambda f: -f["score"])


def of_run(
    run: Path, rows: Path | str | None = None, limit: int | None = None
) -> tuple[list[dict], list[data.Row]]:
    """Rank the rows of a guarded run's data, or of another file; also returns the rows.

    Raises:
        FileNotFoundError: the folder holds no finished guarded run.
    """
    about, guard = run / finetune.ABOUT, run / finetune.GUARD
    if not about.exists() or not guard.exists():
        raise FileNotFoundError(f"no finished guarded run in {run}; make one with grasp finetune")
    settings = settings_from(read_json(about)["settings"])
    chosen = data.read_rows(rows or settings.data, limit or settings.limit)
    model, tokenizer = load_model(settings.model, **settings.weights)
    model = finetune.add_lora(model, settings)
    bases = {
        name.removeprefix("basis."): U
        for name, U in load_file(guard).items()
        if name.startswith("basis.")
    }
    return screen(model, tokenizer, chosen, bases, max_length=settings.max_length), chosen
