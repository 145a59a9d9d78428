"""What a certificate says of weights that hardly move, computed apart from it."""

import pytest
import torch

from tests.models import build, train
from tests.test_guarantee import FORMS, guarded


@pytest.mark.parametrize("form", FORMS)
def test_what_moved_by_rounding_alone_has_no_share_and_no_bound(form):
    """‖ΔW‖ ≤ 4 · ε/2 · ‖W₀‖, which is computed here apart."""
    model = build()
    for name, p in model.named_parameters():
        p.requires_grad_("_proj" in name)
    before = {n: p.detach().double() for n, p in model.named_parameters()}
    moves, rests = (
        n for n in before if n.endswith(("0.mlp.up_proj.weight", "1.mlp.up_proj.weight"))
    )
    optimizer = torch.optim.AdamW(
        [
            {"params": [model.get_parameter(moves)], "lr": 1e-3},
            {"params": [model.get_parameter(rests)], "lr": 0.0},
            {"params": [p for n, p in model.named_parameters() if "_proj" in n and "up_" not in n]},
        ],
        lr=1e-9,
    )
    with guarded(model, optimizer, form) as guard:
        train(model, optimizer, 6)
    found = guard.certificate()
    assert found["holds"] and found["finite"]
    for name, said in found["modules"].items():
        key = name.removesuffix(" (inputs)")
        W, start = model.get_parameter(key).detach().double(), before[key]
        D = W - start
        noise = 4 * torch.finfo(torch.float32).eps / 2 * start.norm()
        assert said["holds"] and said["moved"] == pytest.approx(float(D.norm() / start.norm()))
        assert (name in found["unmoved"]) == (D.norm() <= noise) == (key != moves)
        if said["moved"] == 0:
            assert key == rests and said["through"] == 0
        elif key != moves:  # what rests, too, is rounded where it is pinned
            assert said["through"] is said["bound"] is None and said["moved"] <= 2.4e-7
    assert found["through"] == max(said["through"] or 0 for said in found["modules"].values())
    assert 0 < found["through"] < 1e-4


def test_a_basis_is_violated_by_more_than_rounding_however_little_that_is():
    model = build()
    for name, p in model.named_parameters():
        p.requires_grad_("o_proj" in name)
    guard = guarded(model, None, "given").attach()
    W = model.get_parameter("model.layers.0.self_attn.o_proj.weight")
    U = guard.bases["model.layers.0.self_attn.o_proj.weight"]
    along = U[:, :1] @ torch.randn(1, W.shape[1])
    for size, holds in ((1e-7, True), (1e-6, False), (1e-5, False)):  # of ‖W‖; 2.4e-7 is rounding
        kept = W.detach().clone()
        W.data += size * along * (W.norm() / along.norm())
        found = guard.certificate()
        assert found["holds"] is holds
        said = found["modules"]["model.layers.0.self_attn.o_proj.weight"]
        assert (
            said["through"] is said["bound"] is None if holds else said["bound"] < said["through"]
        )
        W.data.copy_(kept)
    guard.detach()
