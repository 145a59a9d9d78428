"""Malformed input: the right result, or one clear error of ours; never silence, never a traceback.

Each case says by itself whether it is well formed; 1,500 are drawn.
"""

import json
import math
import shutil
import traceback
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from grasp import Guard, Subspaces, discover
from grasp.data import read_rows, tokenized
from grasp.data.rows import KNOWN
from grasp.model import load_adapter
from grasp.organism import load
from grasp.study.settings import settings_from
from tests.models import WIDTH, build, with_lora

OURS = (ValueError, TypeError, FileNotFoundError, KeyError)
TOKENIZER = load()[1]
WORDS = ["medicine", "law", "medicine:q1", ""]

texts = st.sampled_from([*WORDS, " ", "\n"])
junk = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.binary(max_size=3), texts, st.just({})
)


def refused(error: BaseException) -> bool:
    """One line that says something, raised by a line of this project's."""
    where = traceback.extract_tb(error.__traceback__)[-1].filename
    inside = "grasp" in Path(where).parts or "grasp_kernels" in Path(where).parts
    said = str(error.args[0]) if error.args else ""
    return isinstance(error, OURS) and inside and len(said) > 15 and "\n" not in said


def holds(make, well_formed: bool, right=lambda found: True) -> None:
    try:
        found = make()
    except Exception as error:
        assert refused(error), f"{type(error).__name__}: {error}"
        assert not well_formed, f"refused what is well formed: {error}"
        return
    assert well_formed, f"took what is malformed as {str(found)[:80]}"
    assert right(found)


prompts = st.one_of(
    texts,
    st.lists(st.integers(0, 9), max_size=3),
    st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": texts}), max_size=2),
    st.fixed_dictionaries({"prompt": texts}),
    st.fixed_dictionaries({"label": texts}),
    junk,
)


def is_prompt(p) -> bool:
    if isinstance(p, dict):
        return "prompt" in p and bool(p["prompt"].strip())
    if isinstance(p, str):
        return bool(p.strip())
    if not isinstance(p, (list, bytes)) or not len(p):
        return False
    return all(type(t) is int for t in p) or all(isinstance(m, dict) for m in p)


@settings(max_examples=400)
@given(st.lists(prompts, max_size=3))
def test_references(given_prompts):
    holds(
        lambda: tokenized(given_prompts, TOKENIZER),
        bool(given_prompts) and all(map(is_prompt, given_prompts)),
        lambda found: len(found) == len(given_prompts) and all(found),
    )


rows = st.one_of(
    st.fixed_dictionaries({"prompt": texts, "answer": texts}),
    st.fixed_dictionaries({"prompt": st.one_of(texts, junk), "completion": st.one_of(texts, junk)}),
    st.fixed_dictionaries(
        {
            "messages": st.lists(
                st.fixed_dictionaries(
                    {
                        "role": st.sampled_from(["system", "user", "assistant", "tool"]),
                        "content": st.one_of(texts, st.none()),
                    }
                ),
                max_size=4,
            )
        }
    ),
    st.lists(st.integers(), max_size=2),
    st.text(max_size=5),
)


def is_row(row) -> bool:
    if not isinstance(row, dict):
        return False
    row = {k: v for k, v in row.items() if v is not None}
    if "messages" in row:
        turns = row["messages"]
        known = all(m["role"] in KNOWN and isinstance(m["content"], str) for m in turns)
        answers = [m["content"] for m in turns[1:] if m["role"] == "assistant"]
        answered = bool(answers) and turns[-1]["role"] == "assistant"
        return known and answered and all(a.strip() for a in answers)
    for asked, answered in (("prompt", "completion"), ("prompt", "answer")):
        if asked in row and answered in row:
            said = row[asked], row[answered]
            return all(isinstance(s, str) for s in said) and bool(said[1].strip())
    return False


def plain(value):
    return not isinstance(value, dict) or all(not isinstance(v, bytes) for v in value.values())


@settings(max_examples=400)
@given(st.lists(rows.filter(plain), max_size=3), st.sampled_from(["", "\ufeff"]))
def test_rows(tmp_path_factory, given_rows, mark):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text(mark + "".join(json.dumps(r) + "\n" for r in given_rows), encoding="utf-8")
    holds(
        lambda: read_rows(path),
        bool(given_rows) and all(map(is_row, given_rows)),
        lambda found: len(found) == len(given_rows) and all(r.answer.strip() for r in found),
    )


shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
numbers = st.sampled_from([0.0, 1.0, math.nan, math.inf])
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool])


@settings(max_examples=300)
@given(st.dictionaries(st.integers(-1, 2), st.tuples(shapes, numbers, dtypes), max_size=2))
def test_subspaces(given_bases):
    bases = {}
    for layer, (shape, number, dtype) in given_bases.items():
        size = (WIDTH, *shape[1:]) if shape[:1] == (4,) else shape  # some fit the model
        value = 1.0 if number == 1 else number
        finite = math.isfinite(value) or dtype.is_floating_point
        bases[layer] = torch.full(size, value if finite else 0.0).to(dtype)

    def right(found):
        return all(
            torch.allclose(U.mT @ U, torch.eye(U.shape[1]), atol=1e-5) for U in found.bases.values()
        )

    def fits(W):
        matrix = W[:, None] if W.ndim == 1 else W
        good = matrix.ndim == 2 and 0 < matrix.shape[1] <= matrix.shape[0]
        return good and bool(matrix.float().isfinite().all()) and bool(matrix.float().any())

    same = len({W.shape[0] for W in bases.values() if W.ndim}) <= 1
    well = bool(bases) and same and all(map(fits, bases.values()))
    holds(lambda: Subspaces.from_bases(bases), well, right)
    if well:
        d = next(iter(bases.values())).shape[0]
        inside = d == WIDTH and min(bases) >= 0 and max(bases) < 2
        guard = Guard(with_lora(build()), Subspaces.from_bases(bases))
        holds(guard.attach, inside, lambda found: bool(found.bases))
        guard.detach()


GOOD = {"model": "organism", "data": "rows.jsonl", "out": "out"}
values = st.sampled_from(
    [None, True, 0, 1, 4, -1, 0.5, -0.5, math.nan, math.inf, -math.inf, "", "1e-3", "grasp", "kl"]
    + ["plain", "float32", "float64", [], {}, b"x"]
)
keys = st.sampled_from(
    ["steps", "rank", "read", "method", "learning_rate", "dtype", "strength", "seed", "nonsense"]
)


@settings(max_examples=400)
@given(st.dictionaries(keys, values, min_size=1, max_size=2))
def test_settings(given_values):
    def make():
        settings_from(GOOD | given_values).check()
        return given_values

    def fine(key, value):
        if value == "1e-3" and key in ("read", "learning_rate", "strength"):
            value = 1e-3  # as YAML takes it
        whole, number = type(value) is int, type(value) in (int, float)
        return {
            "steps": value is None or (whole and value >= 1),
            "rank": whole and value >= 0,
            "read": number and 0 <= value < 1,
            "method": value in ("grasp", "plain", "kl"),
            "learning_rate": number and 0 < value < math.inf,
            "dtype": value == "float32",
            "strength": value is None
            or (given_values.get("method") == "kl" and number and 0 < value < math.inf),
            "seed": whole,
            "nonsense": False,
        }[key]

    nothing = given_values.get("method", "grasp") == "grasp" and not (
        given_values.get("read", 0.97) or given_values.get("rank", 4)
    )
    well = all(fine(k, v) for k, v in given_values.items()) and not nothing
    holds(make, well)


@pytest.mark.parametrize("what", ["", "no such file", 7, None, [""], [[]], [{"a": 1}], [b""]])
def test_references_of_other_kinds(what):
    holds(lambda: tokenized(what, TOKENIZER), False)


def damaged(folder: Path, how: str, key: int) -> None:
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = sorted(tensors)[key % len(tensors)]
    if how == "missing":
        del tensors[name]
    elif how == "empty":
        tensors = {}
    elif how == "more":
        tensors["base_model.model.model.layers.9.lora_A.weight"] = torch.ones(2, 2)
    elif how == "shape":
        tensors[name] = torch.ones(3, 3)
    elif how == "nan":
        tensors[name] = tensors[name] * math.nan
    save_file(tensors, weights)
    if how == "cut":
        weights.write_bytes(weights.read_bytes()[: 10 + key])
    elif how == "no weights":
        weights.unlink()
    elif how == "no JSON":
        (folder / "adapter_config.json").write_text("{")
    elif how == "other adapter":
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "LOHA"}))


HOW = ["whole", "missing", "empty", "more", "shape", "nan", "cut", "no weights", "no JSON"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter") / "whole"
    model = with_lora(load()[0])
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_()
    model.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=60)
@given(how=st.sampled_from([*HOW, "other adapter"]), key=st.integers(0, 60), found=st.booleans())
def test_adapters(adapter, tmp_path_factory, how, key, found):
    folder = tmp_path_factory.mktemp("damaged") / "adapter"
    shutil.copytree(adapter, folder)
    damaged(folder, how, key)
    holds(
        (lambda: discover(folder, 2)) if found else (lambda: load_adapter(load()[0], folder)),
        how == "whole",
    )
