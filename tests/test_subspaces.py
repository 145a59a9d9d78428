"""Frozen, orthonormal, bound to a model, and saved whole or not at all."""

import errno
import json
import os

import pytest
import torch

import grasp
from grasp import Subspaces
from grasp_kernels.testing import orthonormal
from tests.models import WIDTH, build


@pytest.fixture
def subspaces():
    shared = orthonormal(WIDTH, 3)
    return Subspaces.from_bases({0: shared, 1: shared}, "tiny", {"note": "made up"})


def test_orthonormalises_and_drops_dependent_directions():
    W = torch.randn(WIDTH, 2)
    s = Subspaces.from_bases({0: torch.cat([W, W @ torch.ones(2, 1)], 1), 3: torch.ones(WIDTH)})
    assert s.layers == [0, 3] and s.rank == 2 and s[3].shape == (WIDTH, 1)
    torch.testing.assert_close(s[0].mT @ s[0], torch.eye(2))
    with pytest.raises(KeyError, match="no basis for block 1"):
        s[1]


def test_is_frozen(subspaces):
    with pytest.raises(AttributeError):
        subspaces.bases = {}
    with pytest.raises(TypeError):
        subspaces.bases[0] = torch.zeros(WIDTH, 1)


def test_round_trip(subspaces, tmp_path):
    path = subspaces.save(tmp_path / "factor")
    back = Subspaces.load(tmp_path / "factor")
    assert all(torch.equal(back[i], subspaces[i]) for i in (0, 1))
    assert (back.base_model, dict(back.source)) == ("tiny", {"note": "made up"})
    assert json.loads(path.with_suffix(".json").read_text())["width"] == WIDTH


def test_union_overlap_and_random(subspaces):
    other = Subspaces.from_bases({0: orthonormal(WIDTH, 2, seed=5)}, "tiny")
    both = subspaces.union(other)
    assert both[0].shape == (WIDTH, 5) and both[1].shape == (WIDTH, 3)
    torch.testing.assert_close(both[0][:, :3], subspaces[0], atol=1e-6, rtol=0)
    assert both.overlap(other)[0] == pytest.approx(1)
    random = subspaces.random_like(1)
    assert torch.equal(random[0], random[1])  # what was shared stays shared
    assert random[0].shape == subspaces[0].shape
    assert random.overlap(subspaces)[0] < 0.5
    assert torch.equal(random[0], subspaces.random_like(1)[0])


def test_refuses_another_model(subspaces):
    model = build()
    subspaces.check(model)  # a model that was built here has no name
    model.config._name_or_path = "tiny"
    subspaces.check(model)
    model.config._name_or_path = "other"
    with pytest.raises(ValueError, match="found in 'tiny', the model is 'other'"):
        subspaces.check(model)
    with pytest.raises(ValueError, match="have width 8, the model 32"):
        Subspaces.from_bases({0: orthonormal(8, 2)}).check(model)
    with pytest.raises(ValueError, match="name block 7, the model has 2"):
        Subspaces.from_bases({7: orthonormal(WIDTH, 2)}).check(model)


@pytest.mark.parametrize(
    ("bases", "message"),
    [
        ({}, "empty"),
        ({0: torch.randn(3, 4)}, "k ≤ d"),
        ({0: torch.full((4, 1), torch.nan)}, "NaN"),
        ({0: torch.zeros(4, 1)}, "all zero"),
        ({0: torch.randn(4, 1), 1: torch.randn(5, 1)}, "differ in width"),
    ],
)
def test_refuses_bad_bases(bases, message):
    with pytest.raises(ValueError, match=message):
        Subspaces.from_bases(bases)


def test_refuses_bad_files(subspaces, tmp_path):
    with pytest.raises(FileNotFoundError, match="grasp discover"):
        Subspaces.load(tmp_path / "none.safetensors")
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"not it")
    with pytest.raises(ValueError, match="no file of subspaces"):
        Subspaces.load(bad)
    path = subspaces.save(tmp_path)
    content = bytearray(path.read_bytes())
    content[-4:] = b"\x00\x00\x80\x40"  # the last number becomes 4.0
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not orthonormal"):
        Subspaces.load(path)


def test_full_disk_leaves_the_old_file(subspaces, tmp_path, monkeypatch):
    path = subspaces.save(tmp_path)
    before = path.read_bytes()

    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"can't save .*No space left.*free space"):
        subspaces.union(subspaces.random_like(0)).save(tmp_path)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "subspaces.json",
        "subspaces.safetensors",
    ]


def test_public_names():
    assert set(grasp.__all__) <= set(dir(grasp)) | {"GraspCallback"}
    assert grasp.GraspCallback.__name__ == "GraspCallback"
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        grasp.Nothing  # noqa: B018
