"""What each rival changes in a fine-tune of a text model: rows, training, or a plain fine-tune.

Which there are, and what their strengths mean, stands in `settings.STRENGTHS`; the rivals
themselves are in `rivals`.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from grasp import architecture, data, rivals
from grasp.discover import discover
from grasp.drift import Reference
from grasp.models import adapted, load_model
from grasp.settings import Settings

Around = Callable[[nn.Module], AbstractContextManager]


def rows(settings: Settings, own: Sequence[data.Row], model: nn.Module, tokenizer) -> list:
    """What a method trains on, given the data's own rows and the model before its LoRA."""
    strength, seed = settings.chosen_strength, settings.seed
    if settings.method == "inoculation":
        return rivals.inoculated(own, settings.instruction)
    if settings.method == "interleaved":
        return rivals.interleaved(own, data.read_rows(settings.others), strength, seed)
    if settings.method == "replay":
        prompts = data.read_prompts(settings.reference)
        count = max(1, round(strength * len(own)))
        options = {"tokens": settings.tokens, "seed": seed}
        return [*own, *rivals.replayed(model, prompts, tokenizer, count, **options)]
    return list(own)


def batch_size(settings: Settings) -> int:
    """Rows of a step: what a method adds comes on top of the data's own."""
    more = settings.chosen_strength if settings.method in ("interleaved", "replay") else 0
    return round((1 + more) * settings.batch_size)


def training(settings: Settings, model: nn.Module, tokenizer) -> Around:
    """What goes around the training: a function of the model once its LoRA is on it.

    Args:
        model: without an adapter; it is left as it was.

    Raises:
        ValueError: the adapter in `drifted` is of another model, or has too few directions.
    """
    method, strength = settings.method, settings.chosen_strength
    if method == "kl":
        reference = Reference(
            model,
            data.read_prompts(settings.reference),
            tokenizer,
            tokens=settings.tokens,
            batch=settings.batch,
            seed=settings.seed,
        )
        return lambda tuned: rivals.penalised(tuned, reference, strength)
    if method in ("caft_found", "caft_moved"):
        moved = {
            "method": "activations",
            "prompts": data.read_prompts(settings.reference),
            "tokenizer": tokenizer,
        }
        with adapted(model, settings.drifted, "drifted") as plain:
            options = moved if method == "caft_moved" else {}
            found = discover(plain, int(strength), per_block=True, **options)
        return lambda tuned: rivals.ablated(tuned, found)
    if method == "steering":
        vectors = _asked_for(model, tokenizer, settings)
        return lambda tuned: rivals.steered(tuned, vectors, strength)
    if method == "osf":
        return lambda tuned: rivals.off_leading(tuned, int(strength))
    return lambda tuned: nullcontext()


def change(settings: Settings, plain: nn.Module) -> None:
    """Change a plain fine-tune's LoRA in place, for a method that trains nothing itself."""
    strength = settings.chosen_strength
    if settings.method == "svd_tail":
        rivals.truncated(plain, int(strength))
    elif settings.method == "posthoc":
        rivals.projected(plain, discover(plain, int(strength)))
    else:
        other, _ = load_model(settings.model, settings.dtype)
        with adapted(other, settings.aligned, "aligned") as aligned:
            rivals.safe(plain, updates(aligned), strength)


def updates(model: nn.Module) -> dict[str, Tensor]:
    """ΔW = B A of each matrix with a LoRA, scaled as the model applies it, by its name."""
    matrices = (m for b in architecture.inspect(model).blocks for m in b.matrices)
    factors = {m.name: architecture.lora_update(m) for m in matrices}
    return {name: B @ A for name, found in factors.items() if found for B, A in [found]}


@torch.no_grad()
def _asked_for(model: nn.Module, tokenizer, settings: Settings) -> dict[int, Tensor]:
    """What the instruction adds to the middle block's output at a prompt's end, on average."""
    middle = len(architecture.inspect(model).blocks) // 2
    prompts = data.read_prompts(settings.reference)
    device = next(model.parameters()).device

    def last(prompt: str) -> Tensor:
        ids = torch.tensor([data.prompt_ids(tokenizer, prompt)], device=device)
        out = model(input_ids=ids, use_cache=False, output_hidden_states=True)
        return out.hidden_states[middle + 1][0, -1].float()  # the first is the embedding

    with architecture.evaluating(model):
        shifts = [last(f"{settings.instruction} {p}") - last(p) for p in prompts]
    return {middle: torch.stack(shifts).mean(0)}
