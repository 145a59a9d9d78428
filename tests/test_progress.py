"""Long work says what it does at once and goes on saying so; where it is to be quiet it is."""

import json
import os
import pty
import re
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch

import grasp
from grasp import Guard, progress
from grasp.guard.fit import fit
from grasp.model import load_model, with_lora
from grasp.organism import World
from grasp.progress import Stage, speaking, tell
from grasp.study.finetune import run
from grasp.study.settings import settings_from
from tests.models import PROMPTS, batch, build
from tests.models import with_lora as small_lora
from tests.test_trainer import trainer

STAGES = (
    "Reading {data}",
    "Loading organism",
    "Turning rows into tokens",
    "Setting up training",
    "Preparing the guard",
    "Looking for an earlier start of this model",
    "Drawing the model's answers to 64 prompts",
    "Reading what each layer takes in",
    "Training",
    "Measuring how far the model moved",
    "Saving the adapter",
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GRASP_CACHE", str(tmp_path / "cache"))


def settings(folder: Path, **options):
    rows, prompts = World(0).rows("medicine", "train"), World(0).prompts(["law", "guns"])
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "prompts.txt").write_text("\n".join(prompts))
    own = {
        "model": "organism",
        "data": str(folder / "rows.jsonl"),
        "reference": str(folder / "prompts.txt"),
        "output_dir": str(folder / "out"),
        "max_steps": 3,
        "tokens": 1,
        "every": 1,
        "refresh": 1,
    }
    return settings_from(own | options)


def test_each_stage_of_a_run_announces_itself(tmp_path, capfd):
    chosen = settings(tmp_path)
    run(chosen)
    said = capfd.readouterr().err.splitlines()
    opened = [line.removesuffix(" …") for line in said if line.endswith(" …")]
    assert opened == [s.format(data=chosen.data) for s in STAGES]
    steps = [line for line in said if line.startswith("Step ")]
    assert len(steps) == 3 and all(re.match(r"Step \d: loss [\d.]+, learning", s) for s in steps)
    assert all(" of the gradient blocked" in s for s in steps)


def test_what_is_known_from_an_earlier_start_is_said(tmp_path, capfd):
    run(settings(tmp_path))
    assert "an earlier start (" not in capfd.readouterr().err
    run(settings(tmp_path, output_dir=str(tmp_path / "again")))
    said = capfd.readouterr().err
    where = tmp_path / "cache"
    assert f"answers to the prompts are taken from an earlier start ({where})" in said
    assert f"28 of 28 inputs of its layers is known from an earlier start ({where})" in said
    assert "Drawing" not in said and "Reading what each layer" not in said


@pytest.mark.parametrize("method", ["grasp", "plain"])
def test_a_quiet_run_says_nothing(tmp_path, capfd, method):
    run(settings(tmp_path, method=method), quiet=True)
    said = capfd.readouterr()
    assert said.out == "" and said.err == ""


@pytest.mark.parametrize("quiet", [True, False])
def test_in_a_trainer_it_speaks_where_its_bars_do(tmp_path, capfd, quiet):
    callback = grasp.GraspCallback(reference=PROMPTS, tokens=3, rank=2)
    train = trainer(tmp_path / "out", callback, disable_tqdm=quiet)
    capfd.readouterr()
    train.train()
    said = capfd.readouterr().err
    for what in ("Preparing the guard", "Drawing the model's answers", "Measuring how far"):
        assert (what in said) != quiet


def test_a_guard_in_a_loop_of_ones_own_is_patient(capfd):
    def attached():
        with Guard(small_lora(build()), reference=PROMPTS, tokens=3, read=0.9) as guard:
            guard.model(**batch())

    attached()
    assert capfd.readouterr().err == ""
    with speaking(1e-9):
        attached()
    assert "Preparing the guard …" in capfd.readouterr().err


class Heard:
    """A stream that can be waited on."""

    def __init__(self, terminal=False):
        self.text, self.terminal, self.new = "", terminal, threading.Condition()

    def write(self, text: str) -> None:
        with self.new:
            self.text += text
            self.new.notify_all()

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return self.terminal

    def wait_for(self, pattern: str) -> None:
        with self.new:
            assert self.new.wait_for(lambda: re.search(pattern, self.text), 60), self.text


@pytest.mark.parametrize("terminal", [True, False])
def test_it_goes_on_while_one_call_lasts(monkeypatch, terminal):
    heard = Heard(terminal)
    monkeypatch.setattr(sys, "stderr", heard)
    monkeypatch.setattr(progress._Bar, "every", 0.01)
    monkeypatch.setattr(progress._Lines, "every", 0.01)
    with speaking(0), Stage("Outside"), Stage("Working", 8, "rows") as stage:
        heard.wait_for(r"Working …")
        heard.wait_for(r"Working: 0 of 8 rows, \d s so far")  # and nothing was updated
        stage.update(4)
        heard.wait_for(r"Working: 4 of 8 rows, about \d s left")
    if not terminal:
        assert not re.search(r"Outside: \d", heard.text)  # the innermost speaks
    assert not progress._shown


def test_time_left_is_said_from_what_was_done_here(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stage = Stage("Training", 50, "steps", done=20)
    now[0] += 30
    assert stage._going_on() == "Training: 20 of 50 steps, 30 s so far"
    stage.done = 30
    now[0] += 60
    assert stage._going_on() == "Training: 30 of 50 steps, about 3 min 0 s left"
    stage = Stage("Drawing", 19152, "tokens")
    now[0] += 7290
    assert stage._going_on() == "Drawing: 0%, 2 h 1 min so far"
    stage.done = 11856
    assert stage._going_on() == "Drawing: 62%, about 1 h 14 min left"
    assert Stage("Loading")._going_on() == "Loading: 0 s so far"


def test_silence_is_not_broken_inside(capfd):
    with speaking(None), speaking(0), Stage("Working"):
        tell("a line")
    assert capfd.readouterr().err == ""
    with speaking(0), Stage("Working"):
        tell("a line")
    assert capfd.readouterr().err == "Working …\na line\n"


def test_only_the_first_process_speaks(capfd, monkeypatch):
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        with speaking(0), Stage("Working"):
            tell(rank)
    assert capfd.readouterr().err == "Working …\n0\n"


def test_a_stage_that_fails_ends(capfd, monkeypatch):
    monkeypatch.setattr(progress, "SHORT", 0)
    with pytest.raises(KeyError), speaking(0), Stage("Working"):
        raise KeyError
    assert re.fullmatch(r"Working …\nWorking: stopped after \d s\n", capfd.readouterr().err)
    assert not progress._shown


def test_a_terminal_that_tells_no_size_shows_a_bar():
    """As one that a container or a CI job opens."""
    code = (
        "from grasp.progress import *\nwith speaking(0), Stage('Working', 3, 'rows') as s:\n"
        "    s.update(3); tell('a line')"
    )
    here, there = pty.openpty()
    done = subprocess.Popen([sys.executable, "-c", code], stderr=there, stdout=there)
    os.close(there)
    shown = b""
    while True:
        try:
            part = os.read(here, 4096)
        except OSError:  # it is closed
            break
        shown += part
        if not part:
            break
    os.close(here)
    said = shown.decode()
    assert done.wait() == 0 and "Working …" in said and "Working: done in 0 s" in said
    assert "a line" in said


def test_a_command_speaks_before_torch_is_there():
    code = "import sys, grasp.progress\nprint('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"
    done = subprocess.run(
        [sys.executable, "-m", "grasp", "finetune"], capture_output=True, text=True
    )
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and lines[0] == "Loading PyTorch …"
    assert lines[-1] == "grasp: model is missing; give --model or put it into the config"


def test_a_checkpoint_asks_no_hub(tmp_path, monkeypatch):
    from peft.utils import save_and_load

    def asked(*args, **kwargs):
        raise AssertionError("a hub was asked")

    monkeypatch.setattr(save_and_load, "check_file_exists_on_hf_hub", asked)
    model, tokenizer = load_model("organism")
    model = small_lora(model)
    model.peft_config["default"].base_model_name_or_path = "nobody/nothing"
    with pytest.raises(AssertionError, match="a hub was asked"):
        model.save_pretrained(tmp_path / "asks")
    rows = [{k: v[0].tolist() for k, v in batch(rows=1).items()}] * 4
    pace = {"steps": 1, "batch_size": 4, "learning_rate": 1e-3, "seed": 0, "save_every": 1}
    fit(model, tokenizer, rows, tmp_path / "out", quiet=True, **pace)
    assert (tmp_path / "out" / "checkpoint-1" / "adapter_model.safetensors").exists()
    assert "save_pretrained" not in vars(model)


def test_what_others_print_stays_away(capfd, monkeypatch):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, _ = load_model("organism")
        with_lora(model, config)
    assert capfd.readouterr() == ("", "")
    with warnings.catch_warnings(record=True) as told:  # the filter is for that call alone
        warnings.simplefilter("always")
        get_peft_model(load_model("organism")[0], config)
        warnings.warn("another", FutureWarning, stacklevel=1)
    assert "another" in [str(w.message) for w in told]
    assert torch.is_tensor(model.get_input_embeddings().weight)
