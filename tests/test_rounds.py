"""Rounds add what guarded short runs still write, and end by their rule."""

import torch

from grasp import model as architecture
from grasp.bases.rounds import discover_in_rounds
from tests.models import WIDTH, build, with_lora


def planted_run(strengths):
    """A short run that writes along the strongest directions that the guard leaves it."""
    axes = torch.eye(WIDTH)[:, : len(strengths)] * torch.tensor(strengths)

    def run(known, seed):
        left = axes if known is None else axes - known[0] @ (known[0].mT @ axes)
        model = with_lora(build(), ["o_proj", "down_proj"], r=1)
        for t in architecture.inspect(model).trained():
            best = left[:, left.norm(dim=0).argmax()]
            t.parameter.data.copy_(best[:, None])
        return model

    return run


def test_rounds_peel_directions_off_in_order():
    said = []
    found = discover_in_rounds(
        planted_run([4.0, 3.0, 2.0]),
        rank=2,
        per_round=1,
        seeds=2,
        on_round=lambda n, s, share: said.append((n, s.rank, round(share, 2))),
    )
    assert found.rank == 2 and found.source["method"] == "rounds"
    torch.testing.assert_close(found[0].abs(), torch.eye(WIDTH)[:, :2], atol=1e-5, rtol=0)
    assert [s[:2] for s in said] == [(0, 1), (1, 2)]


def test_ends_when_little_is_written():
    found = discover_in_rounds(planted_run([4.0, 0.1]), rank=8, per_round=1, seeds=1)
    assert found.rank == 1
