"""One fine-tune from a data file to a saved adapter: plain, guarded, a control, or a rival."""

import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from grasp import data
from grasp.bases.subspaces import Subspaces
from grasp.data import Continued, draw
from grasp.files import read_json, write_json
from grasp.guard.trainer import CERTIFICATE, GraspCallback, fit, newest_whole
from grasp.model import adapted, load_model, processes
from grasp.study import methods
from grasp.study.settings import GUARDED, UNTRAINED, Settings, settings_from

ABOUT = "finetune.json"
GUARD = "guard.safetensors"


def add_lora(model: nn.Module, settings: Settings) -> PeftModel:
    """A fresh LoRA, its random half drawn from the seed."""
    torch.manual_seed(settings.seed)
    targets = settings.targets
    return get_peft_model(
        model,
        LoraConfig(
            r=settings.lora_rank,
            lora_alpha=2 * settings.lora_rank,
            target_modules=targets if targets == "all-linear" else targets.split(","),
            task_type="CAUSAL_LM",
        ),
    )


def run(
    settings: Settings,
    *,
    keep: tuple[int, ...] = (),
    after_step: Callable[[int], None] | None = None,
    quiet: bool = False,
) -> Path:
    """Fine-tune and save; a run that is done is not done again, a killed one goes on.

    Args:
        settings: what to do.
        keep: steps at which a copy of the adapter is kept, for early-stopped controls.
        after_step: called with the number of steps done.

    Returns:
        The folder of the adapter. Beside it lie `finetune.json` (the settings, and whether the run
        is done) and, of a guarded run, `grasp.json` (the certificate) and `guard.safetensors`.

    Raises:
        ValueError, FileNotFoundError: settings, data or model that can't be used; a folder that
            holds a run of other settings.
        RuntimeError: several processes were started together, as by torchrun.
    """
    settings.check()
    if processes.launched():
        raise RuntimeError(
            "a fine-tune from files runs in one process; for several write a Trainer script with "
            "GraspCallback"
        )
    settings.check_files()
    out = Path(settings.out)
    adapter = out / "adapter"
    if _is_done(out, settings):
        return adapter
    if settings.method in UNTRAINED:
        _change(settings, adapter)
        return adapter
    callback = guard_callback(settings)
    rows = data.read_rows(settings.data, settings.limit)
    model, tokenizer = load_model(settings.model, **settings.weights)
    rows = methods.rows(settings, rows, model, tokenizer)
    encoded = data.encode(rows, tokenizer, settings.max_length)
    if callback and settings.drifted:
        callback.options["drifted"] = _continued(model, tokenizer, settings)
    around = methods.training(settings, model, tokenizer)
    model = add_lora(model, settings)
    about = {"settings": asdict(settings), "rows": len(encoded)}

    def step_done(step: int) -> None:
        if step in keep:
            save_adapter(model, out / f"adapter-{step}")
        if after_step is not None:
            after_step(step)

    with around(model):  # which may refuse the model, so that nothing is written before
        if callback and newest_whole(out / "checkpoints", guarded=True) is None:
            shutil.rmtree(out / "checkpoints", ignore_errors=True)  # the first was cut off
        write_json(out / ABOUT, {"done": False, **about})
        fit(
            model,
            tokenizer,
            encoded,
            out / "checkpoints",
            steps=settings.steps,
            batch_size=methods.batch_size(settings),
            accumulate=settings.accumulate,
            learning_rate=settings.learning_rate,
            warmup=settings.warmup,
            seed=settings.seed,
            save_every=settings.save_every,
            callbacks=[callback] if callback else [],
            after_step=step_done,
            quiet=quiet,
        )
    save_adapter(model, adapter)
    if callback:
        (out / "checkpoints" / CERTIFICATE).replace(out / CERTIFICATE)
        callback.guard.save(out / GUARD)
    write_json(out / ABOUT, {"done": True, **about})
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return adapter


def _change(settings: Settings, adapter: Path) -> None:
    """The plain fine-tune, changed as the method says, as an adapter of its own."""
    model, tokenizer = load_model(settings.model, **settings.weights)
    with adapted(model, settings.drifted, "drifted", trainable=True) as plain:
        methods.change(settings, plain, tokenizer)
        save_adapter(plain, adapter)
    write_json(adapter.parent / ABOUT, {"done": True, "settings": asdict(settings), "rows": 0})


def best_of(settings: Settings, seeds: int, quiet: bool = False) -> Path:
    """Fine-tune from several seeds; the adapter that diverged least from the base model.

    Judged on the reference prompts alone: KL(base ‖ tuned), which needs no label.

    Raises:
        ValueError: fewer than one seed, or a run that no reference guides.
    """
    if seeds < 1:
        raise ValueError(f"best_of is {seeds}; give 1 or more")
    if settings.method not in GUARDED or not settings.drift_guided:
        raise ValueError(
            "best_of chooses by the divergence on the reference; guide the runs by one"
        )
    found: dict[Path, float] = {}
    for seed in range(settings.seed, settings.seed + seeds):
        out = str(Path(settings.out) / f"seed-{seed}")
        adapter = run(replace(settings, seed=seed, out=out), quiet=quiet)
        found[adapter] = read_json(adapter.parent / CERTIFICATE)["divergence"]
    return min(found, key=found.get)


def _is_done(out: Path, settings: Settings) -> bool:
    if not (out / ABOUT).exists():
        return False
    kept = read_json(out / ABOUT)
    there = asdict(settings_from(kept["settings"]))  # what is newer than the run is at its default
    asked = {k: v for k, v in asdict(settings).items() if k != "out"}  # a folder may be moved
    if odd := [k for k, v in asked.items() if there[k] != v]:
        value = there[odd[0]]
        raise ValueError(
            f"{out} holds a run with {odd[0]} = {value!r}; choose another, or delete it"
        )
    return kept["done"]


def guard_callback(settings: Settings) -> GraspCallback | None:
    """The guard that the settings ask for; None for a plain run or a rival."""
    if settings.method not in GUARDED:
        return None
    subspaces = None if settings.subspaces is None else Subspaces.load(settings.subspaces)
    if settings.method == "random" and subspaces is not None:
        subspaces = subspaces.random_like(settings.seed)
    if not settings.drift_guided:
        return GraspCallback(subspaces, residual=settings.residual)
    return GraspCallback(
        subspaces,
        reference=data.read_prompts(settings.reference),
        directions="drift" if settings.method == "grasp" else settings.method,
        read=settings.read,
        read_rank=settings.read_rank,
        free_rank=settings.free_rank,
        freeze_inputs=settings.freeze_inputs,
        quick=settings.quick,
        rank=settings.rank,
        tokens=settings.tokens,
        batch=settings.batch,
        every=settings.every,
        refresh=settings.refresh,
        grow=settings.grow,
        tolerance=settings.tolerance,
        residual=settings.residual,
        seed=settings.seed,
    )


def _continued(model: nn.Module, tokenizer, settings: Settings) -> list[Continued]:
    """What the plain fine-tune says to the reference's prompts; the model is left as it was."""
    with adapted(model, settings.drifted, "drifted") as plain:
        return draw(
            plain,
            data.read_prompts(settings.reference),
            tokenizer,
            tokens=settings.tokens,
            seed=settings.seed,
        )


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter to a folder that appears only once it is whole."""
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"can't save {folder} ({error}); free space or choose another out") from error
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)
