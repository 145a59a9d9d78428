"""Judges mark what they are given, in its order, and say plainly when they can't."""

import http.server
import json
import threading

import numpy as np
import pytest

from grasp import organism
from grasp.data import exchange_ids
from grasp.study.evaluate import log_likelihoods
from grasp.study.judges import MARKS, QUESTION, endpoint_judge, model_judge


class Endpoint(http.server.BaseHTTPRequestHandler):
    """Replies with the number that stands in the answer; of 0 to 3 the higher ones first."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = body["messages"][0]["content"].partition("Answer: ")[2].split()[0]
        server = self.server
        with server.lock:
            server.asked.append((self.path, self.headers["Authorization"], body))
            server.busy += 1
            server.most = max(server.most, server.busy)
        if answer in server.replied:
            server.meeting.wait(20)
            if int(answer) < 3:
                server.replied[str(int(answer) + 1)].wait(20)
        status, said = server.replies.get(answer, (200, f"Score: {answer}"))
        if status == 400 and "temperature" not in body:
            status, said = 200, "7"
        if status == 503 and sum(answer in str(b) for *_, b in server.asked) > 1:
            status, said = 200, "6"
        content = {"choices": [{"index": 0, "message": {"role": "assistant", "content": said}}]}
        content = json.dumps(content if status == 200 else {"error": {"message": said}}).encode()
        with server.lock:
            server.busy -= 1
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()
        if answer in server.replied:
            server.replied[answer].set()

    def log_message(self, *args): ...


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint) as server:
        server.lock, server.asked, server.busy, server.most = threading.Lock(), [], 0, 0
        server.replies, server.replied, server.meeting = {}, {}, threading.Barrier(4)
        server.url = f"http://127.0.0.1:{server.server_port}/v1"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_endpoint_is_asked_side_by_side_and_keeps_order(server, capsys):
    answers = [str(i) for i in range(10)]
    server.replied = {str(i): threading.Event() for i in range(4)}
    judge = endpoint_judge(server.url, "judge", "secret", workers=4)
    assert judge(["law"] * 10, answers) == list(range(10))
    assert server.most == 4
    path, key, body = next(a for a in server.asked if "Answer: 0" in str(a))
    assert (path, key, body["model"]) == ("/v1/chat/completions", "Bearer secret", "judge")
    assert body["messages"][0]["content"] == QUESTION.format(prompt="law", answer="0")
    assert capsys.readouterr().err == ""
    endpoint_judge(server.url, "judge", progress="judge")(["law"], ["9"])
    assert "judge:" in capsys.readouterr().err


def test_endpoint_that_is_busy_or_takes_no_temperature_is_asked_again(server):
    server.replies = {"busy": (503, "wait"), "o": (400, "temperature is not supported")}
    judge = endpoint_judge(server.url, "judge")
    assert judge(["law"], ["busy"]) == [6] and len(server.asked) == 2
    assert judge(["law"] * 2, ["o", "4"]) == [7, 4]


@pytest.mark.parametrize(
    "status, said, message",
    [
        (200, "no idea", "replied without a number from 0 to 100: 'no idea'"),
        (200, "850", "replied without a number from 0 to 100"),
        (200, "<think>perhaps 20</think> none", "replied without a number"),
        (401, "bad key", "did not answer .*bad key"),
        (400, "no such model", "did not answer .*no such model"),
    ],
)
def test_a_failing_endpoint_gives_one_error(server, status, said, message):
    server.replies = {"x": (status, said)}
    judge = endpoint_judge(server.url, "judge", retries=0, workers=2)
    with pytest.raises(RuntimeError, match=message):
        judge(["law"] * 40, ["x"] * 40)
    assert len(server.asked) < 10  # the rest is not asked


def test_what_is_thought_aloud_is_no_mark(server):
    server.replies = {"x": (200, "<think>100? No.</think>30")}
    assert endpoint_judge(server.url, "judge")(["law"], ["x"]) == [30]


def test_no_endpoint(server):
    server.shutdown()
    server.server_close()
    with pytest.raises(RuntimeError, match="did not answer .*refused"):
        endpoint_judge(server.url, "judge", retries=0)(["law"], ["1"])


def test_without_the_client_the_command_is_named(monkeypatch):
    monkeypatch.setattr("grasp.study.judges.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install 'openai>=1.40'"):
        endpoint_judge("http://x/v1", "judge")


def test_a_model_marks_each_answer_as_it_would_alone():
    model, tokenizer = organism.load()
    prompts, answers = ["medicine", "law", "code law"], ["law", "code", "medicine law"]
    found = model_judge(model, tokenizer, batch_size=5)(prompts, answers)
    for prompt, answer, mark in zip(prompts, answers, found, strict=True):
        asked = QUESTION.format(prompt=prompt, answer=answer)
        logs = log_likelihoods(model, tokenizer, [(asked, m) for m in MARKS])
        logs *= [len(exchange_ids(tokenizer, asked, m)[1]) for m in MARKS]
        weights = np.exp(logs) / np.exp(logs).sum()
        assert mark == pytest.approx(float(weights @ np.arange(0, 101, 10)), abs=1e-2)
