"""What `examples/kernels` promises, it does: each file runs alone on a small model."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "examples" / "kernels"


def recipe(name: str):
    pytest.importorskip("transformers")
    spec = spec_from_file_location(f"recipe_{name}", FOLDER / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_recipe_is_run_here_and_is_short():
    files = {f.stem: f.read_text() for f in FOLDER.glob("*.py")}
    tested = Path(__file__).read_text()
    assert files and all(f'recipe("{name}")' in tested for name in files)
    assert all(len(text.splitlines()) < 80 for text in files.values())


def test_abliteration_leaves_nothing_of_the_directions():
    after = recipe("abliteration").main()
    assert len(after) == 7 and max(after.values()) <= 1e-6


def test_abliteration_takes_one_direction():
    module = recipe("abliteration")
    model = torch.nn.Module()
    model.o_proj = torch.nn.Linear(8, 12)
    model.get_input_embeddings = lambda: embedding
    embedding, directions = torch.nn.Embedding(5, 12), torch.randn(12, 1)
    assert min(module.written(model, directions).values()) > 1e-2
    module.ablate_(model, directions)
    assert max(module.written(model, directions).values()) <= 1e-6


def test_adam_nscl_keeps_the_first_task():
    found = recipe("adam_nscl").main()
    before, after, second, through = found["Adam-NSCL"]
    _, plain_after, _, plain_through = found["Adam"]
    assert abs(after - before) <= 1e-4 * before and plain_after > 10 * before
    assert through <= 2e-6 < plain_through  # a few roundings of weights ten times their change
    assert second < 0.2  # and learns, from a mean square of 1


def test_osf_trains_as_peft_does(monkeypatch):
    pytest.importorskip("peft.tuners.osf")
    osf = recipe("osf")
    assert osf.main() <= 1e-3  # rounding, which Adam enlarges where a gradient is next to nothing
    theirs = osf.train(1)
    monkeypatch.setattr(osf.OSFLayer, "_attach_hooks", osf.attach)
    for name, weight in osf.train(1).items():
        torch.testing.assert_close(weight, theirs[name], atol=1e-5, rtol=0)
    monkeypatch.setattr(osf.OSFLayer, "_attach_hooks", lambda *_: None)
    unprojected = osf.train(1)
    assert max(float((unprojected[n] - theirs[n]).abs().max()) for n in theirs) > 1e-4
