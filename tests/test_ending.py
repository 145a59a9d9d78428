"""What a run says at its end is what its files hold, and its clock what its work took."""

import time

import pytest
import torch

from grasp.files import write_json
from grasp.guard.clock import Clock, timed
from grasp.study.ending import ending
from tests.models import build


class Worker:
    def __init__(self):
        self.clock = Clock(build())

    @timed
    def outer(self):
        time.sleep(0.02)
        self.inner()

    @timed
    def inner(self):
        time.sleep(0.02)


def test_time_inside_itself_counts_once_and_an_error_ends_it():
    worker = Worker()
    before = time.perf_counter()
    worker.outer()
    worker.inner()
    whole = time.perf_counter() - before
    assert 0.06 <= worker.clock.seconds <= whole
    with pytest.raises(ZeroDivisionError), worker.clock:
        torch.ones(1) / 0 if 1 / 0 else None
    counted = worker.clock.seconds
    time.sleep(0.02)
    assert worker.clock.seconds == counted < whole + 0.01


CERTIFICATE = {
    "summary": "The guarantee holds",
    "holds": True,
    "through": 3.4e-8,
    "divergence": 0.00312,
    "settings": {"prompts": 192},
    "cost": {
        "step_seconds": 3.0,
        "training_seconds": 100.0,
        "start_seconds": 74.2,
        "bases_bytes": 120_000_000,
    },
}
LOG = [{"step": 4, "loss": 2.413}, {"step": 8, "eval": 1}, {"step": 38, "loss": 1.02}]


def files(out, log=LOG, **certificate):
    write_json(out / "finetune.json", {"done": True, "settings": {"model": "tiny"}})
    write_json(out / "log.json", log)
    if certificate:
        write_json(out / "grasp.json", certificate)


def test_five_lines(tmp_path):
    files(tmp_path, **CERTIFICATE)
    assert ending(tmp_path) == [
        "Learned: the loss was 2.41 at step 4, 1.02 at step 38.",
        "Elsewhere: on 192 prompts from other topics the model moved by 0.0031 nats a token (KL).",
        "Guarantee: holds. No more than 3e-08 of any matrix's change lies in what was blocked.",
        "Cost of the guard: 3% of 100 s of training, 74 s before it, 0.1 GB of memory.",
        f"Next: grasp evaluate --model tiny --adapter {tmp_path}/adapter --out {tmp_path}/scores.json",
    ]


def test_what_does_not_hold_is_not_said_to(tmp_path):
    files(tmp_path, **CERTIFICATE | {"holds": False, "through": None})
    said = "\n".join(ending(tmp_path))
    assert "DOES NOT HOLD" in said and "holds." not in said


def test_a_plain_run_has_no_guard_to_speak_of(tmp_path):
    files(tmp_path, log=LOG[:1])
    assert [line.partition(":")[0] for line in ending(tmp_path)] == ["Learned", "Next"]
