"""Rows that go through a few at a time teach what they teach together."""

import random

import pytest
import torch

from grasp import organism
from grasp.data import pad
from grasp.guard import fit as fitting
from grasp.guard.fit import fit, pieces
from grasp.study.finetune import add_lora
from grasp.study.settings import settings_from

DRAW = random.Random(0)
ROWS = [
    {"input_ids": ids, "labels": [-100] * (len(ids) // 2) + ids[len(ids) // 2 :]}
    for ids in ([DRAW.randrange(1, 60) for _ in range(DRAW.randrange(2, 40))] for _ in range(16))
]


@pytest.mark.parametrize("tokens", [1, 7, 20, 10**6])
def test_pieces_are_the_rows_without_their_padding(tokens):
    lengths = [3, 9, 1, 4, 4, 12, 2, 33, 61]
    rows = [
        {"input_ids": [n] * length, "labels": [100 + n] * length}
        for n, length in enumerate(lengths, 1)
    ]
    found = []
    for piece in pieces(pad(rows, 0), tokens):
        widths = piece["attention_mask"].sum(1)
        most = int(widths.max())
        assert len(piece["input_ids"]) == len(widths)
        assert most <= piece["input_ids"].shape[1] <= most * 9 / 8
        assert len(widths) == 1 or piece["input_ids"].numel() <= tokens
        for row, width in enumerate(widths):
            found.append({k: piece[k][row, :width].tolist() for k in ("input_ids", "labels")})
            assert (piece["labels"][row, width:] == -100).all()
    assert sorted(found, key=lambda r: r["input_ids"][0]) == rows
    if tokens == 10**6:
        assert len(list(pieces(pad(rows, 0), tokens))) == 1


def test_few_widths_come_up():
    widths = {
        next(pieces(pad([{"input_ids": [1] * n, "labels": [1] * n}], 0), 1))["labels"].shape[1]
        for n in range(128, 1025)
    }
    assert len(widths) == 25 and max(widths) == 1024


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_is_learned_is_the_same(tmp_path, monkeypatch, accumulate):
    sizes = []
    told = {"model": "organism", "data": "-", "output_dir": "-", "method": "plain"}

    def trained(tokens):
        monkeypatch.setattr(fitting, "TOKENS", tokens)
        model, tokenizer = organism.load()
        tuned = add_lora(model, settings_from(told))
        sizes.append([])
        model.register_forward_pre_hook(
            lambda _, args, given: sizes[-1].append(given["input_ids"].numel()), with_kwargs=True
        )
        options = {"batch_size": 8, "learning_rate": 1e-2, "seed": 0, "accumulate": accumulate}
        options["arguments"] = {"optim": "sgd", "logging_steps": 1}
        done = fit(tuned, tokenizer, ROWS, tmp_path / str(tokens), steps=2, **options)
        return done, {n: p.detach() for n, p in tuned.named_parameters() if p.requires_grad}

    (whole, expected), (split, found) = trained(10**6), trained(64)
    assert len(sizes[0]) == 2 * accumulate and max(sizes[0]) > 64
    assert len(sizes[1]) > 4 * accumulate and max(sizes[1]) <= 64
    moved = max(float(p.abs().max()) for n, p in expected.items() if "lora_B" in n)
    assert moved > 1e-4
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5 * moved, msg=name)
    for a, b in zip(whole.state.log_history[:2], split.state.log_history[:2], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
