"""What a run says at its end is what its files hold, and its clock what its work took."""

import time

import pytest
import torch

from grasp.files import write_json
from grasp.guard.clock import Clock, timed
from grasp.model import loading
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
    adapter = tmp_path / "adapter"
    assert ending(tmp_path) == [
        "Learned: the loss was 2.41 at step 4, 1.02 at step 38.",
        "Elsewhere: on 192 prompts from other topics the model moved by 0.0031 nats a token (KL).",
        "Guarantee: holds. No more than 3.5e-08 of any matrix's change lies in what was blocked.",
        "Cost of the guard: 3% of 100 s of training, 74 s before it, 0.1 GB of memory.",
        f"Next: grasp evaluate --model tiny --adapter {adapter} --out {tmp_path}/scores.json",
    ]


def test_what_does_not_hold_is_not_said_to(tmp_path):
    files(tmp_path, **CERTIFICATE | {"holds": False, "through": None})
    said = "\n".join(ending(tmp_path))
    assert "DOES NOT HOLD" in said and "holds." not in said


def test_a_plain_run_has_no_guard_to_speak_of(tmp_path):
    files(tmp_path, log=LOG[:1])
    assert [line.partition(":")[0] for line in ending(tmp_path)] == ["Learned", "Next"]


def test_the_adapter_is_complete(tmp_path):
    """It loads with stock PEFT, its tokenizer beside it, and its page says what it is."""
    import json

    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from grasp.organism import World
    from grasp.study.finetune import run
    from grasp.study.settings import settings_from

    rows = World(0).rows("medicine", "train")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "prompts.txt").write_text("\n".join(World(0).prompts(["law", "guns"])))
    options = {"model": "organism", "data": str(tmp_path / "rows.jsonl"), "steps": 3, "tokens": 1}
    options |= {"reference": str(tmp_path / "prompts.txt"), "out": str(tmp_path / "first")}
    adapter = run(settings_from(options), quiet=True)
    page = (adapter / "README.md").read_text()
    front, _, text = page.removeprefix("---\n").partition("---\n")
    base = next(line for line in front.splitlines() if line.startswith("base_model:"))
    assert "- grasp" in front and f"{len(rows)} rows of `rows.jsonl`" in text
    assert "Guarantee: holds." in text and "| `steps` | 3 |" in text and "Next:" not in text
    assert "| `lora_alpha` | 32 |" in text and "| False |" not in text and "{" not in front
    assert f"--model {base.removeprefix('base_model: ')} --reference FILE_OF_ITS" in text
    certificate = json.loads((adapter / "grasp.json").read_text())
    assert certificate == json.loads((adapter.parent / "grasp.json").read_text())
    assert certificate["versions"]["torch"] == torch.__version__
    assert certificate["settings"]["prompts"] == len(World(0).prompts(["law", "guns"]))
    name = base.removeprefix("base_model: ")
    plain = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    told = PeftModel.from_pretrained(plain, adapter)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    ids = torch.tensor([tokenizer(rows[0]["prompt"])["input_ids"]])
    before = told(ids).logits
    torch.testing.assert_close(told.merge_and_unload()(ids).logits, before, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("value", "said"),
    [(1.4265e-7, "1.5e-07"), (1e-6, "1e-06"), (0.0, "0"), (0.2546, "0.26"), (3.0001e-7, "3.1e-07")],
)
def test_no_more_than_is_never_less(value, said):
    from grasp.guard.record import at_most

    assert at_most(value) == said and float(said) >= value


def test_a_packaged_model_is_known_by_its_name_on_the_hub():
    from grasp.model import known_as

    assert known_as("smollm2-135m-instruct") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert known_as("who/what") == "who/what"


def test_its_package_is_found_by_that_name_too(monkeypatch, tmp_path):
    """So that an adapter's own base is loaded where there is no hub."""
    (tmp_path / "carrier").mkdir()
    (tmp_path / "carrier" / "__init__.py").touch()
    (tmp_path / "carrier" / "model.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(loading, "PACKAGED", {"small": ("carrier", "a-carrier", "Who/Small")})
    expected = str(tmp_path / "carrier"), {"gguf_file": "model.gguf"}
    assert loading._place("small") == loading._place("Who/Small") == expected
    monkeypatch.setattr(loading, "PACKAGED", {"small": ("missing", "a-carrier", "Who/Small")})
    assert loading._place("Who/Small") == ("Who/Small", {})
