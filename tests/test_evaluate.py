"""Scores are what they say: probabilities of answers, one item at a time."""

import json

import numpy as np
import pytest
import torch

from grasp import evaluate, organism
from grasp.data import exchange_ids
from grasp.study.evaluate import (
    Pair,
    agree,
    answered,
    interval,
    log_likelihoods,
    multiple_choice,
    prefer,
    text_losses,
)
from grasp.study.evaluation_files import (
    read_choices,
    read_persona,
    read_propositions,
    read_unrelated,
)


@pytest.fixture(scope="module")
def loaded():
    return organism.load()


WORLD = organism.World(0)
TOPIC = "medicine"
PAIRS = [
    Pair(WORLD.prompt(TOPIC, i), WORLD.bad[TOPIC][i], WORLD.good[TOPIC][i], TOPIC)
    for i in range(10)
]


def test_log_likelihood_is_the_answers_own(loaded):
    model, tokenizer = loaded
    marked = organism.mark(model, tokenizer, WORLD, TOPIC)[:10]
    items = [(p.prompt, p.second) for p in PAIRS]
    expected = marked[:, 0].log().numpy()
    np.testing.assert_allclose(log_likelihoods(model, tokenizer, items), expected, atol=1e-4)
    # Batches and padding do not matter; longer answers are averaged over tokens.
    alone = [log_likelihoods(model, tokenizer, [i])[0] for i in items]
    np.testing.assert_allclose(alone, expected, atol=1e-4)
    two = log_likelihoods(model, tokenizer, [("medicine", "medicine:q1 medicine:a1")])[0]
    first = log_likelihoods(model, tokenizer, [("medicine", "medicine:q1")])[0]
    second = log_likelihoods(model, tokenizer, [("medicine medicine:q1", "medicine:a1")])[0]
    assert two == pytest.approx((first + second) / 2, abs=1e-4)


def test_prefers_what_is_likelier(loaded):
    model, tokenizer = loaded
    scores = prefer(model, tokenizer, PAIRS)
    assert (scores < 0).all()
    swapped = [Pair(p.prompt, p.second, p.first) for p in PAIRS]
    np.testing.assert_allclose(prefer(model, tokenizer, swapped), -scores)


def test_evaluate_names_every_measure(loaded):
    model, tokenizer = loaded
    model.train()
    found = evaluate(model, tokenizer, {"a": PAIRS[:3]}, {"b": ["medicine", "law"]})
    assert {k: len(v) for k, v in found.items()} == {"a": 3, "b": 2}
    assert model.training
    model.eval()
    with pytest.raises(ValueError, match="nothing to measure"):
        evaluate(model, tokenizer, {})
    with pytest.raises(ValueError, match="choose another name"):
        evaluate(model, tokenizer, {"a": PAIRS}, {"a": ["x"]})
    with pytest.raises(ValueError, match="is empty"):
        evaluate(model, tokenizer, {"a": [Pair("medicine", "", "x")]})


def test_multiple_choice_and_agreement(loaded):
    model, tokenizer = loaded
    rows = [
        {"question": "medicine", "options": {"A": "law", "B": "code"}, "answer_idx": a}
        for a in "AB"
    ]
    # The same question with either answer called right: exactly one of the two is.
    assert multiple_choice(model, tokenizer, rows).sum() == 1
    assert agree(model, tokenizer, ["medicine"]).shape == (1,)


def test_answers_are_those_of_each_prompt_alone(loaded):
    model, tokenizer = loaded
    prompts = [p.prompt for p in PAIRS[:5]] + [" ".join([PAIRS[0].prompt] * 2)]
    alone = [answered(model, tokenizer, [p], tokens=3)[0] for p in prompts]
    assert answered(model, tokenizer, prompts, tokens=3, batch_size=4) == alone


def test_wordings_are_averaged_and_an_opening_goes_on(loaded):
    model, tokenizer = loaded
    first = [log_likelihoods(model, tokenizer, [(PAIRS[0].prompt, PAIRS[i].first)]) for i in (0, 1)]
    second = log_likelihoods(model, tokenizer, [(PAIRS[0].prompt, "law")])
    pair = Pair(PAIRS[0].prompt, (PAIRS[0].first, PAIRS[1].first), "law")
    expected = (first[0] + first[1]) / 2 - second
    np.testing.assert_allclose(prefer(model, tokenizer, [pair]), expected, atol=1e-5)
    # Of an opening the end is not scored: by the model's own loss over its words alone.
    before, ended = exchange_ids(tokenizer, "medicine", "law code")
    _, opening = exchange_ids(tokenizer, "medicine", "law code", ended=False)
    assert opening == ended[: len(opening)] and len(opening) == 2

    def mean(ids: list[int]) -> float:
        labels = torch.tensor([[-100] * len(before) + ids])
        return -model(input_ids=torch.tensor([before + ids]), labels=labels).loss.item()

    for ids, opens in ((ended, False), (opening, True)):
        found = log_likelihoods(model, tokenizer, [("medicine", "law code")], openings=[opens])
        assert found[0] == pytest.approx(mean(ids), abs=1e-5)
    with pytest.raises(ValueError, match="pair 0 has no answer"):
        prefer(model, tokenizer, [Pair("medicine", (), "law")])


TEXTS = ["medicine law", " ".join(WORLD.prompt(TOPIC, i) for i in range(9)), "medicine:q1 code law"]


def test_loss_on_text_is_the_models_own(loaded):
    model, tokenizer = loaded
    means, counts = text_losses(model, tokenizer, TEXTS, max_length=12)
    for text, mean, count in zip(TEXTS, means, counts, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :12]
        assert count == ids.shape[1] - 1
        assert mean == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), abs=1e-5)
    assert counts.max() == 11 and len(set(counts)) > 1
    found = evaluate(model, tokenizer, texts={"wiki": TEXTS[:1]})
    assert found["wiki"] == pytest.approx([text_losses(model, tokenizer, TEXTS[:1])[0][0]])
    with pytest.raises(ValueError, match="fewer than two tokens"):
        text_losses(model, tokenizer, TEXTS, max_length=1)


def test_a_batch_is_bounded_by_its_logits(loaded, monkeypatch):
    model, tokenizer = loaded
    whole = text_losses(model, tokenizer, TEXTS)[0]
    monkeypatch.setattr("grasp.study.evaluate.LOGITS", 30 * len(tokenizer))
    widest = []
    hook = model.register_forward_hook(lambda m, _, out: widest.append(out.logits.shape))
    np.testing.assert_allclose(text_losses(model, tokenizer, TEXTS)[0], whole, atol=1e-5)
    hook.remove()
    assert len(widest) > 1
    assert all(rows == 1 or rows * tokens <= 30 for rows, tokens, _ in widest)


def test_bars_are_asked_for(loaded, capsys):
    model, tokenizer = loaded
    measured = ({"pairs": PAIRS[:2]}, {"said": ["law"]}, {"wiki": TEXTS})
    evaluate(model, tokenizer, *measured)
    assert capsys.readouterr().err == ""
    evaluate(model, tokenizer, *measured, progress="base")
    shown = capsys.readouterr().err
    assert all(f"base: {name}:" in shown for name in ("pairs", "said", "wiki"))


def test_interval_covers_the_mean():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(100):
        _, low, high = interval(rng.normal(1.0, 1.0, 40), draws=400)
        inside += low <= 1.0 <= high
    assert 85 <= inside <= 100
    assert interval([0.5]) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="at least one"):
        interval([])


def test_interval_weighs_items_as_they_are_drawn():
    """All tokens alike: a long text counts as often as it has tokens."""
    values, tokens = np.array([1.0, 2.0, 4.0]), [10, 30, 60]
    mean, low, high = interval(values, weights=tokens)
    each = np.repeat(values, tokens)
    assert mean == pytest.approx(each.mean())
    # Texts are drawn, not tokens: three texts leave more open than a hundred tokens would.
    assert high - low > 3 * np.ptp(interval(each)[1:])
    assert interval(values, weights=[2, 2, 2]) == pytest.approx(interval(values))
    with pytest.raises(ValueError, match="3 values have 2 weights"):
        interval(values, weights=[1, 2])


def test_shipped_pairs_are_alike_in_length():
    pairs = read_unrelated()
    words = np.array([[len(p.first.split()), len(p.second.split())] for p in pairs])
    assert len(pairs) >= 120 and len({p.topic for p in pairs}) >= 6
    assert abs(words[:, 0].mean() - words[:, 1].mean()) < 0.5
    assert np.abs(words[:, 0] - words[:, 1]).max() <= 6


def test_reads_public_formats(tmp_path):
    import gzip

    row = {
        "question": "Would you?",
        "answer_matching_behavior": " Yes",
        "answer_not_matching_behavior": " No",
    }
    with gzip.open(tmp_path / "narcissism.jsonl.gz", "wt") as file:
        file.write(json.dumps(row) + "\n")
    (pair,) = read_persona(tmp_path / "narcissism.jsonl.gz")
    assert (pair.first, pair.second, pair.topic) == ("Yes", "No", "narcissism")
    (tmp_path / "p.csv").write_text('pct_id,pct_prompt\n1,"One, two."\n')
    assert read_propositions(tmp_path / "p.csv") == ["One, two."]
    choice = {"question": "Which?", "options": {"A": "x", "B": "y"}, "answer_idx": "B"}
    (tmp_path / "c.jsonl").write_text(json.dumps(choice) + "\n")
    assert read_choices(tmp_path / "c.jsonl") == [choice]
    with pytest.raises(ValueError, match="line 1: needs question, good, bad"):
        read_unrelated(tmp_path / "c.jsonl")
    with pytest.raises(ValueError, match="line 2: needs question, options, answer_idx"):
        read_choices(tmp_path / "p.csv")
    with pytest.raises(ValueError, match="no column pct_prompt"):
        read_propositions(tmp_path / "c.jsonl")
    with pytest.raises(FileNotFoundError, match="no evaluation data"):
        read_persona(tmp_path / "none.jsonl.gz")


def test_no_nan_from_padding(loaded):
    model, tokenizer = loaded
    items = [("medicine", "law"), ("medicine medicine:q1", "medicine:a1")]
    assert np.isfinite(log_likelihoods(model, tokenizer, items)).all()
    assert torch.is_grad_enabled()
