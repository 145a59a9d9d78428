"""Options from a YAML config, from the command line, and from assignments on it."""

from pathlib import Path
from typing import Any

import yaml


def options_from(
    config: Path | None, given: dict[str, Any], assignments: list[str] | None = None
) -> dict[str, Any]:
    """A config's keys, with what was given beside it, and with assignments, in their place.

    Args:
        config: YAML file of keys, or a run's finetune.json; None starts from none.
        given: those that are None are left out.
        assignments: "key=value", the value in YAML; "finetune.steps=9" is steps under finetune.

    Raises:
        FileNotFoundError, ValueError: no such file, no YAML, or no assignment; says which.
    """
    options = read_config(config) if config is not None else {}
    if "done" in options and "settings" in options:  # of a run that was made
        options = dict(options["settings"])
    options |= {k: v for k, v in given.items() if v is not None}
    for assignment in assignments or []:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise ValueError(f"--set {assignment!r} has no '='; write --set key=value")
        *outer, last = key.split(".")
        inside = options
        for name in outer:  # "finetune.steps" is the key steps of what stands under finetune
            inside = inside.setdefault(name, {})
            if not isinstance(inside, dict):
                raise ValueError(f"--set {assignment!r}: {name} holds no keys")
        try:
            inside[last] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {assignment!r} has no YAML after its '='") from error
    return options


def read_config(path: Path) -> dict[str, Any]:
    """The keys of a YAML file.

    Raises:
        FileNotFoundError, ValueError: no such file, no YAML, or no keys in it.
    """
    if not path.exists():
        raise FileNotFoundError(f"no config at {path}")
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML ({error})") from error
    if not isinstance(options, dict):
        raise ValueError(f"{path} holds no keys; write one `key: value` a line")
    return options
