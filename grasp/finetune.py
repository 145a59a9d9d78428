"""One fine-tune from a data file to a saved adapter: plain, guarded, a control, or a rival."""

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from importlib import resources
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn

from grasp import data, growth, rivals
from grasp.drift import Continued, Reference, draw
from grasp.files import read_json, write_json
from grasp.models import load_model
from grasp.subspaces import Subspaces
from grasp.trainer import CERTIFICATE, GraspCallback, fit

GUARDED = ("grasp", "random", "shuffled")
RIVALS = ("replay", "kl")
METHODS = ("plain", *GUARDED, *RIVALS)
ABOUT = "finetune.json"
GUARD = "guard.safetensors"


@dataclass(frozen=True)
class Settings:
    """Everything that decides a fine-tune; the keys of a YAML config and the options of the CLI."""

    model: str
    data: str
    out: str
    method: str = "grasp"
    strength: float | None = None
    """Of replay: the base model's own answers to the reference, for each row of the data; they come
    on top of the batch. Of kl: the weight of the divergence on the reference. None means 1."""
    seed: int = 0
    steps: int = 100
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 1e-4
    warmup: int = 5
    max_length: int = 256
    limit: int | None = None
    """Rows used; None takes all."""
    lora_rank: int = 16
    targets: str = "all-linear"
    """Modules that get a LoRA, by name with commas between, or all-linear."""
    subspaces: str | None = None
    """File of subspaces to keep off; with a reference the bases grow from them."""
    reference: str | None = None
    """File of unlabelled, unrelated prompts, one a line; None takes the shipped ones."""
    drifted: str | None = None
    """Folder of a plain fine-tune's adapter: the reference is continued by it as well."""
    drift_guided: bool = True
    """Bases grow from the divergence on the reference; False keeps to the subspaces alone."""
    read: float = 0.95
    """Share of the energy of each matrix's inputs on the reference that is blocked."""
    read_rank: int | None = None
    """Largest number of directions of inputs for each matrix; None sets no limit."""
    rank: int = 4
    tokens: int = 64
    batch: int = 8
    every: int = 1
    refresh: int = 5
    grow: int = 2
    tolerance: float = 0.0
    residual: bool = False
    save_every: int | None = 50

    def check(self) -> None:
        """Refuse settings that can't be run, before anything is loaded.

        Raises:
            ValueError, FileNotFoundError: names the setting, what came, and what to give.
        """
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; choose one of {', '.join(METHODS)}")
        for name in ("steps", "batch_size", "accumulate", "max_length", "lora_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give 1 or more")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; give a positive number")
        if self.strength is not None and self.method not in RIVALS:
            raise ValueError(f"strength is for {' and '.join(RIVALS)}, not {self.method}; drop it")
        if self.strength is not None and not self.strength > 0:
            raise ValueError(f"strength is {self.strength}; give a positive number")
        growth.check(self.read, self.read_rank, self.rank, self.every, self.refresh, self.grow)
        guarded = self.method in GUARDED
        if self.method == "shuffled" and (self.subspaces or not self.drift_guided):
            raise ValueError("shuffled takes its directions from a reference alone; drop subspaces")
        if self.read == self.rank == 0 and self.subspaces is None and guarded:
            raise ValueError("read and rank are 0 without subspaces: nothing is blocked; set one")
        if self.drifted and not (Path(self.drifted) / "adapter_config.json").exists():
            raise FileNotFoundError(
                f"no adapter in {self.drifted}; give drifted a plain fine-tune's"
            )
        if self.drifted and not (guarded and self.drift_guided):
            raise ValueError("drifted is for a run that a reference guides; leave it out here")
        if not self.drift_guided and self.subspaces is None and guarded:
            raise ValueError("drift_guided is off and no subspaces are given; give one of the two")


def settings_from(options: dict) -> Settings:
    """Settings from a mapping, such as a YAML config.

    Raises:
        ValueError: an unknown key, or a required one that is missing.
    """
    known = {f.name for f in fields(Settings)}
    if unknown := sorted(set(options) - known):
        raise ValueError(f"unknown setting {unknown[0]!r}; there are {', '.join(sorted(known))}")
    for name in ("model", "data", "out"):
        if not options.get(name):
            raise ValueError(f"{name} is missing; give --{name} or put it into the config")
    return Settings(**options)


def default_prompts() -> list[str]:
    """The shipped unlabelled prompts: everyday questions on many topics."""
    text = resources.files("grasp").joinpath("assets/prompts.txt").read_text(encoding="utf-8")
    return text.split("\n")[:-1]


def read_prompts(path: Path | str | None) -> list[str]:
    """One prompt a line; None gives `default_prompts`.

    Raises:
        FileNotFoundError, ValueError: no such file, or nothing in it.
    """
    if path is None:
        return default_prompts()
    if not Path(path).exists():
        raise FileNotFoundError(f"no reference prompts at {path}")
    prompts = [line.strip() for line in Path(path).read_text(encoding="utf-8").split("\n")]
    prompts = [p for p in prompts if p]
    if not prompts:
        raise ValueError(f"{path} holds no prompts; write some dozens, one a line")
    return prompts


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
    """
    settings.check()
    out = Path(settings.out)
    adapter = out / "adapter"
    if _is_done(out, settings):
        return adapter
    callback = guard_callback(settings)
    prompts = [] if settings.method == "plain" else read_prompts(settings.reference)
    rows = data.read_rows(settings.data, settings.limit)
    model, tokenizer = load_model(settings.model)
    batch_size, strength = settings.batch_size, settings.strength or 1.0
    if settings.method == "replay":
        count = max(1, round(strength * len(rows)))
        options = {"tokens": settings.tokens, "seed": settings.seed}
        rows = [*rows, *rivals.replayed(model, prompts, tokenizer, count, **options)]
        batch_size = round((1 + strength) * batch_size)
    encoded = data.encode(rows, tokenizer, settings.max_length)
    if settings.drifted:
        callback.options["drifted"] = _drifted(model, tokenizer, settings)
    model = add_lora(model, settings)
    about = {"settings": asdict(settings), "rows": len(encoded)}
    write_json(out / ABOUT, {"done": False, **about})

    def step_done(step: int) -> None:
        if step in keep:
            save_adapter(model, out / f"adapter-{step}")
        if after_step is not None:
            after_step(step)

    with _penalty(settings, model, tokenizer, prompts):
        fit(
            model,
            tokenizer,
            encoded,
            out / "checkpoints",
            steps=settings.steps,
            batch_size=batch_size,
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
    if odd := [k for k, v in asdict(settings).items() if kept["settings"].get(k) != v]:
        value = kept["settings"].get(odd[0])
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
        reference=read_prompts(settings.reference),
        directions="drift" if settings.method == "grasp" else settings.method,
        read=settings.read,
        read_rank=settings.read_rank,
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


def _penalty(
    settings: Settings, model: nn.Module, tokenizer, prompts: list[str]
) -> AbstractContextManager:
    if settings.method != "kl":
        return nullcontext()
    reference = Reference(
        model,
        prompts,
        tokenizer,
        tokens=settings.tokens,
        batch=settings.batch,
        seed=settings.seed,
    )
    return rivals.penalised(model, reference, settings.strength or 1.0)


def _drifted(model: nn.Module, tokenizer, settings: Settings) -> list[Continued]:
    """What the plain fine-tune says to the reference's prompts; the model is left as it was."""
    try:
        plain = PeftModel.from_pretrained(model, settings.drifted)
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        why = str(error).strip().splitlines()
        raise ValueError(
            f"drifted: the adapter in {settings.drifted} does not fit {settings.model} "
            f"({' '.join(why[:2])[:200]}); give a plain fine-tune of this model"
        ) from error
    try:
        return draw(
            plain,
            read_prompts(settings.reference),
            tokenizer,
            tokens=settings.tokens,
            batch=settings.batch,
            seed=settings.seed,
        )
    finally:
        plain.unload()


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
