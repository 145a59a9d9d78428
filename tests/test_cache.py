"""What a start found is taken up by the next, of the same model and prompts alone."""

import pytest
import torch

from grasp import Guard
from grasp.bases import start
from grasp.bases.stream import Stream
from grasp.data import drawing
from tests.models import PROMPTS, batch, build, train, trainable, with_lora

OPTIONS = {"reference": PROMPTS, "tokens": 3, "rank": 2, "refresh": 2, "read": 0.9}


@pytest.fixture
def passes(tmp_path, monkeypatch):
    """A cache of its own; how often a block was run, and what was drawn."""
    monkeypatch.setenv("GRASP_CACHE", str(tmp_path))
    seen = {"blocks": 0, "references": 0}
    advance, reference = Stream._advance, start.Reference

    def counted(self, batch):
        seen["blocks"] += 1
        return advance(self, batch)

    class Counted(reference):
        def __init__(self, *args, **options):
            seen["references"] += 1
            super().__init__(*args, **options)

    monkeypatch.setattr(Stream, "_advance", counted)
    monkeypatch.setattr(start, "Reference", Counted)
    return seen


def trained(freeze, seed=0, change=None, **options):
    """Weights after a few guarded steps, and the guard."""
    model = build(seed=seed)
    if change is not None:
        change(model)
    torch.manual_seed(3)
    model = with_lora(model)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    with Guard(model, optimizer=optimizer, freeze_inputs=freeze, **OPTIONS | options) as guard:
        train(model, optimizer, 4)
        assert guard.certificate()["holds"]
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}, guard


def same(one, other) -> bool:
    return all(torch.equal(one[0][n], p) for n, p in other[0].items())


@pytest.mark.parametrize("freeze", [True, False])
def test_the_second_start_finds_all_there(passes, freeze):
    first = trained(freeze)
    looked = dict(passes)
    assert looked["blocks"] and looked["references"] == 1
    second = trained(freeze)
    assert passes == looked and same(first, second)
    assert first[1].certificate() == second[1].certificate()
    if not freeze:
        V = {n.split("layers.1.")[1]: b for n, b in second[1].bases.items() if "lora_A" in n
             and "layers.1." in n}  # fmt: skip
        assert V["self_attn.q_proj.lora_A.default"] is V["self_attn.v_proj.lora_A.default"]


def edited(model):
    with torch.no_grad():  # one number of one matrix
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"change": edited},
        {"reference": PROMPTS[:-1]},
        {"tokens": 2},
        {"read": 0.8},
        {"read_rank": 4},
        {"free_rank": 3},
        {"quick": False},
    ],
)
def test_another_models_or_prompts_are_not_taken(passes, freeze, other, monkeypatch):
    trained(freeze)
    looked = passes["blocks"]
    found = trained(freeze, **other)
    assert passes["blocks"] > looked
    monkeypatch.setenv("GRASP_CACHE", "off")
    assert same(found, trained(freeze, **other))


@pytest.mark.parametrize("freeze", [True, False])
def test_a_start_that_was_killed_goes_on(passes, freeze, monkeypatch):
    class Killed(BaseException):
        pass

    whole = trained(freeze, read=0.85)  # of its own entry: nothing of it is taken below
    through, before = Stream.through, dict(passes)

    def killed(self, n, batches, watched):
        if n == 1:
            raise Killed
        return through(self, n, batches, watched)

    monkeypatch.setattr(Stream, "through", killed)
    with pytest.raises(Killed):
        trained(freeze)
    monkeypatch.setattr(Stream, "through", through)
    whole = trained(freeze)
    assert passes["references"] == before["references"]
    monkeypatch.setenv("GRASP_CACHE", "off")
    assert same(whole, trained(freeze))


def test_answers_that_were_drawn_before_a_kill_are_not_drawn_again(passes, monkeypatch, tmp_path):
    """And what comes of them is bit for bit what it would have been."""

    class Killed(BaseException):
        pass

    monkeypatch.setattr(drawing, "FEW", 8)  # of the 40 prompts
    groups, continued = [], drawing._continued

    def counted(model, rows, *args):
        if len(groups) == most:
            raise Killed
        groups.append(len(rows))
        return continued(model, rows, *args)

    monkeypatch.setattr(drawing, "_continued", counted)
    most = 2
    with pytest.raises(Killed):
        trained(True)
    assert len(list(tmp_path.glob("drawn/*/*"))) == 2 and not list(tmp_path.glob("reference/*"))
    most = groups.clear()
    found = trained(True)
    assert groups == [8, 8, 8]  # two of five were there
    assert not list(tmp_path.glob("drawn/*")) and len(list(tmp_path.glob("reference/*/*"))) == 1
    kept = found[1].growth.reference.state_dict()
    monkeypatch.setenv("GRASP_CACHE", "off")
    other = trained(True)
    whole = other[1].growth.reference.state_dict()
    assert same(found, other) and all(torch.equal(kept[k], T) for k, T in whole.items())


def test_what_is_damaged_is_found_anew(passes, tmp_path):
    first = trained(True)
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 9  # the reference, and four inputs in each of two blocks
    for n, file in enumerate(files):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2] if n % 2 else b"")
    assert same(first, trained(True))
    assert passes["references"] == 2


def test_a_folder_that_takes_nothing_costs_nothing(monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("GRASP_CACHE", str(blocked / "inside"))
    found = trained(True)
    monkeypatch.setenv("GRASP_CACHE", "off")
    assert same(found, trained(True))


def test_an_adapter_that_learned_is_part_of_the_model(passes):
    def attached(steps):
        torch.manual_seed(3)
        model = with_lora(build())
        train(model, torch.optim.AdamW(trainable(model), lr=1e-2), steps)
        with Guard(model, freeze_inputs=False, **OPTIONS | {"rank": 0}) as guard:
            model(**batch())
        return guard.bases

    one, two = attached(1), attached(2)
    assert passes["references"] == 2
    assert any(one[n].shape != V.shape or not torch.equal(one[n], V) for n, V in two.items())
