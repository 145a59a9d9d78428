"""Everything that decides a fine-tune: the keys of a YAML config and the options of the CLI."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_type_hints

from grasp.bases import growth
from grasp.model.loading import DTYPES, check_bits
from grasp.model.precision import device_of
from grasp.study.rivals import RIVALS as KNOWN

GIVEN = {"instruction", "others", "aligned", "plain"}  # what settings can give a rival
ABLE = {name: r for name, r in KNOWN.items() if set(r.needs) <= GIVEN}

GUARDED = ("grasp", "random", "shuffled", "bottom")
STRENGTHS = {name: r.strength for name, r in ABLE.items()}
RIVALS = tuple(ABLE)
METHODS = ("plain", *GUARDED, *RIVALS)
UNTRAINED = tuple(name for name, r in ABLE.items() if not r.trains)  # plain is changed instead
AFTER_PLAIN = tuple(name for name, r in ABLE.items() if "plain" in r.needs)
NEEDED = {
    setting: tuple(name for name, r in ABLE.items() if setting in r.needs)
    for setting in ("instruction", "others", "aligned")
}

KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def _setting(group: str, meaning: str, default: Any = MISSING, *aliases: str):
    """A field of `Settings`: the group that help shows it in, its meaning, other names of it."""
    about = {"group": group, "meaning": meaning, "aliases": aliases}
    return field(default=default, metadata=about)


RUN = "What is trained, on what"
STEPS = "Steps"
LORA = "LoRA"
GUARD = "Guard"
RIVAL = "Rivals and controls"
MACHINE = "Where and how it runs"


@dataclass(frozen=True)
class Settings:
    """Everything that decides a fine-tune; names are those of `transformers`, `trl` and `peft`."""

    model: str = _setting(
        RUN, "Folder, hub name, .gguf, or a known name.", MISSING, "model_name_or_path"
    )
    data: str = _setting(
        RUN,
        "File (.jsonl, .json, .csv, .parquet, .txt), saved dataset, or hub name[:split].",
        MISSING,
        "dataset_name",
    )
    output_dir: str = _setting(RUN, "Folder of the adapter and its certificate.", MISSING, "out")
    method: str = _setting(RUN, "grasp, plain, a control or a rival: all are below.", "grasp")
    limit: int | None = _setting(RUN, "Rows read; none given reads all.", None, "max_rows")
    max_length: int = _setting(RUN, "Tokens of a row; what is longer is cut and told.", 1024)

    num_train_epochs: float | None = _setting(
        STEPS, "Times that all rows are seen: 1, where no max_steps are given.", None, "epochs"
    )
    max_steps: int | None = _setting(STEPS, "Optimizer steps, in place of epochs.", None, "steps")
    per_device_train_batch_size: int = _setting(STEPS, "Rows of a batch.", 8, "batch_size")
    gradient_accumulation_steps: int = _setting(STEPS, "Batches of a step.", 1, "accumulate")
    learning_rate: float = _setting(STEPS, "AdamW's.", 1e-3, "lr")
    lr_scheduler_type: str = _setting(
        STEPS, "As Trainer has it: linear, cosine, …", "constant_with_warmup"
    )
    warmup_steps: int = _setting(STEPS, "Over which the rate rises.", 5, "warmup")
    warmup_ratio: float | None = _setting(STEPS, "Share of all steps, in place of these.", None)
    weight_decay: float = _setting(STEPS, "AdamW's.", 0.0)
    seed: int = _setting(STEPS, "Of everything random.", 0)

    lora_r: int = _setting(LORA, "Rank.", 16, "lora_rank")
    lora_alpha: float | None = _setting(LORA, "Scale: B A is times alpha / r. Else 2 r.", None)
    lora_dropout: float = _setting(LORA, "Of what a LoRA takes in.", 0.0)
    lora_target_modules: str = _setting(
        LORA, "Modules by name, with commas between, or all-linear.", "all-linear", "targets"
    )

    device: str = _setting(MACHINE, "auto, cuda, mps, xpu or cpu.", "auto")
    dtype: str = _setting(
        MACHINE,
        f"Of the frozen weights ({', '.join(DTYPES)}); auto is bfloat16 where that is fast. What "
        "is trained is fp32.",
        "auto",
    )
    load_in_4bit: bool = _setting(MACHINE, "QLoRA: the frozen weights in nf4.", False)
    load_in_8bit: bool = _setting(MACHINE, "The frozen weights in int8.", False)
    gradient_checkpointing: bool = _setting(
        MACHINE, "Less memory, a third more time.", False, "activation_checkpointing"
    )
    save_steps: int | None = _setting(
        MACHINE, "Steps between checkpoints, from which a killed run goes on.", 50, "save_every"
    )
    logging_steps: int | None = _setting(MACHINE, "Steps between log lines; else ten lines.", None)
    report_to: str = _setting(MACHINE, "tensorboard, wandb, … with commas between.", "none")

    reference: str | None = _setting(
        GUARD, "File of unlabelled prompts on other topics, one a line; else those shipped.", None
    )
    read: float = _setting(
        GUARD, "Share of what each matrix takes in on the prompts that is blocked.", 0.95
    )
    read_rank: int | None = _setting(GUARD, "Most directions of that, for each matrix.", None)
    free_rank: int | None = _setting(
        GUARD,
        "Most directions left to learn in, at random; else 64 where what is blocked would take "
        "above 1 GiB.",
        None,
    )
    freeze_inputs: bool | None = _setting(
        GUARD, "Put each LoRA's A off what is blocked, once, and train B alone.", None
    )
    quick: bool | None = _setting(
        GUARD, "Look at few tokens, as on a CPU, or at as many as are needed.", None
    )
    rank: int = _setting(GUARD, "Most directions of outputs that are blocked.", 4)
    tokens: int = _setting(GUARD, "Of each prompt's continuation.", 96)
    batch: int = _setting(GUARD, "Prompts looked at at a time.", 8)
    every: int = _setting(GUARD, "Steps between two looks, while bases of outputs grow.", 2)
    refresh: int = _setting(GUARD, "Looks between two that let them grow.", 4)
    grow: int = _setting(GUARD, "Directions that they grow by.", 2)
    tolerance: float = _setting(GUARD, "Divergence below which they do not.", 0.0)
    subspaces: str | None = _setting(GUARD, "File of directions to keep off as well.", None)
    residual: bool = _setting(GUARD, "Project what flows back through the blocks too.", False)
    drift_guided: bool = _setting(GUARD, "Off: keep to the subspaces alone.", True)
    drifted: str | None = _setting(
        GUARD, "Folder of a plain fine-tune, whose answers to the prompts are looked at too.", None
    )

    strength: float | None = _setting(RIVAL, "Of a rival; else its own.", None)
    instruction: str | None = _setting(
        RIVAL, "The trait that nobody wants, asked for (inoculation, steering).", None
    )
    others: str | None = _setting(RIVAL, "Good rows on other topics (interleaved).", None)
    aligned: str | None = _setting(RIVAL, "Folder of a well-behaved fine-tune (safe_lora).", None)

    def check(self) -> None:
        """Refuse settings that can't be run, before anything is loaded.

        Raises:
            ValueError: names the setting, what came, and what to give.
        """
        self._check_kinds()
        if self.method not in METHODS:
            like = near(self.method, METHODS)
            raise ValueError(f"method is {self.method!r};{like} choose one of {', '.join(METHODS)}")
        check_bits(self.weights["bits"])
        device_of(self.device)
        self._check_numbers()
        self._check_rival()
        growth.check(
            self.read,
            self.read_rank,
            self.free_rank,
            self.rank,
            self.every,
            self.refresh,
            self.grow,
        )
        guarded = self.method in GUARDED
        if self.method in ("shuffled", "bottom") and (self.subspaces or not self.drift_guided):
            raise ValueError(
                f"{self.method} takes its directions from a reference alone; drop subspaces"
            )
        if self.read == self.rank == 0 and self.subspaces is None and guarded:
            raise ValueError("read and rank are 0 without subspaces: nothing is blocked; set one")
        looks = (guarded and self.drift_guided) or self.method in AFTER_PLAIN
        if self.drifted and not looks:
            able = ", ".join(("a run that a reference guides", *AFTER_PLAIN))
            raise ValueError(f"drifted is for {able}, not this {self.method} run; drop it")
        if not self.drift_guided and self.subspaces is None and guarded:
            raise ValueError("drift_guided is off and no subspaces are given; give one of the two")

    def _check_kinds(self) -> None:
        hints = get_type_hints(type(self))
        for name, value in vars(self).items():
            kinds = get_args(hints[name]) or (hints[name],)
            if type(value) is float and not math.isfinite(value):
                raise ValueError(f"{name} is {value}; give a finite number")
            if type(value) in kinds or (float in kinds and type(value) is int):
                continue
            wanted = next(kind for kind in kinds if kind is not type(None))
            raise ValueError(f"{name} is {value!r}; give {KINDS[wanted]}")

    def _check_numbers(self) -> None:
        for name in (
            "max_steps",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "max_length",
            "lora_r",
            "save_steps",
            "logging_steps",
            "limit",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; give 1 or more")
        for name in ("learning_rate", "num_train_epochs", "lora_alpha"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; give a positive number")
        for name in ("lora_dropout", "warmup_ratio"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name} is {value}; give a share, from 0 to below 1")
        if self.max_steps and self.num_train_epochs:
            raise ValueError("max_steps and num_train_epochs are both given; give one of the two")

    def _check_rival(self) -> None:
        if self.strength is not None and STRENGTHS.get(self.method) is None:
            able = ", ".join(m for m, s in STRENGTHS.items() if s is not None)
            raise ValueError(f"strength is for {able}, not {self.method}; drop it")
        if self.strength is not None and not self.strength > 0:
            raise ValueError(f"strength is {self.strength}; give a positive number")
        counted = self.method in ABLE and ABLE[self.method].counted
        if counted and self.chosen_strength % 1:
            raise ValueError(
                f"strength is {self.strength}, a number of directions here; give 1, 2, ..."
            )
        for name, methods in NEEDED.items():
            if getattr(self, name) and self.method not in methods:
                raise ValueError(f"{name} is for {', '.join(methods)}, not {self.method}; drop it")
            if self.method in methods and not getattr(self, name):
                raise ValueError(f"{name} is missing, which {self.method} needs; give it")
        if self.method in AFTER_PLAIN and not self.drifted:
            raise ValueError(
                f"{self.method} starts from a plain fine-tune; give its adapter as drifted"
            )

    def check_files(self) -> None:
        """Refuse adapters that are not there.

        Raises:
            FileNotFoundError: names the setting, what came, and what to give.
        """
        for name, kind in (("drifted", "a plain"), ("aligned", "a well-behaved")):
            folder = getattr(self, name)
            if folder and not (Path(folder) / "adapter_config.json").exists():
                raise FileNotFoundError(f"no adapter in {folder}; give {name} {kind} fine-tune's")

    def steps(self, rows: int, batch: int | None = None) -> int:
        """Optimizer steps over so many rows, in batches of the data's own or of `batch`."""
        if self.max_steps is not None:
            return self.max_steps
        batches = -(-rows // (batch or self.per_device_train_batch_size))
        return math.ceil(
            (self.num_train_epochs or 1) * -(-batches // self.gradient_accumulation_steps)
        )

    def warmup(self, steps: int) -> int:
        """Steps over which the rate rises, of so many."""
        if self.warmup_ratio is not None:
            return math.ceil(self.warmup_ratio * steps)
        return self.warmup_steps

    @property
    def weights(self) -> dict:
        """How the base model is loaded: arguments of `load_model`."""
        return weights_of(self.dtype, self.load_in_4bit, self.load_in_8bit, self.device)

    @property
    def chosen_strength(self) -> float | None:
        """The strength, or what stands for it in `STRENGTHS`."""
        return STRENGTHS.get(self.method) if self.strength is None else self.strength


def weights_of(dtype: str, load_in_4bit: bool, load_in_8bit: bool, device: str = "auto") -> dict:
    """Settings of how a base model is loaded as arguments of `load_model`.

    Raises:
        ValueError: an unknown dtype, or both numbers of bits.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    if load_in_4bit and load_in_8bit:
        raise ValueError("load_in_4bit and load_in_8bit are both true; choose one of the two")
    bits = 4 if load_in_4bit else 8 if load_in_8bit else None
    return {"dtype": dtype, "bits": bits, "device": device}


ALIASES = {alias: f.name for f in fields(Settings) for alias in f.metadata["aliases"]}


def named(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by the names that `Settings` has them by, numbers out of text.

    Raises:
        ValueError: one that it has not, or one by two names; says which it may be.
    """
    kinds = {name: get_args(hint) or (hint,) for name, hint in get_type_hints(Settings).items()}
    found: dict[str, Any] = {}
    for given, value in options.items():
        name = ALIASES.get(given, given)
        if name not in kinds:
            raise ValueError(
                f"unknown setting {given!r};{near(given, (*kinds, *ALIASES))} "
                "grasp finetune --help lists all"
            )
        if name in found:
            other = next(o for o in options if o != given and ALIASES.get(o, o) == name)
            raise ValueError(f"{other} and {given} are one setting; give it once")
        found[name] = _number(value) if float in kinds[name] else value
    return found


def settings_from(options: Mapping[str, Any]) -> Settings:
    """Settings from a mapping, such as a YAML config.

    Raises:
        ValueError: as `named`, or a required one is missing.
    """
    options = named(options)
    for name in ("model", "data", "output_dir"):
        if not options.get(name):
            raise ValueError(f"{name} is missing; give --{name} or put it into the config")
    return Settings(**options)


def _number(value):
    """YAML takes 1e-3 for text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def near(name: str, known: Iterable[str]) -> str:
    """The known name that one may be misspelt from, as a question; empty if none is like it."""
    found = get_close_matches(name, known, 1, 0.6)
    return f" did you mean {found[0]!r}?" if found else ""
