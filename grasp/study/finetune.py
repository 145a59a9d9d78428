"""One fine-tune from a data file to a saved adapter: plain, guarded, a control, or a rival."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import nn

from grasp import data, progress
from grasp.bases.subspaces import Subspaces
from grasp.data import Continued, draw
from grasp.files import read_json, write_json, write_text
from grasp.guard.certificate import finite
from grasp.guard.evidence import EVIDENCE
from grasp.guard.fit import fit, newest_whole
from grasp.guard.trainer import CERTIFICATE, GraspCallback
from grasp.model import adapted, known_as, load_model, load_tokenizer, processes, with_lora
from grasp.model.precision import called
from grasp.study import methods
from grasp.study.card import card
from grasp.study.ending import ABOUT, LOG, came_to
from grasp.study.settings import GUARDED, UNTRAINED, Settings, near, settings_from

GUARD = "guard.safetensors"

Base = Callable[[], tuple[nn.Module, Any]]


def add_lora(model: nn.Module, settings: Settings) -> PeftModel:
    """A fresh LoRA, its random half drawn from the seed."""
    torch.manual_seed(settings.seed)
    return with_lora(
        model,
        LoraConfig(
            r=settings.lora_r,
            lora_alpha=settings.lora_alpha or 2 * settings.lora_r,
            lora_dropout=settings.lora_dropout,
            target_modules=_targets(model, settings.lora_target_modules),
            task_type="CAUSAL_LM",
        ),
    )


def _targets(model: nn.Module, asked: str) -> str | list[str]:
    """As PEFT takes them; PEFT passes over a name that fits no module, if another fits one."""
    if asked == "all-linear":
        return asked
    places = [name for name, _ in model.named_modules()]
    for target in (targets := _listed(asked)):
        if not any(f".{place}".endswith(f".{target}") for place in places):
            known = {place.rpartition(".")[2] for place in places}
            raise ValueError(
                f"lora_target_modules has {target!r}, which no module of the model is called;"
                f"{near(target, known)} give names such as q_proj, or all-linear"
            )
    return targets


def run(
    settings: Settings,
    *,
    keep: tuple[int, ...] = (),
    after_step: Callable[[int], None] | None = None,
    quiet: bool = False,
    tell: Callable[[str], None] | None = None,
    base: Base | None = None,
) -> Path:
    """Fine-tune and save; a run that is done is not done again, a killed one goes on.

    Args:
        settings: what to do.
        keep: steps at which a copy of the adapter is kept, for early-stopped controls.
        after_step: called with the number of steps done.
        tell: is told what was read, a line each.
        base: gives a model that was loaded as the settings ask, and its tokenizer; it is left as
            it was. None loads one.

    Returns:
        The folder of the adapter. Beside it lie `finetune.json` (the settings, and whether the run
        is done), `log.json` (the loss and what else was logged) and, of a guarded run, `grasp.json`
        (the certificate) and `guard.safetensors`.

    Raises:
        ValueError, FileNotFoundError: settings, data or model that can't be used; a folder that
            holds a run of other settings.
        RuntimeError: several processes were started together, as by torchrun.
    """
    with progress.speaking(None if quiet else 0):
        return _run(settings, keep, after_step, quiet, tell, base)


def _run(
    settings: Settings,
    keep: tuple[int, ...],
    after_step: Callable[[int], None] | None,
    quiet: bool,
    tell: Callable[[str], None] | None,
    base: Base | None,
) -> Path:
    settings.check()
    if processes.launched():
        raise RuntimeError(
            "a fine-tune from files runs in one process; for several write a Trainer script with "
            "GraspCallback"
        )
    settings.check_files()
    out = Path(settings.output_dir)
    adapter = out / "adapter"
    if _is_done(out, settings):
        return adapter
    if settings.method in UNTRAINED:
        _change(settings, adapter, base)
        return adapter
    callback = guard_callback(settings)
    read = data.read(settings.data, settings.limit)
    settings = _going_on(settings, out)
    model, tokenizer = _base_model(settings, base)
    settings = replace(settings, dtype=str(model.dtype).removeprefix("torch."))
    rows = methods.rows(settings, read.rows, model, tokenizer)
    encoded = data.encode(rows, tokenizer, settings.max_length)
    steps = settings.steps(len(encoded.rows), methods.batch_size(settings))
    about = {"settings": asdict(settings), "rows": _about_rows(read, encoded)}
    for line in _said(settings, read, encoded, model, tokenizer, steps) if tell else ():
        tell(line)
    if callback and settings.drifted:
        callback.options["drifted"] = _continued(model, tokenizer, settings)
    around = methods.training(settings, model, tokenizer)
    with _with_lora(model, settings) as tuned:

        def step_done(step: int) -> None:
            if step in keep:
                save_adapter(tuned, out / f"adapter-{step}")
            if after_step is not None:
                after_step(step)

        with around(tuned):  # which may refuse the model, so that nothing is written before
            if callback and newest_whole(out / "checkpoints", guarded=True) is None:
                shutil.rmtree(out / "checkpoints", ignore_errors=True)  # the first was cut off
            write_json(out / ABOUT, {"done": False, **about})
            trainer = fit(
                tuned,
                tokenizer,
                encoded.rows,
                out / "checkpoints",
                steps=steps,
                batch_size=methods.batch_size(settings),
                learning_rate=settings.learning_rate,
                accumulate=settings.gradient_accumulation_steps,
                warmup=settings.warmup(steps),
                seed=settings.seed,
                save_every=settings.save_steps,
                callbacks=[callback] if callback else [],
                after_step=step_done,
                quiet=quiet,
                checkpointing=settings.gradient_checkpointing,
                arguments=_arguments(settings, steps),
            )
        _keep_logs(trainer.state.log_history, out)
        proof: list[Path] = []
        if callback:
            proof = [f for n in (CERTIFICATE, EVIDENCE) if (f := out / "checkpoints" / n).exists()]
            for file in proof:
                shutil.copy(file, out)
            callback.guard.save(out / GUARD)
        page = card(
            settings,
            known_as(settings.model),
            steps,
            len(read.rows),
            came_to(out),
            bool(tokenizer.chat_template),
        )
        with progress.Stage("Saving the adapter"):
            save_adapter(tuned, adapter, tokenizer, page, [out / f.name for f in proof])
    write_json(out / ABOUT, {"done": True, **about})
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return adapter


def _base_model(settings: Settings, base: Base | None) -> tuple[nn.Module, Any]:
    if base is not None:
        model, tokenizer = base()
        # A run that goes on does so in the dtype that it was begun in, perhaps elsewhere.
        if settings.dtype in ("auto", str(model.dtype).removeprefix("torch.")):
            return model, tokenizer
    return load_model(settings.model, **settings.weights)


@contextmanager
def _with_lora(model: nn.Module, settings: Settings) -> Iterator[PeftModel]:
    """The model with a fresh LoRA; afterwards it is as it was."""
    tuned = add_lora(model, settings)
    try:
        yield tuned
    finally:
        tuned.unload()
        if settings.gradient_checkpointing:
            called = ("activation_checkpointing_disable", "gradient_checkpointing_disable")
            next(getattr(model, name) for name in called if hasattr(model, name))()
            model.disable_input_require_grads()
        model.eval()


def _keep_logs(history: Sequence[dict], out: Path) -> None:
    write_json(out / LOG, [{k: finite(v) for k, v in line.items()} for line in history])
    if (out / "checkpoints" / "runs").exists():  # what TensorBoard shows
        shutil.copytree(out / "checkpoints" / "runs", out / "runs", dirs_exist_ok=True)


def first_example(settings: Settings) -> tuple[list[str], list[tuple[str, bool]]]:
    """What is said of the data, and the first row as the model sees it, without training.

    Returns:
        Lines, and the row's text in pieces, each with whether it is learned.

    Raises:
        ValueError, FileNotFoundError: as `run`.
    """
    settings.check()
    read = data.read(settings.data, settings.limit)
    tokenizer = load_tokenizer(settings.model)
    encoded = data.encode(read.rows, tokenizer, settings.max_length)
    said = data.summary(read, encoded, tokenizer, settings.max_length)
    return said, list(data.pieces(encoded.rows[0], tokenizer))


def _going_on(settings: Settings, out: Path) -> Settings:
    """With the dtype that a run in this folder was begun in, if none is asked for."""
    if settings.dtype == "auto" and (out / ABOUT).exists():
        return replace(settings, dtype=read_json(out / ABOUT)["settings"].get("dtype", "auto"))
    return settings


def _said(
    settings: Settings, read: data.Rows, encoded: data.Encoded, model: nn.Module, tokenizer, steps
) -> list[str]:
    """What the run is about to do, a line each."""
    said = data.summary(read, encoded, tokenizer, settings.max_length)
    bits = settings.weights["bits"]
    held = f"{bits} bits, computing in {settings.dtype}" if bits else settings.dtype
    rows = methods.batch_size(settings) * settings.gradient_accumulation_steps
    said.append(
        f"On {called(model.device)}; frozen weights in {held}. {steps} steps of {rows} rows."
    )
    return said


def _arguments(settings: Settings, steps: int) -> dict:
    """What else Trainer is told."""
    return {
        "lr_scheduler_type": settings.lr_scheduler_type,
        "weight_decay": settings.weight_decay,
        "logging_steps": settings.logging_steps or max(1, steps // 10),
        "report_to": _listed(settings.report_to),
    }


def _listed(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _about_rows(read: data.Rows, encoded: data.Encoded) -> dict:
    return {
        "read": len(read.rows),
        "forms": read.forms,
        "columns_not_read": read.unread,
        "learned": len(encoded.rows),
        "cut": len(encoded.cut),
        "left_out": len(encoded.dropped),
    }


def _change(settings: Settings, adapter: Path, base: Base | None) -> None:
    """The plain fine-tune, changed as the method says, as an adapter of its own."""
    model, tokenizer = _base_model(settings, base)
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
        out = str(Path(settings.output_dir) / f"seed-{seed}")
        adapter = run(replace(settings, seed=seed, output_dir=out), quiet=quiet)
        found[adapter] = read_json(adapter.parent / CERTIFICATE)["divergence"]
    return min(found, key=found.get)


def _is_done(out: Path, settings: Settings) -> bool:
    if not (out / ABOUT).exists():
        return False
    kept = read_json(out / ABOUT)
    if not kept["done"] and newest_whole(out / "checkpoints") is None:
        return False  # it left nothing to go on with, such as one that was refused
    there = asdict(settings_from(kept["settings"]))  # what is newer than the run is at its default
    asked = asdict(settings)
    for name in ("output_dir", "device"):  # a folder may be moved, to another machine too
        del asked[name]
    if asked["dtype"] == "auto":
        del asked["dtype"]
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


def save_adapter(
    model: PeftModel, folder: Path, tokenizer=None, page: str = "", beside: Sequence[Path] = ()
) -> None:
    """Write the adapter, with what it needs elsewhere, to a folder that appears once it is whole.

    Args:
        page: in place of PEFT's, which is empty.
        beside: files of which copies go with it, such as the certificate.
    """
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        # The vocabulary is the base's: else PEFT asks the hub whether it is.
        model.save_pretrained(temporary, save_embedding_layers=False)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if page:
            write_text(temporary / "README.md", page)
        for file in beside:
            shutil.copy(file, temporary)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"can't save {folder} ({error}); free space or choose another out") from error
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)
