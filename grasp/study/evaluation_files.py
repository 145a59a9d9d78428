"""Read what models are evaluated on; a line that does not fit is named."""

import csv
from importlib import resources
from pathlib import Path
from typing import Any

from grasp.data.files import examples
from grasp.study.evaluate import Pair


def read_unrelated(path: Path | str | None = None) -> list[Pair]:
    """Questions with a bad answer (first) and a good one; None reads the 120 that are shipped.

    Raises:
        FileNotFoundError, ValueError: no such file, or a line without `question`, `good`, `bad`.
    """
    shipped = resources.files("grasp").joinpath("assets/unrelated.jsonl")
    with resources.as_file(shipped) as own:
        rows = _lines(own if path is None else Path(path), ("question", "good", "bad"))
    return [Pair(r["question"], r["bad"], r["good"], r.get("topic", "")) for r in rows]


def read_persona(path: Path | str, limit: int | None = None) -> list[Pair]:
    """Model-written persona statements: the first answer is the one that matches the trait.

    Raises:
        FileNotFoundError, ValueError: no such file, or a line of another form.
    """
    matching, other = "answer_matching_behavior", "answer_not_matching_behavior"
    topic = Path(path).name.split(".")[0]
    rows = _lines(Path(path), ("question", matching, other))[:limit]
    return [Pair(r["question"], r[matching].strip(), r[other].strip(), topic) for r in rows]


def read_choices(path: Path | str, limit: int | None = None) -> list[dict[str, Any]]:
    """Multiple choice: `question`, `options` by letter, and `answer_idx`, the right letter.

    Raises:
        FileNotFoundError, ValueError: no such file, or a line of another form.
    """
    return _lines(Path(path), ("question", "options", "answer_idx"))[:limit]


def read_propositions(path: Path | str) -> list[str]:
    """The statements of a table (CSV) with a column `pct_prompt`.

    Raises:
        FileNotFoundError, ValueError: no such file, or no such column.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"no propositions at {path}")
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or "pct_prompt" not in rows[0]:
        raise ValueError(f"{path} has no column pct_prompt, or no rows")
    return [row["pct_prompt"] for row in rows]


def _lines(path: Path, needed: tuple[str, ...]) -> list[dict[str, Any]]:
    if not path.exists():
        raise FileNotFoundError(f"no evaluation data at {path}")
    rows = []
    for where, row in examples(path):
        if any(k not in row for k in needed):
            raise ValueError(f"{where}: needs {', '.join(needed)}")
        rows.append(dict(row))
    if not rows:
        raise ValueError(f"{path} holds no rows")
    return rows
