"""What goes with an adapter so that its certificate can be checked where the run is not.

Bases of inputs are found again from the base model, with the same text. Bases of outputs `U [d_out,
k]` came of the training and are not: they travel, k columns beside the r that each B has. The text
(prompts with the base model's continuations) travels where its prompts are those shipped with
grasp; prompts of one's own may be private, and leave a digest alone.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from grasp.bases.cache import digest
from grasp.data import Reference, default_prompts, tokenized
from grasp.files import write_bytes

EVIDENCE = "grasp_bases.safetensors"
OUTPUTS = "outputs."
Row = tuple[tuple[int, ...], list[int]]  # a prompt's token ids, and with a continuation's


def place(name: str) -> str:
    """Of a parameter, `block.q_proj.lora_A.default`, the map that it belongs to."""
    for factor in (".lora_A.", ".lora_B."):
        name = name.partition(factor)[0]
    return name


def weights_digest(factors: Mapping[str, tuple[Tensor, Tensor]]) -> str:
    """SHA-256 of the LoRAs `(B, A)` of maps, as an adapter's file has them."""
    each = [(name, digest(B), digest(A)) for name, (B, A) in sorted(factors.items())]
    return hashlib.sha256(json.dumps(each).encode()).hexdigest()


def factors_of(guard) -> dict[str, tuple[Tensor, Tensor]]:
    """`(B, A)` of each guarded LoRA, by the map's name; of split weights all processes ask."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for g in [*guard.guarded, *guard.frozen]:
        if g.partner is not None and (name := place(g.name)) not in found:
            pair = g.weight.now(), g.partner.now()
            found[name] = pair if g.trained.holds == "outputs" else pair[::-1]
    return found


def text_digests(rows: Sequence[Row]) -> dict[str, str]:
    """SHA-256 of the prompts' token ids, and of these with their continuations'."""
    parts = {"prompts_sha256": [list(p) for p, _ in rows], "sha256": [whole for _, whole in rows]}
    return {k: hashlib.sha256(json.dumps(ids).encode()).hexdigest() for k, ids in parts.items()}


def about_text(guard) -> dict[str, Any] | None:
    """What a certificate says of the text that was looked at; None without any."""
    if guard.growth is None or not isinstance(guard.growth.reference, Reference):
        return None
    rows = list(guard.growth.reference.rows())
    shipped = are_shipped((prompt for prompt, _ in rows), guard.growth.tokenizer)
    drifted = len(guard.growth.drifted)
    return text_digests(rows) | {"shipped_prompts": shipped, "drifted": drifted}


def are_shipped(prompts: Iterable[tuple[int, ...]], tokenizer) -> bool:
    """Whether these, in token ids, are among `default_prompts`."""
    if tokenizer is None:
        return False
    return set(prompts) <= set(map(tuple, tokenized(default_prompts(), tokenizer)))


def write(path: Path, guard, shipped: bool) -> Path | None:
    """Write what a certificate is checked by to a file beside it; None where there is nothing.

    Args:
        shipped: whether the text may go with it.

    Raises:
        OSError: it can't be written.
    """
    tensors = {
        f"{OUTPUTS}{g.name}": g.basis.detach().cpu().clone().contiguous()  # several may share one
        for g in guard.guarded
        if g.partner is not None and g.trained.holds == "outputs" and g.basis.shape[1]
    }
    if shipped:
        rows = list(guard.growth.reference.rows())
        whole = [torch.tensor(ids, dtype=torch.int32) for _, ids in rows]
        tensors["text"] = torch.cat(whole)
        tensors["lengths"] = torch.tensor([[len(p), len(ids)] for p, ids in rows])
    path.unlink(missing_ok=True)
    return write_bytes(path, save(tensors)) if tensors else None


def read(path: Path) -> tuple[dict[str, Tensor], list[Row] | None]:
    """Bases of outputs by name, and the text; None where it did not travel.

    Raises:
        ValueError: it is no such file, or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); fetch the adapter again") from error
    U = {k.removeprefix(OUTPUTS): T for k, T in found.items() if k.startswith(OUTPUTS)}
    if "text" not in found:
        return U, None
    lengths = found["lengths"].tolist()
    whole = [T.tolist() for T in found["text"].split([n for _, n in lengths])]
    return U, [(tuple(ids[:p]), ids) for ids, (p, _) in zip(whole, lengths, strict=True)]
