"""An Axolotl plugin: `plugins: [grasp.integrations.axolotl.GraspPlugin]` guards the run.

All else is optional and stands in a `grasp:` section.

    grasp:
      reference: prompts.txt   # one prompt a line; grasp's own where it is left out
      read: 0.95               # any other argument of `Guard` that is a number, a word or a flag
"""

from inspect import signature
from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, ConfigDict, create_model, field_validator, model_validator

from grasp import data
from grasp.bases.growth import Growth
from grasp.bases.subspaces import Subspaces
from grasp.guard.guard import Guard
from grasp.guard.trainer import GraspCallback

GIVEN = {"optimizer", "reference", "tokenizer", "drifted"}
"""Arguments that the trainer gives, that have a form of their own here, or that no file holds."""
PARALLEL = ("tensor_parallel_size", "context_parallel_size", "sequence_parallel_degree")
REFUSED = {
    "peft_use_dora": "DoRA's magnitudes move each row of a weight whole; leave it out, for a LoRA",
    "relora": "ReLoRA merges its adapter and starts it anew, out of the guard; leave it out",
    "relora_steps": "ReLoRA merges its adapter and starts it anew, out of the guard; leave it out",
}


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")

    reference: str | list[str] | None = None
    subspaces: str | None = None

    @field_validator("reference", "subspaces")
    @classmethod
    def _is_there(cls, value):
        if isinstance(value, str) and not Path(value).exists():
            raise ValueError(
                f"{value!r} is not there; give a path (of prompts, a file with one a line; of "
                "subspaces, what Subspaces.save wrote)"
            )
        return value


def _options() -> dict[str, Any]:
    """The arguments of a guard that a YAML file can hold, by name: type and default."""
    known = {**signature(Guard).parameters, **signature(Growth).parameters}
    return {
        name: (parameter.annotation | None, None)
        for name, parameter in known.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in GIVEN
    }


Section = create_model("Section", __base__=_Section, **_options())
"""What stands under `grasp:`; a key that is none of these is refused."""


class GraspArgs(BaseModel):
    """What Axolotl's configuration gains; it sees the rest of it too, to refuse by name."""

    grasp: Section | None = None  # type: ignore[valid-type]

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, config):
        for key, why in REFUSED.items():
            if config.get(key):
                raise ValueError(f"{key} is {config[key]}, which grasp can't guard: {why}")
        for key in PARALLEL:
            if (config.get(key) or 1) > 1:
                raise ValueError(
                    f"{key} is {config[key]}, which grasp can't guard: a process sees a part of "
                    "each row or weight; leave it out, and train with DDP"
                )
        return config


class GraspPlugin(BasePlugin):
    """Adds `GraspCallback` to whatever trainer Axolotl builds, for SFT and preferences alike."""

    def get_input_args(self) -> str:
        return f"{__name__}.{GraspArgs.__name__}"

    def add_callbacks_pre_trainer(self, cfg, model) -> list[GraspCallback]:
        """Axolotl keeps plugins for its process's life: a later run that lists none has no guard.

        Raises:
            ValueError, FileNotFoundError: as `GraspCallback`, `Subspaces.load`.
        """
        if not any(name.endswith(f".{type(self).__name__}") for name in cfg.plugins or []):
            return []
        given = dict(cfg.grasp or {})
        subspaces, reference = given.pop("subspaces", None), given.pop("reference", None)
        if subspaces is None and reference is None:
            reference = data.default_prompts()
        loaded = None if subspaces is None else Subspaces.load(subspaces)
        return [GraspCallback(loaded, reference=reference, **given)]
