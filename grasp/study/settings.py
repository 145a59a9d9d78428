"""Everything that decides a fine-tune: the keys of a YAML config and the options of the CLI."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_args, get_type_hints

from grasp.bases import growth
from grasp.model.loading import check_bits
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
DTYPES = ("float32", "bfloat16")

KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True)
class Settings:
    """Everything that decides a fine-tune; the keys of a YAML config and the options of the CLI."""

    model: str
    data: str
    out: str
    method: str = "grasp"
    strength: float | None = None
    """Of a rival; None takes what stands in `STRENGTHS`."""
    instruction: str | None = None
    """The trait that nobody wants, asked for: what inoculation and steering need to be told."""
    others: str | None = None
    """File of good rows on other topics, for interleaved."""
    aligned: str | None = None
    """Folder of a well-behaved fine-tune's adapter, for safe_lora."""
    dtype: str = "float32"
    """Of the frozen weights, in `DTYPES`; what is trained is fp32."""
    load_in_4bit: bool = False
    """QLoRA: the blocks' frozen linear maps in nf4, by bitsandbytes, and `dtype` computes."""
    load_in_8bit: bool = False
    """As `load_in_4bit`, in int8."""
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
    """Folder of a plain fine-tune's adapter: a guarded run's reference is continued by it as well,
    and the rivals in `AFTER_PLAIN` start from it."""
    drift_guided: bool = True
    """Bases grow from the divergence on the reference; False keeps to the subspaces alone."""
    read: float = 0.95
    """Share of the energy of each matrix's inputs that is blocked, on prompts held out."""
    read_rank: int | None = None
    """Largest number of directions of inputs for each matrix; None sets no limit."""
    free_rank: int | None = None
    """Most directions of inputs left to learn in, at random; None: 64 above 1 GiB of bases."""
    freeze_inputs: bool | None = None
    """Put each LoRA's A off these inputs and train B alone."""
    quick: bool | None = None
    """Look at the reference's own tokens alone; None is quick on a CPU."""
    rank: int = 4
    tokens: int = 96
    batch: int = 8
    every: int = 2
    refresh: int = 4
    grow: int = 2
    tolerance: float = 0.0
    residual: bool = False
    save_every: int | None = 50

    def check(self) -> None:
        """Refuse settings that can't be run, before anything is loaded.

        Raises:
            ValueError: names the setting, what came, and what to give.
        """
        self._check_kinds()
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; choose one of {', '.join(METHODS)}")
        check_bits(self.weights["bits"])
        for name in ("steps", "batch_size", "accumulate", "max_length", "lora_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give 1 or more")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; give a positive number")
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
            text = " (YAML takes 1e-3 for text: write 1.0e-3)" if wanted is float else ""
            raise ValueError(f"{name} is {value!r}; give {KINDS[wanted]}{text}")

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

    @property
    def weights(self) -> dict:
        """How the base model is loaded: arguments of `load_model`."""
        return weights_of(self.dtype, self.load_in_4bit, self.load_in_8bit)

    @property
    def chosen_strength(self) -> float | None:
        """The strength, or what stands for it in `STRENGTHS`."""
        return STRENGTHS.get(self.method) if self.strength is None else self.strength


def weights_of(dtype: str, load_in_4bit: bool, load_in_8bit: bool) -> dict:
    """Settings of how a base model is loaded as arguments of `load_model`.

    Raises:
        ValueError: an unknown dtype, or both numbers of bits.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    if load_in_4bit and load_in_8bit:
        raise ValueError("load_in_4bit and load_in_8bit are both true; choose one of the two")
    return {"dtype": dtype, "bits": 4 if load_in_4bit else 8 if load_in_8bit else None}


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
