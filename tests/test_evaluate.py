"""Scores are what they say: probabilities of answers, one item at a time."""

import http.server
import json
import threading

import numpy as np
import pytest
import torch

from grasp import evaluate, organism
from grasp.study.evaluate import (
    Pair,
    agree,
    answered,
    endpoint_judge,
    interval,
    judged,
    log_likelihoods,
    model_judge,
    multiple_choice,
    prefer,
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


def test_judges(loaded):
    model, tokenizer = loaded
    scores, answers = judged(
        model, tokenizer, [p.prompt for p in PAIRS[:3]], lambda p, a: len(p), tokens=1
    )
    assert answers == [p.second for p in PAIRS[:3]]
    assert scores.tolist() == [len(p.prompt) for p in PAIRS[:3]]
    assert 0 <= model_judge(model, tokenizer)("medicine", "law") <= 100


class Endpoint(http.server.BaseHTTPRequestHandler):
    reply = "Score: 85"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["model"] == "judge" and "law" in body["messages"][0]["content"]
        assert self.headers["Authorization"] == "Bearer secret"
        content = json.dumps({"choices": [{"message": {"content": self.reply}}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args): ...


def test_endpoint_judge():
    server = http.server.HTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    judge = endpoint_judge(url, "judge", "secret")
    assert judge("medicine", "law") == 85
    Endpoint.reply = "no idea"
    with pytest.raises(RuntimeError, match="without a number"):
        judge("medicine", "law")
    server.shutdown()
    server.server_close()
    with pytest.raises(RuntimeError, match="did not answer"):
        judge("medicine", "law")


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
