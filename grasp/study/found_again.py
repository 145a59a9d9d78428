"""What a certificate says of inputs, found again from the base model and judged in fp64.

    through = ‖ΔW V‖ / ‖ΔW‖                                V [d, k]: found again from the base
    energy = d Σ ‖ΔW x̂‖² / (‖ΔW‖² Σ ‖x̂‖²)                  x̂ [d]: its inputs on the prompts

On the machine of the run V is the run's, number for number, and `through` is what rounding leaves.
Elsewhere (another device, dtype, or library) its last directions are not: they hold about as much
as the first that it leaves out, and rounding decides between them. So `energy` is judged there: how
much of the prompts a change takes in, set against one of its size that knows nothing of them, of
which it is 1. No direction is chosen in it, so that rounding changes its third digit.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from grasp.bases.cache import fingerprint
from grasp.bases.spectrum import InputBasis
from grasp.bases.start import base_digest, start
from grasp.data import Reference, default_prompts, read_prompts, tokenized
from grasp.guard.evidence import Row, are_shipped, place, text_digests
from grasp.model import Trained, inspect, load_adapter, load_model, lora_factors

ELSEWHERE = 0.5  # of the energy that a change which knows nothing of the prompts takes in


class Found(NamedTuple):
    """Of one matrix's inputs."""

    through: float
    energy: float
    rank: int
    share: float


class Again(NamedTuple):
    """What was found again from a base model."""

    inputs: dict[str, Found]  # by the map's name
    text: str  # which it was asked by, in words
    same_base: bool | None  # whether it is the run's, byte for byte; None where that is not known


def inputs_again(
    model: str,
    adapter: Path,
    certificate: Mapping[str, Any],
    factors: Mapping[str, tuple[Tensor, Tensor]],
    text: Sequence[Row] | None,
    *,
    reference: Path | None = None,
    dtype: str | None = None,
    device: str = "auto",
) -> Again:
    """What of an adapter's change acts on what its maps take in on the text; no cache is read.

    Args:
        model: the base, as `load_model` takes it.
        factors: `(B, A)` of each map, fp64.
        text: as it came with the adapter; None draws it from the base.
        reference: file of prompts to draw it for; None takes those shipped.
        dtype: of the base's weights; None takes the run's.

    Raises:
        ValueError, FileNotFoundError: a base of another kind, or prompts that are not the run's.
    """
    settings, loaded = certificate["settings"], certificate["loaded"]
    if settings["directions"] == "shuffled":
        raise ValueError("shuffled directions are a control, which is not found again")
    if loaded["bits"] not in (None, 4, 8):
        raise ValueError(
            f"the run's base was quantised by {loaded['bits']}, which is not loaded here; check "
            "with the file of bases that the run left (--guard)"
        )
    base, tokenizer = load_model(model, dtype or loaded["dtype"], loaded["bits"], device)
    tuned = load_adapter(base, adapter, trainable=True)
    with torch.no_grad():  # as training began
        for _, _, B, _ in lora_factors(tuned):
            B.zero_()
    rows, which = _text(tuned, tokenizer, certificate, text, reference)
    found = inspect(tuned)
    judges = [_Judge(t, *factors[place(t.name)]) for t in found.reading() if t.partner is not None]
    takers: dict[str, list[_Judge]] = {}
    for judge in judges:
        takers.setdefault(judge.trained.matrix.name, []).append(judge)
    names = ("read", "read_rank", "free_rank", "directions", "seed")
    options = SimpleNamespace(**{name: settings[name] for name in names})
    quick = settings["quick"]
    options.quick = loaded["device"] == "cpu" if quick is None else quick
    start(found, None, takers, rows, options)
    base, same = certificate["model_sha256"], None
    if base is not None and dtype in (None, loaded["dtype"]):
        same = base_digest(fingerprint(tuned)) == base
    return Again({place(j.trained.name): j.said for j in judges}, which, same)


def _text(
    model: nn.Module,
    tokenizer,
    certificate: Mapping[str, Any],
    text: Sequence[Row] | None,
    reference: Path | None,
) -> tuple[list[Row], str]:
    """The text that inputs are looked at on, and in words which it is."""
    said, settings = certificate["text"], certificate["settings"]
    if text is not None and reference is None:
        if not are_shipped((prompt for prompt, _ in text), tokenizer):
            raise ValueError("the text beside the adapter is not of the prompts shipped with grasp")
        if text_digests(text)["sha256"] != said["sha256"]:
            raise ValueError("the text beside the adapter is not what its certificate was made by")
        return list(text), "the run's own text, which came with the adapter"
    if said["drifted"]:
        raise ValueError(
            "the run looked at a plain fine-tune's answers too, which are not drawn again; check "
            "with the file of bases that it left (--guard)"
        )
    prompts = default_prompts() if reference is None else read_prompts(reference)
    here = text_digests([(tuple(ids), []) for ids in tokenized(prompts, tokenizer)])
    if here["prompts_sha256"] != said["prompts_sha256"]:
        which = "those shipped with grasp" if reference is None else f"those in {reference}"
        raise ValueError(
            f"the run's prompts are not {which}; give --reference the file that it had"
        )
    options = {name: settings[name] for name in ("tokens", "batch", "seed")}
    rows = list(Reference(model, prompts, tokenizer, **options).rows())
    same = text_digests(rows)["sha256"] == said["sha256"]
    drawn = "the run's prompts, with answers that the base was asked for again"
    return rows, f"{drawn}: {'the same' if same else 'not all the same'}"


class _Judge:
    """Takes a basis in a guard's place, and keeps what it says of a trained adapter."""

    def __init__(self, trained: Trained, B: Tensor, A: Tensor):
        self.trained, self.B, self.A = trained, B, A
        self.said: Found | None = None

    def take(self, basis: InputBasis) -> None:
        """Judge by it."""
        kind = "left" if basis.complement else "inputs"
        found = through(self.B, self.A, orthonormal(basis.directions), kind)
        self.said = Found(found, energy(self.B, self.A, basis.C), basis.rank, basis.share)

    def start(self) -> str:
        """Nothing of it is kept."""
        return ""

    def found(self) -> tuple[dict, dict[str, Tensor]]:
        """Nothing is kept."""
        return {}, {}

    def take_up(self, facts: dict, tensors: dict[str, Tensor]) -> None:
        """Never asked for."""


def orthonormal(D: Tensor) -> Tensor:
    """A basis that is orthonormal to fp32, to fp64, on the CPU."""
    D = D.detach().cpu().double()
    return torch.linalg.qr(D).Q if D.shape[1] else D


def through(B: Tensor, A: Tensor, basis: Tensor, kind: str) -> float:
    """‖Uᵀ B A‖ / ‖B A‖ of a basis of "outputs", ‖B A V‖ / ‖B A‖ of "inputs", or of what is "left".

    Args:
        B, A: `[d_out, r]` and `[r, d_in]`, fp64.
        basis: `[d, k]`, orthonormal; one of what is left is of all but V.
    """
    size = _norm(B, A)
    if kind == "outputs":
        B = basis.mT @ B
    elif kind == "inputs":
        A = A @ basis
    else:
        for _ in range(2):  # it is orthonormal to rounding alone
            A = A - A @ basis @ basis.mT
    return _norm(B, A) / size if size else 0.0


def energy(B: Tensor, A: Tensor, C: Tensor) -> float:
    """d tr(ΔW C ΔWᵀ) / (‖ΔW‖² tr C) of ΔW = B A: 1, on average, of a ΔW drawn at random.

    Args:
        B, A: `[d_out, r]` and `[r, d]`, fp64.
        C: second moments of inputs `[d, d]`, fp32, of which what is on and below the diagonal is
            read.
    """
    size, own = _norm(B, A) ** 2, C.diagonal().cpu().double()
    inner = (A.to(C.device, C.dtype) @ C.tril()).cpu().double() @ A.mT
    inner = inner + inner.mT - (A * own) @ A.mT
    taken = float(((B.mT @ B) * inner).sum())
    return len(own) * taken / (size * float(own.sum())) if size else 0.0


def _norm(B: Tensor, A: Tensor) -> float:
    return float(((B.mT @ B) * (A @ A.mT)).sum().clamp_min(0).sqrt())
