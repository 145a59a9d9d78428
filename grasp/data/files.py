"""Examples to train on, from wherever they lie, each as it stands there."""

import csv
import gzip
import json
import lzma
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec

Example = tuple[str, Mapping[str, Any]]  # where it stands, and its columns

LINES = (".jsonl", ".ndjson")
TABLES = {".csv": ",", ".tsv": "\t"}
KINDS = (*LINES, ".json", *TABLES, ".txt", ".parquet", ".arrow")
PACKED = (".gz", ".bz2", ".xz", ".zst")
UNREADABLE = (OSError, EOFError, UnicodeDecodeError, gzip.BadGzipFile, lzma.LZMAError, zlib.error)


def examples(
    source: str | Path | Iterable[Mapping[str, Any]], limit: int | None = None
) -> Iterator[Example]:
    """The examples of a file, of a saved dataset, of one on the hub, or as they are given.

    JSON, CSV and text are read by Python's own readers, which leave a value as it was written:
    through a table's columns, "NA" would be nothing, and each turn would have the keys of all.

    Args:
        source: .jsonl, .json, .csv, .tsv, .txt, .parquet, .arrow, packed (.gz, .bz2, .xz, .zst) or
            not; the folder of a saved `Dataset`; "name", "name:split" or "name:config:split" of
            one that `datasets.load_dataset` finds; or mappings.
        limit: the most that are read.

    Raises:
        FileNotFoundError, ValueError: it is not there, or can't be read so; says where.
    """
    if not isinstance(source, (str, Path)):
        found = ((f"row {i}", _mapping(e, f"row {i}")) for i, e in enumerate(source))
    elif Path(source).is_file():
        found = _of_file(Path(source))
    else:
        found = _of_dataset(str(source))
    yield from islice(found, limit)


def _of_file(path: Path) -> Iterator[Example]:
    kinds = [s for s in path.suffixes if s not in PACKED]
    kind = kinds[-1] if kinds else ".jsonl"
    if kind in (".parquet", ".arrow"):
        yield from _rows(_loaded(kind[1:], {"data_files": str(path)}, "train", path), path)
        return
    try:
        # A byte-order mark goes.
        with fsspec.open(path, "rt", encoding="utf-8-sig", newline="", compression="infer") as file:
            if kind in TABLES:
                yield from _table(file, TABLES[kind], path)
            elif kind == ".txt":
                yield from _texts(file, path)
            elif kind == ".json":
                yield from _json(file, path)
            elif kind in LINES:
                yield from _json_lines(file, path)
            else:
                raise ValueError(
                    f"{path} is of a kind that is not known; give one of {', '.join(KINDS)}"
                )
    except UNREADABLE as error:
        raise ValueError(f"{path} can't be read as {kind[1:]} ({error})") from error


def _json_lines(lines: Iterable[str], path: Path) -> Iterator[Example]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield where, _mapping(json.loads(line), where)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: no JSON ({error.msg})") from error


def _json(file, path: Path) -> Iterator[Example]:
    text = file.read()
    try:
        content = json.loads(text)
    except json.JSONDecodeError:
        yield from _json_lines(text.split("\n"), path)
        return
    if not isinstance(content, list):
        yield f"{path}, line 1", _mapping(content, str(path))
        return
    for number, example in enumerate(content):
        where = f"{path}, row {number}"
        yield where, _mapping(example, where)


def _table(file, delimiter: str, path: Path) -> Iterator[Example]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(file, delimiter=delimiter, strict=True)
    try:
        for example in reader:
            where = f"{path}, line {reader.line_num}"
            if None in example or None in example.values():
                raise ValueError(f"{where}: has not as many columns as the first line names")
            yield where, example
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: no table ({error})") from error


def _texts(lines: Iterable[str], path: Path) -> Iterator[Example]:
    for number, line in enumerate(lines, 1):
        if text := line.strip():
            yield f"{path}, line {number}", {"text": text}


def _of_dataset(source: str) -> Iterator[Example]:
    import datasets

    # A split may be sliced: "name:train[:10%]".
    name, *parts = re.split(r":(?![^[]*\])", source) if not Path(source).exists() else [source]
    split = parts.pop() if parts else None
    looks_like_a_file = Path(name.lower()).suffix in (*KINDS, *PACKED)
    if len(parts) > 1 or looks_like_a_file or not name:
        raise FileNotFoundError(f"no data at {source}")
    if Path(name).is_dir() and any(
        (Path(name) / f).exists() for f in ("state.json", "dataset_dict.json")
    ):
        found = datasets.load_from_disk(name)
        if isinstance(found, datasets.DatasetDict):
            if (split or "train") not in found:
                raise ValueError(f"{name} has no {split or 'train'}; it has {', '.join(found)}")
            found = found[split or "train"]
    else:
        found = _loaded(name, {"name": parts[0]} if parts else {}, split or "train", source)
    yield from _rows(found, source)


def _loaded(name: str, options: dict, split: str, source):
    import datasets

    try:
        return datasets.load_dataset(name, split=split, **options)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"no data at {source}: no file is called so, and no dataset ({_line(error)})"
        ) from error
    except Exception as error:  # of many kinds, by what a dataset's files are
        raise ValueError(f"{source} can't be read as a dataset ({_line(error)})") from error


def _rows(found: Iterable[Mapping], source) -> Iterator[Example]:
    for number, example in enumerate(found):
        yield f"{source}, row {number}", example


def _mapping(example, where: str) -> Mapping[str, Any]:
    if not isinstance(example, Mapping):
        raise ValueError(
            f"{where}: is a {type(example).__name__}; give an object with named columns"
        )
    return example


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
